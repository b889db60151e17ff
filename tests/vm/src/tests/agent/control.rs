//! Processes under control: terminals, signals, limits, what runs out, files in and out.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use testudo_agent_protocol::event::What;
use testudo_agent_protocol::file_place::Of;
use testudo_agent_protocol::{
    ContainerPath, EventsRequest, FilePlace, ListContainersRequest, ListProcessesRequest, Memory,
    PauseContainerRequest, ReadFileRequest, ResizeTtyRequest, Resources, ResumeContainerRequest,
    SignalProcessRequest, StatsContainerRequest, Stdio, TtySize, UpdateContainerRequest,
    WriteFileRequest, code,
};

use crate::batch::Test;
use crate::context::Ctx;
use crate::ensure;
use crate::outcome::Verdict;
use crate::pod::{Pod, container, process_id, script};

pub(crate) const TESTS: &[Test] = &[
    Test::new("agent::a_terminal_is_one", terminal),
    Test::new("agent::memory_that_runs_out_is_told", out_of_memory),
    Test::new("agent::paused_changed_counted", paused_changed_counted),
    Test::new("agent::signals_to_one_and_to_all", signals),
    Test::new("agent::files_go_in_and_out_and_not_beyond", files),
];

fn read_until(stream: &mut UnixStream, end: &str) -> Verdict<String> {
    let mut text = String::new();
    let mut byte = [0];
    while !text.ends_with(end) {
        ensure!(stream.read(&mut byte)? == 1, "it ended: {text:?}");
        text.push(char::from(byte[0]));
    }
    Ok(text)
}

fn size(rows: u32, columns: u32) -> Option<TtySize> {
    Some(TtySize { rows, columns })
}

fn terminal(ctx: &Ctx) -> Verdict {
    let pod = Pod::with_root(ctx)?;
    let one = pod.number();
    let stdio = Stdio {
        stdin: one,
        stdout: one,
        stderr: 0,
    };
    let mut spec = container(
        "trap 'stty size; echo resized' WINCH; trap 'exit 130' INT; tty; stty size; \
         test -c /dev/console && echo console; while :; do sleep 0.1; done",
    );
    let process = spec.process.get_or_insert_default();
    process.terminal = true;
    process.console_size = size(24, 80);
    pod.begin("box", spec, stdio)?;
    let mut stream = pod.stream(one)?;
    read_until(&mut stream, "/dev/pts/0\r\n24 80\r\nconsole\r\n")?;
    let id = process_id("box", "");
    pod.call(&ResizeTtyRequest {
        id: Some(id.clone()),
        size: size(50, 132),
    })?;
    read_until(&mut stream, "50 132\r\nresized\r\n")?;
    // An exec has a terminal of its own.
    let other = pod.number();
    let mut shell = script("tty; stty size; read line; echo got $line");
    shell.terminal = true;
    shell.console_size = size(10, 20);
    let stdio = Stdio {
        stdin: other,
        stdout: other,
        stderr: 0,
    };
    let exec = pod.begin_exec("box", "sh", shell, stdio)?;
    let mut theirs = pod.stream(other)?;
    read_until(&mut theirs, "/dev/pts/1\r\n10 20\r\n")?;
    theirs.write_all(b"words\n")?;
    read_until(&mut theirs, "got words\r\n")?;
    ensure!(pod.wait(&exec)?.code == 0, "the exec failed");
    // The interrupt character is the terminal's business.
    stream.write_all(&[3])?;
    ensure!(pod.wait(&id)?.code == 130, "not interrupted");
    pod.end()?;
    Ok(())
}

fn limited(bytes: i64) -> Resources {
    Resources {
        memory: Some(Memory {
            limit: Some(bytes),
            ..Memory::default()
        }),
        ..Resources::default()
    }
}

fn out_of_memory(ctx: &Ctx) -> Verdict {
    let pod = Pod::with_root(ctx)?;
    let mut client = pod.client()?;
    let pending = client.send(&EventsRequest { after: 0 })?;
    let mut spec = container("exec python3 -c 'b = bytearray(200 << 20)'");
    spec.linux.get_or_insert_default().resources = Some(limited(32 << 20));
    let ended = pod.run("box", spec, b"")?;
    ensure!(
        (ended.exit.code, ended.exit.signal, ended.exit.oom_killed) == (137, 9, true),
        "{ended:?}"
    );
    let first = client.receive(pending)?;
    let mut events = first.events;
    if events.len() < 2 {
        let after = events.last().map_or(0, |event| event.number);
        events.extend(client.call(&EventsRequest { after })?.events);
    }
    let oom = events.iter().find_map(|event| match &event.what {
        Some(What::Oom(oom)) => Some((oom.container.as_str(), oom.kills)),
        _ => None,
    });
    ensure!(oom == Some(("box", 1)), "{events:?}");
    // The guest goes on.
    pod.run("box", container("echo on"), b"")?.well()?;
    pod.end()?;
    Ok(())
}

