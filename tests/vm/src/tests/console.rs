//! The serial console: complete in both directions, wherever it goes, and the terminal left as it was.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::termios::{LocalModes, tcgetattr};

use crate::batch::Test;
use crate::context::Ctx;
use crate::outcome::Verdict;
use crate::tests::SOON;
use crate::{Outcome, ensure};

/// Lines of a KiB of the init's flood, and the letters its lines are made of.
const LINES_PER_KIB: usize = 16;
const ALPHABET: &str = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-";
/// Letters in a line of 64 bytes on the wire: `FLOOD NNNNNNNN `, the letters, CR and LF.
const LETTERS: usize = 47;
pub(crate) const FLOOD_KIB: usize = 96;

pub(crate) const TESTS: &[Test] = &[
    Test::new("console::flood_is_lossless", |c| flood(c, Duration::ZERO)),
    Test::new("console::flood_waits_for_a_slow_reader", |c| {
        flood(c, Duration::from_secs(5))
    }),
    Test::new("console::a_pipe_reaches_the_guest", pipe),
    Test::new("console::a_burst_of_input_is_lossless", burst),
    Test::new("console::end_of_input_does_not_end_the_vm", end_of_input),
    Test::new("console::to_a_file", file),
    Test::new("console::to_a_unix_socket", unix),
    Test::new("console::off_is_silent", off),
    Test::new("console::the_terminal_is_raw_and_then_restored", terminal),
];

fn flood(ctx: &Ctx, delay: Duration) -> Verdict {
    let orders = format!("serial-flood={FLOOD_KIB},poweroff");
    let done = ctx.guest(&orders).read_after(delay).run()?;
    done.expect_code(0)?;
    is_whole(&done.stdout)
}

/// Every line of the flood is there, once, in order, as the init made it.
pub(crate) fn is_whole(console: &str) -> Verdict {
    let mut next = 0;
    for line in console.lines().filter(|l| l.contains("FLOOD")) {
        // The kernel may speak in between, but never inside a line of ours.
        ensure!(
            line == flood_line(next),
            "line {next} of the flood is {line:?}"
        );
        next += 1;
    }
    let all = FLOOD_KIB * LINES_PER_KIB;
    ensure!(next == all, "{next} of {all} lines of the flood have come");
    Ok(())
}

fn flood_line(n: usize) -> String {
    let letters: String = ALPHABET
        .chars()
        .cycle()
        .skip(n % 64)
        .take(LETTERS)
        .collect();
    format!("FLOOD {n:08x} {letters}")
}

fn pipe(ctx: &Ctx) -> Verdict {
    let mut vm = ctx.guest("echo,poweroff").spawn()?;
    vm.wait_for("ECHO ready", SOON)?;
    vm.send(b"hello\n")?;
    vm.wait_for("ECHO hello", SOON)?;
    vm.send("with ümlaut and tab\tin it\nquit\n".as_bytes())?;
    let done = vm.finish(SOON)?;
    done.expect_code(0)?;
    done.expect_line("ECHO with ümlaut and tab\tin it")?;
    done.expect_line("FACT echo.lines=2")
}

/// More at once than the UART, its FIFO and the terminal's line buffer hold.
fn burst(ctx: &Ctx) -> Verdict {
    let lines: Vec<String> = (0..100).map(|n| format!("{n:04} {ALPHABET}")).collect();
    let mut vm = ctx.guest("echo,poweroff").spawn()?;
    vm.wait_for("ECHO ready", SOON)?;
    vm.send((lines.join("\n") + "\nquit\n").as_bytes())?;
    let done = vm.finish(SOON)?;
    done.expect_code(0)?;
    let back: Vec<&str> = done
        .stdout
        .lines()
        .filter_map(|l| l.strip_prefix("ECHO 0"))
        .collect();
    for (n, line) in lines.iter().enumerate() {
        let got = back.get(n).map(|l| format!("0{l}"));
        ensure!(got.as_ref() == Some(line), "line {n} came back as {got:?}");
    }
    Ok(())
}

fn end_of_input(ctx: &Ctx) -> Verdict {
    let mut vm = ctx.guest("sleep=1000,say=still-here,poweroff").spawn()?;
    vm.close_stdin();
    let done = vm.finish(SOON)?;
    done.expect_code(0)?;
    done.expect_line("still-here")
}

fn file(ctx: &Ctx) -> Verdict {
    let path = ctx.path("console.log");
    let done = ctx
        .guest(&format!("serial-flood={FLOOD_KIB},poweroff"))
        .arg("--console")
        .arg(format!("file:{}", path.display()))
        .run()?;
    done.expect_code(0)?;
    ensure!(done.stdout.is_empty(), "stdout has {:?}", done.stdout);
    is_whole(&std::fs::read_to_string(&path)?.replace('\r', ""))
}

