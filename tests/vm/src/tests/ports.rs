//! The virtio console and ports with names.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::batch::Test;
use crate::context::Ctx;
use crate::ensure;
use crate::launch::Launch;
use crate::outcome::Verdict;
use crate::pattern::Pattern;
use crate::tests::SOON;
use crate::tests::console::{FLOOD_KIB, hear, is_whole};

pub(crate) const TESTS: &[Test] = &[
    Test::new("ports::hvc0_floods_without_loss", |c| {
        flood(c, Duration::ZERO)
    }),
    Test::new("ports::hvc0_waits_for_a_slow_reader", |c| {
        flood(c, Duration::from_secs(4))
    }),
    Test::new("ports::hvc0_takes_input_and_a_new_size", input),
    Test::new("ports::hvc0_on_a_terminal_of_its_own", pty),
    Test::new("ports::hvc0_goes_on_after_a_reboot", reboot),
    Test::new("ports::two_ports_and_a_client_that_comes_again", two),
    Test::new("ports::a_port_floods_both_ways", bulk),
    Test::new("ports::what_cannot_be_is_one_clear_line", bad_input),
];

fn hvc<'a>(ctx: &'a Ctx, to: &str, orders: &str) -> Launch<'a> {
    ctx.guest(orders)
        .console("hvc0")
        .args(["--console", "off", "--virtio-console", to])
}

fn flood(ctx: &Ctx, delay: Duration) -> Verdict {
    let orders = format!("serial-flood={FLOOD_KIB},poweroff");
    let done = hvc(ctx, "stdio", &orders).read_after(delay).run()?;
    done.expect_code(0)?;
    is_whole(&done.stdout)
}

fn input(ctx: &Ctx) -> Verdict {
    let lines: Vec<String> = (0..200).map(|n| format!("line {n} of many")).collect();
    let mut vm = hvc(ctx, "stdio", "console-size,echo,console-size,poweroff")
        .control()
        .spawn()?;
    vm.wait_for("ECHO ready", SOON)?;
    vm.ctl_ok(&["resize-console", "132", "50"])?;
    vm.send((lines.join("\n") + "\nquit\n").as_bytes())?;
    let done = vm.finish(SOON)?;
    done.expect_code(0)?;
    let back: Vec<&str> = done
        .stdout
        .lines()
        .filter_map(|l| l.strip_prefix("ECHO "))
        .filter(|l| l.starts_with("line "))
        .collect();
    ensure!(back.len() == lines.len(), "{} lines came back", back.len());
    for (line, back) in lines.iter().zip(back) {
        ensure!(line == back, "{line:?} came back as {back:?}");
    }
    done.expect_line("FACT console.size=0x0")?;
    done.expect_line("FACT console.size=132x50")
}

fn wait_path(path: &Path) -> Verdict {
    let deadline = Instant::now() + SOON;
    while !path.exists() {
        ensure!(Instant::now() < deadline, "{} is not there", path.display());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn pty(ctx: &Ctx) -> Verdict {
    let path = ctx.path("tty");
    let to = format!("pty:{}", path.display());
    let vm = hvc(ctx, &to, "echo,poweroff").spawn()?;
    wait_path(&path)?;
    let mut terminal = File::options().read(true).write(true).open(&path)?;
    hear(&mut terminal, "ECHO ready")?;
    terminal.write_all(b"over the terminal\nquit\n")?;
    hear(&mut terminal, "ECHO over the terminal")?;
    vm.finish(SOON)?.expect_code(0)?;
    ensure!(!path.is_symlink(), "the path is still there");
    Ok(())
}

fn reboot(ctx: &Ctx) -> Verdict {
    let mut vm = hvc(ctx, "stdio", "echo,reboot=acpi")
        .args(["--on-reset", "reboot"])
        .control()
        .spawn()?;
    vm.wait_for("ECHO ready", SOON)?;
    vm.send(b"first\nquit\n")?;
    vm.wait_for_times("ECHO ready", 2, SOON)?;
    vm.send(b"second\n")?;
    vm.wait_for("ECHO second", SOON)?;
    vm.ctl_ok(&["stop"])?;
    let done = vm.finish(SOON)?;
    done.expect_code(0)?;
    done.expect_line("ECHO first")
}

fn with_ports<'a>(ctx: &'a Ctx, orders: &str) -> Launch<'a> {
    let port = |name: &str| format!("name={name},to=unix:{}", ctx.path(name).display());
    ctx.guest(orders)
        .args(["--port", &port("org.one"), "--port", &port("two")])
        .control()
}

