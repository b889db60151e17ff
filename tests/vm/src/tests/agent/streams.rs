//! Bytes of processes over streams of their own: complete, ordered with their ends, fast, leaving nothing.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use testudo_agent_protocol::envelope::Request;
use testudo_agent_protocol::{
    CloseStdinRequest, Frame, FrameReader, HealthRequest, Kind, MetricsRequest, ProcessId, SERVICE,
    Stdio,
};

use prost::Message;

use crate::batch::Test;
use crate::context::Ctx;
use crate::ensure;
use crate::outcome::{Outcome, Verdict};
use crate::pattern::Pattern;
use crate::pod::{Pod, container, process, script};

pub(crate) const TESTS: &[Test] = &[
    Test::new("agent::a_gibibyte_through_cat_is_bit_exact", gibibyte).seconds(600),
    Test::new("agent::streams_beat_requests_for_each_chunk", ratio).seconds(300),
    Test::new("agent::a_slow_reader_holds_up_itself", slow_reader),
    Test::new("agent::ends_of_streams_and_processes", ends),
    Test::new("agent::a_thousand_execs_leave_nothing", thousand).seconds(600),
];

const MIB: usize = 1 << 20;
const CHUNK: usize = 64 * 1024;

fn idle<'a>(ctx: &'a Ctx) -> Verdict<Pod<'a>> {
    let pod = Pod::with_root(ctx)?;
    pod.begin("box", container("exec sleep 10000"), Stdio::default())?;
    Ok(pod)
}

fn mib_per_s(bytes: usize, begun: Instant) -> f64 {
    let micros = u32::try_from(begun.elapsed().as_micros()).unwrap_or(u32::MAX);
    f64::from(u32::try_from(bytes / 1024).unwrap_or(u32::MAX)) / 1024.0 * 1e6
        / f64::from(micros.max(1))
}

/// A different piece each time: making all bytes anew would be what is measured.
fn chunk(block: &[u8], n: usize) -> &[u8] {
    let at = n.wrapping_mul(4099) % MIB;
    &block[at..at + CHUNK]
}

/// Through `cat` in the container and back; MiB/s.
fn through_cat(pod: &Pod<'_>, name: &str, bytes: usize) -> Verdict<f64> {
    let one = pod.number();
    let stdio = Stdio {
        stdin: one,
        stdout: one,
        stderr: 0,
    };
    let id = pod.begin_exec("box", name, process(&["/bin/cat"]), stdio)?;
    let mut stream = pod.stream(one)?;
    let mut writer = stream.try_clone()?;
    let block = Arc::new(Pattern::new(7).next(MIB + CHUNK));
    let begun = Instant::now();
    let sent = block.clone();
    let sender = thread::spawn(move || -> std::io::Result<()> {
        for n in 0..bytes / CHUNK {
            writer.write_all(chunk(&sent, n))?;
        }
        // The half that is done ends; the other goes on.
        writer.shutdown(Shutdown::Write)
    });
    let mut got = vec![0; CHUNK];
    for n in 0..bytes / CHUNK {
        stream.read_exact(&mut got)?;
        ensure!(got == chunk(&block, n), "chunk {n} is not what was sent");
    }
    ensure!(stream.read(&mut got)? == 0, "more came back than was sent");
    let speed = mib_per_s(bytes, begun);
    let joined = sender.join();
    joined.map_err(|_| Outcome::Failed("the sender panicked".into()))??;
    let exit = pod.wait(&id)?;
    ensure!(
        exit.code == 0 && exit.stdout_bytes == u64::try_from(bytes)?,
        "{exit:?}"
    );
    Ok(speed)
}

fn gibibyte(ctx: &Ctx) -> Verdict {
    let pod = idle(ctx)?;
    let speed = through_cat(&pod, "cat", 1024 * MIB)?;
    eprintln!("agent: 1 GiB through cat and back, {speed:.1} MiB/s each way");
    pod.end()?;
    Ok(())
}