fn unix(ctx: &Ctx) -> Verdict {
    let path = ctx.path("console.sock");
    let vm = ctx
        .guest("echo,poweroff")
        .arg("--console")
        .arg(format!("unix:{}", path.display()))
        .spawn()?;
    let deadline = Instant::now() + SOON;
    let mut stream = loop {
        match UnixStream::connect(&path) {
            Ok(stream) => break stream,
            Err(e) if Instant::now() >= deadline => {
                return Err(Outcome::Failed(format!(
                    "nobody at the console's socket: {e}"
                )));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    stream.set_read_timeout(Some(SOON))?;
    // Connected long before the guest has booted, so all it says comes here.
    hear(&mut stream, "ECHO ready")?;
    stream.write_all(b"over the socket\nquit\n")?;
    hear(&mut stream, "ECHO over the socket")?;
    vm.finish(SOON)?.expect_code(0)
}

pub(crate) fn hear(stream: &mut impl Read, words: &str) -> Verdict {
    let mut heard = Vec::new();
    let mut chunk = [0; 1024];
    while !String::from_utf8_lossy(&heard).contains(words) {
        let so_far = String::from_utf8_lossy(&heard);
        let length = stream
            .read(&mut chunk)
            .map_err(|e| Outcome::Failed(format!("no `{words}` after {so_far:?}: {e}")))?;
        ensure!(length > 0, "the socket closed after {so_far:?}");
        heard.extend(&chunk[..length]);
    }
    Ok(())
}

fn off(ctx: &Ctx) -> Verdict {
    let done = ctx
        .guest("say=unheard,poweroff")
        .args(["--console", "off"])
        .run()?;
    done.expect_code(0)?;
    ensure!(done.stdout.is_empty(), "stdout has {:?}", done.stdout);
    Ok(())
}

fn terminal(ctx: &Ctx) -> Verdict {
    for ending in ["power-off", "stop", "signal"] {
        restored_after(ctx, ending).map_err(|e| match e {
            Outcome::Failed(why) => Outcome::Failed(format!("{ending}: {why}")),
            skipped @ Outcome::Skipped(_) => skipped,
        })?;
    }
    Ok(())
}

fn restored_after(ctx: &Ctx, ending: &str) -> Verdict {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?.into_string()?;
    let slave = File::options().read(true).write(true).open(&name)?;
    let before = tcgetattr(&slave)?;
    ensure!(
        before.local_modes.contains(LocalModes::ICANON),
        "a new terminal is raw"
    );

    let mut keyboard = File::from(master);
    let screen = crate::capture::Capture::start(keyboard.try_clone()?, Duration::ZERO);
    ctx.keep_output("terminal", &screen);
    let vm = ctx
        .guest("echo,poweroff")
        .on_terminal(slave.try_clone()?)
        .control_at(&ctx.path(ending))
        .spawn()?;
    ensure!(
        screen.wait_for("ECHO ready", 1, SOON),
        "the guest did not get ready"
    );
    let during = tcgetattr(&slave)?.local_modes;
    ensure!(
        !during.intersects(LocalModes::ICANON | LocalModes::ECHO),
        "the terminal is not raw: {during:?}"
    );
    keyboard.write_all(b"typed\n")?;
    ensure!(
        screen.wait_for("ECHO typed", 1, SOON),
        "what was typed did not come back"
    );
    match ending {
        "power-off" => keyboard.write_all(b"quit\n")?,
        "stop" => drop(vm.ctl_ok(&["stop"])?),
        _ => vm.signal(rustix::process::Signal::TERM)?,
    }
    vm.finish(SOON)?.expect_code(0)?;
    let after = tcgetattr(&slave)?;
    let same = after.local_modes == before.local_modes
        && after.input_modes == before.input_modes
        && after.output_modes == before.output_modes
        && after.control_modes == before.control_modes;
    ensure!(same, "the terminal was {before:?} and is {after:?}");
    Ok(())
}

#[cfg(test)]
mod check {
    use super::*;

    #[test]
    fn a_lost_or_doubled_line_is_seen() {
        let lines: Vec<String> = (0..FLOOD_KIB * LINES_PER_KIB).map(flood_line).collect();
        assert_eq!(lines[0].len() + 2, 64);
        assert!(is_whole(&lines.join("\n")).is_ok());
        let mut lost = lines.clone();
        lost.remove(7);
        assert!(is_whole(&lost.join("\n")).is_err());
        let mut cut = lines.clone();
        cut[9].pop();
        assert!(is_whole(&cut.join("\n")).is_err());
        assert!(is_whole(&lines[..5].join("\n")).is_err());
    }
}
