//! The control socket and its command-line client.

use std::time::Duration;

use serde_json::Value;

use crate::batch::Test;
use crate::context::{Ctx, Kernel};
use crate::outcome::Verdict;
use crate::running::Running;
use crate::tests::SOON;
use crate::{Outcome, ensure};

pub(crate) const TESTS: &[Test] = &[
    Test::new("control::info_describes_the_vm", info),
    Test::new(
        "control::pause_stops_the_guest_and_resume_lets_it_go_on",
        pause,
    ),
    Test::new("control::the_power_button_reaches_the_guest", |c| {
        button(c, Kernel::OwnBzimage)
    }),
    Test::new("control::the_power_button_reaches_a_stock_guest", |c| {
        button(c, Kernel::StockBzimage)
    }),
    Test::new("control::shutdown_asks_the_guest", shutdown),
    Test::new("control::shutdown_does_not_wait_for_ever", shutdown_timeout),
    Test::new("control::stop_ends_a_paused_vm", stop_paused),
    Test::new("control::counters_count", counters),
    Test::new("control::events_are_streamed", events),
    Test::new("control::many_clients_at_once", clients),
    Test::new("control::nobody_there_is_one_clear_line", nobody),
];

fn sleeping<'a>(ctx: &'a Ctx, args: &[&str]) -> Verdict<Running<'a>> {
    let vm = ctx.guest("sleep-forever").args(args).control().spawn()?;
    vm.wait_for("SLEEPING", SOON)?;
    Ok(vm)
}

fn info_of(vm: &Running<'_>) -> Verdict<Value> {
    Ok(serde_json::from_str(&vm.ctl_ok(&["info"])?)?)
}

fn info(ctx: &Ctx) -> Verdict {
    let vm = sleeping(ctx, &["--cpus", "2", "--memory", "128M"])?;
    let info = info_of(&vm)?;
    let number = |key: &str| info.get(key).and_then(Value::as_u64);
    ensure!(number("pid") == Some(u64::from(vm.pid())), "pid in {info}");
    ensure!(
        number("memory_bytes") == Some(128 << 20),
        "memory in {info}"
    );
    ensure!(number("resets") == Some(0), "resets in {info}");
    ensure!(number("start_us") > Some(0), "start time in {info}");
    let cpus = info
        .get("cpus")
        .and_then(Value::as_array)
        .map_or(0, Vec::len);
    ensure!(cpus == 2, "{cpus} CPUs in {info}");
    ensure!(phase(&info) == "running", "phase in {info}");
    vm.ctl_ok(&["stop"])?;
    vm.finish(SOON)?.expect_code(0)
}