/// What requests cost that carry the bytes, are decoded, and refused: they deliver nothing.
fn bare_requests(pod: &Pod<'_>, bytes: usize, chunk: usize) -> Verdict<f64> {
    let mut socket = pod.raw()?;
    let mut reader = FrameReader::default();
    let frame = |stream: u32| {
        let request = Request {
            service: SERVICE.into(),
            method: "WriteStdin".into(),
            payload: vec![7; chunk],
            ..Request::default()
        };
        Frame {
            stream,
            kind: Kind::Request,
            payload: request.encode_to_vec(),
        }
    };
    let begun = Instant::now();
    let mut answer = vec![0; 4096];
    for n in 0..bytes / chunk {
        socket.write_all(&frame(u32::try_from(2 * n + 1)?).to_bytes())?;
        while reader.next_frame()?.is_none() {
            let length = socket.read(&mut answer)?;
            ensure!(length > 0, "the agent hung up");
            reader.push(&answer[..length]);
        }
    }
    Ok(mib_per_s(bytes, begun))
}

/// A process that takes everything, and its input.
fn sink(pod: &Pod<'_>, name: &str) -> Verdict<(ProcessId, UnixStream)> {
    let stdio = Stdio {
        stdin: pod.number(),
        ..Stdio::default()
    };
    let id = pod.begin_exec("box", name, script("exec cat > /dev/null"), stdio)?;
    Ok((id, pod.stream(stdio.stdin)?))
}

/// Bytes for a process, with an answer of the agent to be had before the next chunk: what a request for each
/// chunk is.
fn chunk_by_chunk(pod: &Pod<'_>, bytes: usize, chunk: usize) -> Verdict<f64> {
    let (id, mut stream) = sink(pod, &format!("by-{chunk}"))?;
    let mut client = pod.client()?;
    let data = vec![7; chunk];
    let begun = Instant::now();
    for _ in 0..bytes / chunk {
        stream.write_all(&data)?;
        client.call(&HealthRequest {})?;
    }
    let speed = mib_per_s(bytes, begun);
    stream.shutdown(Shutdown::Write)?;
    ensure!(pod.wait(&id)?.code == 0, "the sink failed");
    Ok(speed)
}

/// One way, into `cat > /dev/null`. 8 KiB is the chunk in which Kata sends.
fn ratio(ctx: &Ctx) -> Verdict {
    let pod = idle(ctx)?;
    let chunk = 8 * 1024;
    let by_chunk = chunk_by_chunk(&pod, 8 * MIB, chunk)?;
    let bare = bare_requests(&pod, 8 * MIB, chunk)?;
    let (id, mut stream) = sink(&pod, "sink")?;
    let bytes = 128 * MIB;
    let data = vec![7; CHUNK];
    let begun = Instant::now();
    for _ in 0..bytes / CHUNK {
        stream.write_all(&data)?;
    }
    stream.shutdown(Shutdown::Write)?;
    let exit = pod.wait(&id)?;
    ensure!(exit.code == 0, "{exit:?}");
    let streams = mib_per_s(bytes, begun);
    let both = through_cat(&pod, "cat", 64 * MIB)?;
    eprintln!(
        "agent: stdin of a process {streams:.1} MiB/s by a stream, {both:.1} there and back; chunk by chunk of 8 KiB \
         {by_chunk:.1} MiB/s ({:.1} times less), requests that carry 8 KiB and deliver nothing {bare:.1} MiB/s ({:.1} \
         times less)",
        streams / by_chunk,
        streams / bare,
    );
    let enough = streams >= 5.0 * by_chunk;
    ensure!(
        enough,
        "{streams:.1} MiB/s, and {by_chunk:.1} chunk by chunk"
    );
    pod.end()?;
    Ok(())
}