fn connect(path: &Path) -> Verdict<UnixStream> {
    wait_path(path)?;
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(SOON))?;
    stream.set_write_timeout(Some(SOON))?;
    Ok(stream)
}

fn two(ctx: &Ctx) -> Verdict {
    let orders = "port-echo=org.one,port-echo=two,poweroff";
    let vm = with_ports(ctx, orders).spawn()?;
    vm.wait_for("PORT org.one ready", SOON)?;
    for round in 0..3 {
        let mut client = connect(&ctx.path("org.one"))?;
        let words = format!("round {round}");
        client.write_all(format!("{words}\n").as_bytes())?;
        hear(&mut client, &words)?;
        drop(client);
        // Nobody is told of the end but by reading.
        std::thread::sleep(Duration::from_millis(200));
    }
    vm.ctl_ok(&["pause"])?;
    let mut client = connect(&ctx.path("org.one"))?;
    client.write_all(b"while paused\n")?;
    vm.ctl_ok(&["resume"])?;
    hear(&mut client, "while paused")?;
    client.write_all(b"quit\n")?;
    vm.wait_for("PORT two ready", SOON)?;
    let mut client = connect(&ctx.path("two"))?;
    client.write_all(b"the other\nquit\n")?;
    hear(&mut client, "the other")?;
    vm.finish(SOON)?.expect_code(0)
}

fn bulk(ctx: &Ctx) -> Verdict {
    const BYTES: u64 = 4 << 20;
    let orders = format!("port-flood=org.one:{BYTES},port-sink=two:{BYTES},poweroff");
    let vm = with_ports(ctx, &orders).spawn()?;
    // Nobody reads yet, and the guest waits.
    std::thread::sleep(Duration::from_secs(4));
    let mut client = connect(&ctx.path("org.one"))?;
    let mut pattern = Pattern::new(1);
    let mut chunk = vec![0; 65536];
    while pattern.position() < BYTES {
        let got = client.read(&mut chunk)?;
        let at = pattern.position();
        ensure!(got > 0, "the end comes after {at} bytes");
        ensure!(pattern.next(got) == chunk[..got], "broken from {at} on");
    }
    vm.wait_for("PORT two ready", SOON)?;
    let mut client = connect(&ctx.path("two"))?;
    let mut pattern = Pattern::new(2);
    while pattern.position() < BYTES {
        client.write_all(&pattern.next(65536))?;
    }
    let done = vm.finish(SOON)?;
    done.expect_code(0)?;
    done.expect_line("FACT port.two.whole=true")
}

fn bad_input(ctx: &Ctx) -> Verdict {
    for (args, says) in [
        (&["--virtio-console", "stdio"][..], "one console's only"),
        (&["--virtio-console", "tty"], "`tty` is not a console"),
        (&["--port", "name=a"], "write name=NAME,to=WHERE"),
        (
            &["--port", "name=a,to=unix:/nonexistent/a"],
            "cannot listen for console clients at /nonexistent/a",
        ),
        (
            &["--virtio-console", "pty:/nonexistent/a"],
            "cannot make a terminal at /nonexistent/a",
        ),
    ] {
        let done = ctx.guest("poweroff").args(args).run()?;
        done.expect_one_line_error(&[says])?;
    }
    Ok(())
}