fn phase(info: &Value) -> &str {
    info.get("phase")
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// A guest that floods its console shows whether it runs.
fn pause(ctx: &Ctx) -> Verdict {
    let vm = ctx
        .guest("serial-flood=100000,poweroff")
        .args(["--cpus", "2"])
        .control()
        .spawn()?;
    vm.wait_for("FLOOD 00000010", SOON)?;
    for round in 0..2 {
        vm.ctl_ok(&["pause"])?;
        // A second time is no error.
        vm.ctl_ok(&["pause"])?;
        ensure!(
            phase(&info_of(&vm)?) == "paused",
            "info does not say that it is paused"
        );
        std::thread::sleep(Duration::from_millis(300));
        let before = vm.console_length();
        std::thread::sleep(Duration::from_millis(700));
        let after = vm.console_length();
        ensure!(
            before == after,
            "round {round}: the guest wrote {} bytes while paused",
            after - before
        );
        vm.ctl_ok(&["resume"])?;
        vm.ctl_ok(&["resume"])?;
        ensure!(
            phase(&info_of(&vm)?) == "running",
            "info does not say that it runs"
        );
        let deadline = std::time::Instant::now() + SOON;
        while vm.console_length() <= after + 1024 {
            ensure!(
                std::time::Instant::now() < deadline,
                "round {round}: the guest does not go on"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    vm.ctl_ok(&["stop"])?;
    vm.finish(SOON)?.expect_code(0)
}

fn button(ctx: &Ctx, kernel: Kernel) -> Verdict {
    let vm = ctx.guest("wait-button").kernel(kernel).control().spawn()?;
    vm.wait_for("BUTTON ready", SOON)?;
    vm.ctl_ok(&["power-button"])?;
    let done = vm.finish(SOON)?;
    done.expect_code(0)?;
    done.facts()?.get("button.by")?;
    Ok(())
}

fn shutdown(ctx: &Ctx) -> Verdict {
    let vm = ctx.guest("wait-button").control().spawn()?;
    vm.wait_for("BUTTON ready", SOON)?;
    vm.ctl_ok(&["shutdown"])?;
    let done = vm.finish(SOON)?;
    done.expect_code(0)?;
    ensure!(
        done.stdout.contains("FACT button.by="),
        "the guest was not asked"
    );
    Ok(())
}

fn shutdown_timeout(ctx: &Ctx) -> Verdict {
    let vm = sleeping(ctx, &[])?;
    vm.ctl_ok(&["shutdown", "--timeout", "1"])?;
    vm.finish(Duration::from_secs(10))?.expect_code(0)
}

fn stop_paused(ctx: &Ctx) -> Verdict {
    let vm = sleeping(ctx, &["--cpus", "2"])?;
    vm.ctl_ok(&["pause"])?;
    vm.ctl_ok(&["stop"])?;
    vm.finish(SOON)?.expect_code(0)?;
    ensure!(
        !ctx.path("control").exists(),
        "the control socket is still there"
    );
    Ok(())
}

fn counters(ctx: &Ctx) -> Verdict {
    let vm = ctx.guest("rng=4096,sleep-forever").control().spawn()?;
    vm.wait_for("SLEEPING", SOON)?;
    let text = vm.ctl_ok(&["counters"])?;
    let counters: std::collections::BTreeMap<String, std::collections::BTreeMap<String, u64>> =
        serde_json::from_str(&text)?;
    let total: u64 = counters
        .values()
        .flat_map(std::collections::BTreeMap::values)
        .sum();
    ensure!(total > 0, "nothing was counted: {text}");
    let rng = counters.iter().find(|(device, _)| device.contains("rng"));
    let Some((device, rng)) = rng else {
        return Err(Outcome::Failed(format!("no random device in {text}")));
    };
    ensure!(
        rng.values().any(|n| *n > 0),
        "{device} has counted nothing: {text}"
    );
    Ok(())
}

fn events(ctx: &Ctx) -> Verdict {
    let mut vm = ctx.guest("echo,port80=0x42,poweroff").control().spawn()?;
    vm.wait_for("ECHO ready", SOON)?;
    let events = vm.ctl_start(&["events"])?;
    events.wait_for("\"running\"", SOON)?;
    vm.ctl_ok(&["pause"])?;
    vm.ctl_ok(&["resume"])?;
    vm.send(b"quit\n")?;
    let heard = events.finish(SOON)?;
    heard.expect_code(0)?;
    let mut what = Vec::new();
    for line in heard.stdout.lines() {
        let event: Value = serde_json::from_str(line)?;
        ensure!(
            event.get("at_us").and_then(Value::as_u64) > Some(0),
            "no time in {line}"
        );
        let name = event
            .get("what")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned();
        what.push((name, event.get("value").and_then(Value::as_u64)));
    }
    let place = |name: &str, value: Option<u64>| -> Verdict<usize> {
        what.iter()
            .position(|e| e.0 == name && e.1 == value)
            .ok_or_else(|| Outcome::Failed(format!("no event {name} {value:?} in {what:?}")))
    };
    let order = [
        place("running", None)?,
        place("paused", None)?,
        place("resumed", None)?,
        place("debug-port", Some(0x42))?,
        place("power-off", None)?,
    ];
    ensure!(
        order.is_sorted(),
        "the events came in another order: {what:?}"
    );
    vm.finish(SOON)?.expect_code(0)
}

fn clients(ctx: &Ctx) -> Verdict {
    let vm = sleeping(ctx, &[])?;
    let started: Verdict<Vec<_>> = (0..8).map(|_| vm.ctl_start(&["info"])).collect();
    for client in started? {
        client.finish(SOON)?.expect_code(0)?;
    }
    vm.ctl_ok(&["stop"])?;
    vm.finish(SOON)?.expect_code(0)
}

fn nobody(ctx: &Ctx) -> Verdict {
    let gone = ctx.path("gone");
    let done = ctx.vmm().arg("ctl").arg(&gone).arg("info").run()?;
    done.expect_one_line_error(&[&gone.to_string_lossy()])
}