fn slow_reader(ctx: &Ctx) -> Verdict {
    let pod = idle(ctx)?;
    let stdio = Stdio {
        stdout: pod.number(),
        ..Stdio::default()
    };
    let id = pod.begin_exec("box", "much", script("head -c 30000000 /dev/zero"), stdio)?;
    let mut stream = pod.stream(stdio.stdout)?;
    thread::sleep(Duration::from_secs(1));
    // Others go on, and nothing piles up in the agent.
    let out = pod
        .exec("box", "other", process(&["/bin/echo", "hello"]), b"")?
        .well()?;
    ensure!(out == "hello\n", "{out:?}");
    let rss = pod.call(&MetricsRequest {})?.values["testudo_agent_rss_bytes"];
    let small = rss < 6e6;
    ensure!(small, "the agent has {rss} bytes");
    let mut all = Vec::new();
    stream.read_to_end(&mut all)?;
    ensure!(all.len() == 30_000_000, "{} bytes", all.len());
    let exit = pod.wait(&id)?;
    ensure!(exit.stdout_bytes == 30_000_000, "{exit:?}");
    pod.end()?;
    Ok(())
}

fn ends(ctx: &Ctx) -> Verdict {
    let pod = idle(ctx)?;
    // What a process wrote before it ended is counted, though nobody has connected yet.
    let stdio = Stdio {
        stdout: pod.number(),
        ..Stdio::default()
    };
    let late = script("(sleep 100; echo late) & head -c 50000 /dev/zero; exit 5");
    let id = pod.begin_exec("box", "late", late, stdio)?;
    let exit = pod.wait(&id)?;
    ensure!((exit.code, exit.stdout_bytes) == (5, 50_000), "{exit:?}");
    let mut stream = pod.stream(stdio.stdout)?;
    stream.read_exact(&mut vec![0; 50_000])?;
    // A reader that leaves is a broken pipe.
    let stdio = Stdio {
        stdout: pod.number(),
        ..Stdio::default()
    };
    let id = pod.begin_exec("box", "yes", process(&["/usr/bin/yes"]), stdio)?;
    drop(pod.stream(stdio.stdout)?);
    let exit = pod.wait(&id)?;
    ensure!(exit.signal == 13, "{exit:?}");
    // The host can end a process's input while it holds the stream.
    let stdio = Stdio {
        stdin: pod.number(),
        ..Stdio::default()
    };
    let id = pod.begin_exec("box", "cat", process(&["/bin/cat"]), stdio)?;
    let _held = pod.stream(stdio.stdin)?;
    pod.call(&CloseStdinRequest {
        id: Some(id.clone()),
    })?;
    let exit = pod.wait(&id)?;
    ensure!(exit.code == 0, "{exit:?}");
    pod.end()?;
    Ok(())
}

fn thousand(ctx: &Ctx) -> Verdict {
    let pod = idle(ctx)?;
    let run = |n: u32| -> Verdict {
        let name = format!("e{n}");
        let out = pod
            .exec("box", &name, process(&["/bin/echo", "hello"]), b"")?
            .well()?;
        ensure!(out == "hello\n", "{name}: {out:?}");
        Ok(())
    };
    (0..100).try_for_each(run)?;
    let settled = || -> Verdict<_> {
        thread::sleep(Duration::from_millis(300));
        Ok(pod.call(&MetricsRequest {})?.values)
    };
    let before = settled()?;
    let begun = Instant::now();
    (100..1100).try_for_each(run)?;
    let each = begun.elapsed() / 1000;
    let after = settled()?;
    for name in ["fds", "threads", "relays", "parked_streams", "processes"] {
        let name = format!("testudo_agent_{name}");
        ensure!(
            before[&name].to_bits() == after[&name].to_bits(),
            "{name}: {} and then {}",
            before[&name],
            after[&name]
        );
    }
    let rss = after["testudo_agent_rss_bytes"];
    let growth = rss - before["testudo_agent_rss_bytes"];
    eprintln!("agent: 1,000 execs, {each:?} each; RSS {rss} bytes, grown by {growth}");
    // Events are kept, up to 512.
    let small = growth < 300_000.0;
    ensure!(small, "the agent has grown by {growth} bytes");
    pod.end()?;
    Ok(())
}
