//! `/init` of the guests that VM tests and boot measurements start. It owns the guest's user space:
//! one process, no files but those the kernel offers.
//!
//! In order: the boot mark to port 0x80; `/proc`, `/sys`, `/dev`, debugfs; the [orders](orders) of
//! the command line, one after the other; power-off. With nothing but `poweroff` ordered it prints
//! nothing. A verb that did its work is followed by `END verb`, one that could not by
//! `FAILED verb: why`: a test waits for the one and sees the other.

mod acpi_event;
mod agent;
mod button;
mod checks;
mod console;
mod dax;
mod end;
mod facts;
mod kmsg;
mod modules;
mod netlink;
mod orders;
mod pattern;
mod port;
mod ports;
mod userland;
mod vsock;
mod watchdog;

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use rustix::mount::{MountFlags, mount};
use rustix::time::{ClockId, clock_gettime};

use console::Console;
use orders::Order;

fn main() -> ExitCode {
    let marked = port::write_debug_port(port::BOOT_MARK);
    for (kind, at) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("debugfs", "/sys/kernel/debug"),
    ] {
        // A kernel may lack one of them, and may have mounted /dev itself.
        let _ = mount(kind, at, kind, MountFlags::empty(), None::<&std::ffi::CStr>);
    }
    let Ok(mut console) = Console::open() else {
        return ExitCode::FAILURE;
    };
    if let Err(error) = marked {
        console.line(format_args!("FAILED boot mark: {error}"));
    }
    let command_line = facts::read("/proc/cmdline").unwrap_or_default();
    let mut timed = false;
    for (word, order) in orders::orders(&command_line) {
        timed |= order == Order::Time;
        if timed {
            console.line(format_args!("TIME {word} {}", monotonic_ns()));
        }
        if order == Order::Exit {
            console.drain();
            return ExitCode::FAILURE;
        }
        match carry_out(&mut console, &order) {
            Ok(()) => console.line(format_args!("END {word}")),
            Err(error) => console.line(format_args!("FAILED {word}: {error}")),
        }
    }
    let _ = end::power_off(&mut console);
    ExitCode::FAILURE
}

fn carry_out(console: &mut Console, order: &Order) -> io::Result<()> {
    match order {
        Order::Facts => facts::print(console),
        Order::Dmesg(level) => {
            let records = kmsg::print(console, *level)?;
            console.fact("dmesg.records", records);
        }
        Order::Modules => {
            let loaded = modules::load()?;
            console.fact("modules.loaded", loaded);
        }
        Order::Msr => checks::msrs(console)?,
        Order::PerCpu => checks::per_cpu(console)?,
        Order::Touch(mib) => checks::touch(console, *mib)?,
        Order::Rng(count) => checks::rng(console, *count)?,
        Order::Entropy => checks::entropy(console),
        Order::SerialFlood(kib) => checks::flood(console, *kib)?,
        Order::Agent => agent::serve(console)?,
        Order::MountDax(what) => dax::mount_dax(console, what)?,
        Order::ReadFile(name) => dax::read_file(console, name)?,
        Order::WriteFile(name, kib) => dax::write_file(name, *kib)?,
        Order::Poke(device) => dax::poke(console, device)?,
        Order::Echo => {
            let lines = console.echo()?;
            console.fact("echo.lines", lines);
        }
        Order::Script => userland::run_script(console)?,
        Order::Time => {}
        Order::Say(text) => console.line(text),
        Order::Sleep(ms) => std::thread::sleep(Duration::from_millis(*ms)),
        Order::SleepForever => {
            console.line("SLEEPING");
            end::sleep_forever(console)
        }
        Order::Hang => {
            console.line("HANGING");
            end::hang(console)
        }
        Order::VsockServe(port) => vsock::serve(console, *port)?,
        Order::VsockDial(port, streams, kib) => vsock::dial(console, *port, *streams, *kib)?,
        Order::VsockRefused(port) => vsock::refused(console, *port),
        Order::Watchdog(seconds, times, close) => {
            watchdog::feed(console, *seconds, *times, *close)?;
        }
        Order::PortEcho(name) => ports::echo(console, name)?,
        Order::PortFlood(name, bytes) => ports::flood(name, *bytes)?,
        Order::PortSink(name, bytes) => ports::sink(console, name, *bytes)?,
        Order::ConsoleSize => ports::size(console)?,
        Order::Port80(value) => port::write_debug_port(*value)?,
        Order::WaitButton => {
            let heard = button::wait(console)?;
            console.fact(
                "button.by",
                format_args!("{heard:?}").to_string().to_lowercase(),
            );
            end::power_off(console)?;
        }
        Order::PowerOff => end::power_off(console)?,
        Order::Reboot(how) => end::reset(console, *how)?,
        Order::Panic => {
            console.drain();
            checks::panic_kernel()?;
        }
        // The caller ends the process, from where nothing is left open.
        Order::Exit => {}
        Order::Unknown(word) => {
            return Err(io::Error::other(format!(
                "{word} is no order this init knows"
            )));
        }
    }
    Ok(())
}

fn monotonic_ns() -> i128 {
    let now = clock_gettime(ClockId::Monotonic);
    i128::from(now.tv_sec)
        .saturating_mul(1_000_000_000)
        .saturating_add(i128::from(now.tv_nsec))
}
