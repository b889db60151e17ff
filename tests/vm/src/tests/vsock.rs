//! Stream sockets between guest and host: complete in both directions, however they end.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::batch::Test;
use crate::context::Ctx;
use crate::launch::Launch;
use crate::outcome::Verdict;
use crate::pattern::Pattern;
use crate::running::Running;
use crate::tests::SOON;
use crate::{Outcome, ensure};

pub(crate) const TESTS: &[Test] = &[
    Test::new("vsock::both_ways_bit_exact", both_ways).seconds(400),
    Test::new("vsock::two_hundred_streams_from_the_host", many_from_host),
    Test::new("vsock::two_hundred_streams_from_the_guest", many_from_guest),
    Test::new("vsock::a_slow_reader_waits_alone", slow_reader),
    Test::new("vsock::last_words_arrive_after_power_off", farewell),
    Test::new("vsock::refusals_reach_both_sides", refused),
    Test::new("vsock::a_client_that_dies_leaves_nothing", client_dies),
    Test::new("vsock::pause_in_the_middle", pause),
    Test::new("vsock::reboot_with_open_streams", reboot),
    Test::new("vsock::a_listening_socket_is_handed_over", handed_over),
    Test::new("vsock::what_cannot_be_is_one_clear_line", bad_input),
];

/// The guest's service of the init.
const SERVICE: u32 = 5000;
const MIB: u64 = 1 << 20;
const CHUNK: usize = 64 * 1024;

fn socket(ctx: &Ctx) -> PathBuf {
    ctx.path("v")
}

fn launch<'a>(ctx: &'a Ctx, orders: &str) -> Launch<'a> {
    let vsock = format!("cid=3,socket={}", socket(ctx).display());
    ctx.guest(orders).args(["--vsock", &vsock]).control()
}

/// A guest whose service is ready.
fn serving<'a>(ctx: &'a Ctx) -> Verdict<Running<'a>> {
    let vm = launch(ctx, &format!("vsock-serve={SERVICE},poweroff")).spawn()?;
    vm.wait_for("VSOCK ready", SOON)?;
    Ok(vm)
}

/// A connection to the guest's port, greeting done.
fn dial(ctx: &Ctx, port: u32) -> Verdict<UnixStream> {
    let mut stream = UnixStream::connect(socket(ctx))?;
    stream.set_read_timeout(Some(SOON))?;
    stream.set_write_timeout(Some(SOON))?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let answer = line(&mut stream)?;
    ensure!(answer.starts_with("OK "), "the answer is {answer:?}");
    Ok(stream)
}

/// A connection to the init's service, with what it is for.
fn ask(ctx: &Ctx, what: &str) -> Verdict<UnixStream> {
    let mut stream = dial(ctx, SERVICE)?;
    stream.write_all(format!("{what}\n").as_bytes())?;
    Ok(stream)
}

fn line(stream: &mut impl Read) -> Verdict<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 && byte != *b"\n" {
        line.extend(byte);
    }
    Ok(String::from_utf8_lossy(&line).into_owned())
}

fn send(to: &mut impl Write, bytes: u64, seed: u64) -> std::io::Result<()> {
    let mut pattern = Pattern::new(seed);
    while pattern.position() < bytes {
        let left = usize::try_from(bytes - pattern.position()).unwrap_or(CHUNK);
        to.write_all(&pattern.next(left.min(CHUNK)))?;
    }
    Ok(())
}

/// Reads to the end and compares.
fn receive(from: &mut impl Read, bytes: u64, seed: u64) -> Verdict {
    let mut pattern = Pattern::new(seed);
    let mut chunk = vec![0; CHUNK];
    loop {
        let got = from.read(&mut chunk)?;
        if got == 0 {
            let came = pattern.position();
            ensure!(came == bytes, "{came} bytes of {bytes} have come");
            return Ok(());
        }
        let at = pattern.position();
        ensure!(
            pattern.next(got) == chunk[..got],
            "bytes from {at} on are not those that were sent"
        );
    }
}

/// Sends to a sink of the guest's and hears what it says.
fn sink(ctx: &Ctx, bytes: u64, seed: u64, wait_ms: u64) -> Verdict {
    let mut stream = ask(ctx, &format!("sink {seed} {wait_ms}"))?;
    send(&mut stream, bytes, seed)?;
    stream.shutdown(Shutdown::Write)?;
    let answer = line(&mut stream)?;
    ensure!(
        answer == format!("{bytes} whole"),
        "the guest says {answer:?}"
    );
    ensure!(line(&mut stream)?.is_empty(), "more after the answer");
    Ok(())
}

fn source(ctx: &Ctx, bytes: u64, seed: u64) -> Verdict {
    receive(
        &mut ask(ctx, &format!("source {bytes} {seed}"))?,
        bytes,
        seed,
    )
}