fn paused_changed_counted(ctx: &Ctx) -> Verdict {
    let pod = Pod::with_root(ctx)?;
    let stdio = Stdio {
        stdout: pod.number(),
        ..Stdio::default()
    };
    let ticking = container("while :; do echo tick; sleep 0.05; done");
    pod.begin("box", ticking, stdio)?;
    let mut stream = pod.stream(stdio.stdout)?;
    read_until(&mut stream, "tick\ntick\n")?;
    let id = || "box".to_owned();
    pod.call(&PauseContainerRequest { id: id() })?;
    // What was under way arrives, then nothing does.
    stream.set_read_timeout(Some(Duration::from_millis(700)))?;
    let mut rest = [0; 4096];
    let quiet = (0..100).any(|_| stream.read(&mut rest).is_err());
    ensure!(quiet, "it goes on while it is paused");
    let exec = pod.refused(&testudo_agent_protocol::ExecProcessRequest {
        id: Some(process_id("box", "no")),
        process: Some(script("true")),
        stdio: None,
    })?;
    ensure!(
        exec.0 == code::WRONG_STATE,
        "an exec while paused: {exec:?}"
    );
    pod.call(&ResumeContainerRequest { id: id() })?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    read_until(&mut stream, "tick\n")?;
    pod.call(&UpdateContainerRequest {
        id: id(),
        resources: Some(limited(48 << 20)),
    })?;
    let out = pod
        .exec("box", "max", script("cat /sys/fs/cgroup/memory.max"), b"")?
        .well()?;
    ensure!(out == "50331648\n", "{out}");
    let stats = pod.call(&StatsContainerRequest { id: id() })?;
    for name in ["memory.current", "cpu.stat.usage_usec", "pids.current"] {
        let value = stats.cgroup.get(name).copied().unwrap_or_default();
        ensure!(value > 0, "{name} is {value}: {stats:?}");
    }
    let pids = pod.call(&ListProcessesRequest { id: id() })?.pids;
    ensure!((1..=2).contains(&pids.len()), "{pids:?}");
    let all = pod.call(&ListContainersRequest {})?.containers;
    ensure!(all.len() == 1 && all[0].id == "box", "{all:?}");
    pod.remove("box")?;
    pod.end()?;
    Ok(())
}

fn signals(ctx: &Ctx) -> Verdict {
    let pod = Pod::with_root(ctx)?;
    let traps =
        |code: u32| format!("trap 'exit {code}' USR1; echo set; while :; do sleep 0.05; done");
    let stdio = Stdio {
        stdout: pod.number(),
        ..Stdio::default()
    };
    pod.begin("box", container(&traps(3)), stdio)?;
    read_until(&mut pod.stream(stdio.stdout)?, "set\n")?;
    let begin = |name: &str| -> Verdict<_> {
        let stdio = Stdio {
            stdout: pod.number(),
            ..Stdio::default()
        };
        let id = pod.begin_exec("box", name, script(&traps(4)), stdio)?;
        read_until(&mut pod.stream(stdio.stdout)?, "set\n")?;
        Ok(id)
    };
    let (one, two) = (begin("one")?, begin("two")?);
    let signal = |id: &testudo_agent_protocol::ProcessId, all| SignalProcessRequest {
        id: Some(id.clone()),
        signal: 10,
        all,
    };
    pod.call(&signal(&one, false))?;
    ensure!(pod.wait(&one)?.code == 4, "one");
    // The first process has heard nothing of it; `all` is what is said, not what is guessed.
    let listed = pod.call(&ListProcessesRequest { id: "box".into() })?.pids;
    ensure!(listed.len() >= 2, "{listed:?}");
    let mut client = pod.client()?;
    let pending = client.send(&testudo_agent_protocol::WaitProcessRequest {
        id: Some(two.clone()),
    })?;
    pod.call(&signal(&two, true))?;
    let exit = client.receive(pending)?.exit.unwrap_or_default();
    // Its container may be gone before it is.
    ensure!(exit.code == 4 || exit.signal == 9, "{exit:?}");
    ensure!(pod.wait(&process_id("box", ""))?.code == 3, "the first");
    pod.end()?;
    Ok(())
}

fn files(ctx: &Ctx) -> Verdict {
    let pod = Pod::with_root(ctx)?;
    pod.begin(
        "box",
        container("ln -s / /tmp/out; ln -s /proc/1/root /tmp/root; exec sleep 1000"),
        Stdio::default(),
    )?;
    let at = |path: &str| {
        Some(FilePlace {
            of: Some(Of::Container(ContainerPath {
                container: "box".into(),
                path: path.into(),
            })),
        })
    };
    let write = |path: &str, offset, data: &[u8]| WriteFileRequest {
        place: at(path),
        mode: 0o640,
        uid: 3,
        gid: 4,
        offset,
        data: data.to_vec(),
        truncate: offset == 0,
        ..WriteFileRequest::default()
    };
    pod.call(&write("/tmp/new", 0, b"hello "))?;
    pod.call(&write("/tmp/new", 6, b"world\n"))?;
    let see = script("cat /tmp/new; stat -c '%a %u %g' /tmp/new");
    let out = pod.exec("box", "see", see, b"")?.well()?;
    ensure!(out == "hello world\n640 3 4\n", "{out}");
    let read = pod.call(&ReadFileRequest {
        place: at("/tmp/new"),
        offset: 2,
        length: 100,
    })?;
    ensure!(read.data == b"llo world\n" && read.size == 12, "{read:?}");
    // Links of the container's end in the container.
    let inside = pod.call(&ReadFileRequest {
        place: at("/tmp/out/etc/hostname"),
        offset: 0,
        length: 100,
    })?;
    ensure!(inside.data == b"guest\n", "{inside:?}");
    let beyond = pod.client()?.call(&write("/tmp/root/init", 0, b"#!"));
    let message = beyond.err().map(|e| e.to_string()).unwrap_or_default();
    ensure!(!message.is_empty(), "a magic link was followed");
    pod.end()?;
    Ok(())
}