fn echo(ctx: &Ctx, bytes: u64, seed: u64) -> Verdict {
    let mut stream = ask(ctx, "echo")?;
    let mut sending = stream.try_clone()?;
    let sender = thread::spawn(move || {
        send(&mut sending, bytes, seed)?;
        sending.shutdown(Shutdown::Write)
    });
    receive(&mut stream, bytes, seed)?;
    sender
        .join()
        .map_err(|_| Outcome::Failed("the sender panicked".into()))?
        .map_err(Outcome::from)
}

/// Ends the service; the guest powers off.
fn quit(ctx: &Ctx, vm: Running<'_>) -> Verdict {
    let mut stream = ask(ctx, "quit")?;
    let end = line(&mut stream)?;
    ensure!(end.is_empty(), "after quit: {end:?}");
    let done = vm.finish(SOON)?;
    done.expect_code(0)?;
    done.facts()?;
    ensure!(!socket(ctx).exists(), "the socket's path is still there");
    Ok(())
}

/// Streams that the VMM has, once they are as few.
fn wait_streams(vm: &Running<'_>, want: u64) -> Verdict {
    let deadline = Instant::now() + SOON;
    loop {
        let counters: Value = serde_json::from_str(&vm.ctl_ok(&["counters"])?)?;
        let streams = counters.pointer("/vsock/streams").and_then(Value::as_u64);
        if streams == Some(want) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{streams:?} streams, not {want}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn both_ways(ctx: &Ctx) -> Verdict {
    // What a killed VMM leaves behind.
    drop(UnixListener::bind(socket(ctx))?);
    let vm = serving(ctx)?;
    let begun = Instant::now();
    sink(ctx, 1024 * MIB, 1, 0)?;
    let to_guest = begun.elapsed();
    let begun = Instant::now();
    source(ctx, 1024 * MIB, 2)?;
    let to_host = begun.elapsed();
    println!("     1 GiB to the guest in {to_guest:?}, to the host in {to_host:?}");
    // Nothing at all is a stream too.
    sink(ctx, 0, 3, 0)?;
    source(ctx, 0, 4)?;
    wait_streams(&vm, 0)?;
    quit(ctx, vm)
}

fn many_from_host(ctx: &Ctx) -> Verdict {
    let vm = serving(ctx)?;
    // All are open before the first one ends.
    let mut held = Vec::new();
    for _ in 0..200 {
        held.push(ask(ctx, "echo")?);
    }
    wait_streams(&vm, 200)?;
    thread::scope(|scope| {
        let threads: Vec<_> = held
            .iter_mut()
            .zip(0_u64..)
            .map(|(stream, seed)| {
                scope.spawn(move || -> Verdict {
                    let mut sending = stream.try_clone()?;
                    let sender = thread::spawn(move || {
                        send(&mut sending, 64 * 1024, seed)?;
                        sending.shutdown(Shutdown::Write)
                    });
                    receive(stream, 64 * 1024, seed)?;
                    let sent = sender.join();
                    sent.map_err(|_| Outcome::Failed("the sender panicked".into()))??;
                    Ok(())
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| {
            let joined = thread.join();
            joined.map_err(|_| Outcome::Failed("a thread panicked".into()))?
        })
    })?;
    drop(held);
    wait_streams(&vm, 0)?;
    quit(ctx, vm)
}

fn many_from_guest(ctx: &Ctx) -> Verdict {
    let listener = UnixListener::bind(ctx.path("v_80"))?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || -> std::io::Result<()> {
                let mut from = stream.try_clone()?;
                let mut to = stream;
                std::io::copy(&mut from, &mut to)?;
                to.shutdown(Shutdown::Write)
            });
        }
    });
    let done = launch(ctx, "vsock-dial=80:200:32,poweroff").run()?;
    done.expect_code(0)?;
    let echoed: u32 = done.facts()?.number("vsock.echoed")?;
    ensure!(echoed == 200, "{echoed} of 200 streams came back whole");
    Ok(())
}

fn slow_reader(ctx: &Ctx) -> Verdict {
    let vm = serving(ctx)?;
    let mut slow = ask(ctx, "source 4194304 9")?;
    // A guest that does not read holds the host as well.
    let mut held = ask(ctx, "hold")?;
    held.set_nonblocking(true)?;
    let mut sent = 0_u64;
    let deadline = Instant::now() + Duration::from_secs(2);
    while Instant::now() < deadline {
        match held.write(&[7; 4096]) {
            Ok(n) => sent += u64::try_from(n)?,
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
    ensure!(
        sent < 4 * MIB,
        "{sent} bytes went to a guest that does not read"
    );
    for seed in 0..3 {
        echo(ctx, MIB, seed)?;
    }
    receive(&mut slow, 4 * MIB, 9)?;
    // What it has not read is still there for it, though the host is gone.
    drop(held);
    wait_streams(&vm, 1)?;
    quit(ctx, vm)
}

/// The guest sends more than the socket holds, and is gone; the reader is late.
fn farewell(ctx: &Ctx) -> Verdict {
    let vm = serving(ctx)?;
    let mut stream = ask(ctx, "farewell 300000 5")?;
    thread::sleep(Duration::from_secs(2));
    receive(&mut stream, 300_000, 5)?;
    vm.finish(SOON)?.expect_code(0)
}

fn refused(ctx: &Ctx) -> Verdict {
    let orders = format!("vsock-refused=81,vsock-serve={SERVICE},poweroff");
    let vm = launch(ctx, &orders).spawn()?;
    vm.wait_for("VSOCK ready", SOON)?;
    let mut nobody = UnixStream::connect(socket(ctx))?;
    nobody.set_read_timeout(Some(SOON))?;
    nobody.write_all(b"CONNECT 4999\n")?;
    let answer = line(&mut nobody)?;
    ensure!(answer.is_empty(), "nobody answers {answer:?}");
    let said = vm.console();
    ensure!(
        said.contains("FACT vsock.refused=ConnectionReset"),
        "the guest's connection was not refused"
    );
    quit(ctx, vm)
}

fn client_dies(ctx: &Ctx) -> Verdict {
    let vm = serving(ctx)?;
    for seed in 0..4 {
        let mut source = ask(ctx, "source 1073741824 1")?;
        source.read_exact(&mut [0; 1000])?;
        let mut sink = ask(ctx, "sink 0 0")?;
        send(&mut sink, 200_000, 0)?;
        // Closed with bytes unread and unsent.
        drop((source, sink));
        echo(ctx, 10_000, seed)?;
    }
    wait_streams(&vm, 0)?;
    quit(ctx, vm)
}

fn pause(ctx: &Ctx) -> Verdict {
    let vm = serving(ctx)?;
    thread::scope(|scope| {
        let transfers = [
            scope.spawn(|| sink(ctx, 8 * MIB, 1, 0)),
            scope.spawn(|| source(ctx, 8 * MIB, 2)),
        ];
        for _ in 0..3 {
            thread::sleep(Duration::from_millis(150));
            vm.ctl_ok(&["pause"])?;
            thread::sleep(Duration::from_millis(150));
            vm.ctl_ok(&["resume"])?;
        }
        transfers.into_iter().try_for_each(|transfer| {
            let joined = transfer.join();
            joined.map_err(|_| Outcome::Failed("a transfer panicked".into()))?
        })
    })?;
    quit(ctx, vm)
}

fn reboot(ctx: &Ctx) -> Verdict {
    let vm = launch(ctx, &format!("vsock-serve={SERVICE},reboot=acpi"))
        .args(["--on-reset", "reboot"])
        .spawn()?;
    vm.wait_for("VSOCK ready", SOON)?;
    let mut held = ask(ctx, "hold")?;
    let mut quit = ask(ctx, "quit")?;
    ensure!(line(&mut quit)?.is_empty(), "after quit");
    let mut rest = Vec::new();
    held.read_to_end(&mut rest)?;
    ensure!(rest.is_empty(), "the held stream says {rest:?}");
    vm.wait_for_times("VSOCK ready", 2, SOON)?;
    echo(ctx, MIB, 3)?;
    vm.ctl_ok(&["stop"])?;
    vm.finish(SOON)?.expect_code(0)?;
    ensure!(!socket(ctx).exists(), "the socket's path is still there");
    Ok(())
}

fn handed_over(ctx: &Ctx) -> Verdict {
    let listener = UnixListener::bind(socket(ctx))?;
    let file = std::fs::File::from(OwnedFd::from(listener));
    let mut launch = ctx.guest(&format!(
        "vsock-refused=81,vsock-serve={SERVICE},vsock-dial=80:1:8,poweroff"
    ));
    let fd = launch.pass(&file)?;
    let number = fd.trim_start_matches("fd:").to_owned();
    let vm = launch
        .args(["--vsock", &format!("cid=77,fd={number}")])
        .spawn()?;
    drop(file);
    vm.wait_for("VSOCK ready", SOON)?;
    // The guest's connections go to the path at which the socket is bound.
    let far = UnixListener::bind(ctx.path("v_80"))?;
    echo(ctx, 100_000, 1)?;
    drop(ask(ctx, "quit")?);
    let (stream, _) = far.accept()?;
    let (mut from, mut to) = (stream.try_clone()?, stream);
    std::io::copy(&mut from, &mut to)?;
    drop((from, to));
    let done = vm.finish(SOON)?;
    done.expect_code(0)?;
    done.expect_line("FACT vsock.echoed=1")
}

fn bad_input(ctx: &Ctx) -> Verdict {
    let live = ctx.path("live");
    let _listener = UnixListener::bind(&live)?;
    for (vsock, says) in [
        (
            "cid=2,socket=/run/v".to_owned(),
            "cid 2 cannot be a guest's",
        ),
        ("cid=3".to_owned(), "socket=PATH"),
        (
            format!("cid=3,socket={}", live.display()),
            "cannot listen at",
        ),
        ("cid=3,socket=/nonexistent/v".to_owned(), "cannot listen at"),
        ("cid=3,fd=999".to_owned(), "fd:999"),
    ] {
        let done = ctx.guest("poweroff").args(["--vsock", &vsock]).run()?;
        done.expect_one_line_error(&[says])?;
    }
    ensure!(live.exists(), "the path of a live socket is gone");
    Ok(())
}
