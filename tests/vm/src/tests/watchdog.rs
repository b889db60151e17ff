//! A hung guest is noticed, and done with as was asked.

use std::time::Duration;

use crate::batch::Test;
use crate::context::Ctx;
use crate::ensure;
use crate::outcome::Verdict;
use crate::running::Running;
use crate::tests::SOON;

pub(crate) const TESTS: &[Test] = &[
    Test::new("watchdog::a_hung_guest_ends_the_vm", exit),
    Test::new("watchdog::a_guest_that_feeds_it_lives", fed),
    Test::new("watchdog::reset_is_the_guests_own_reset", reset),
    Test::new("watchdog::a_reboot_tells_the_guest_why", reboot),
    Test::new("watchdog::pause_leaves_the_guest_to_be_looked_at", pause),
    Test::new("watchdog::notify_only_tells", notify),
];

fn launch<'a>(ctx: &'a Ctx, action: &str, orders: &str) -> Verdict<Running<'a>> {
    let watchdog = format!("on,action={action}");
    ctx.guest(orders)
        .args(["--watchdog", &watchdog])
        .control()
        .spawn()
}

fn exit(ctx: &Ctx) -> Verdict {
    let vm = launch(ctx, "exit", "watchdog=2:4,hang")?;
    vm.wait_for("FACT watchdog.timeout", SOON)?;
    let events = vm.ctl_start(&["events"])?;
    let done = vm.finish(SOON)?;
    done.expect_code(5)?;
    done.expect_line("WATCHDOG fed")?;
    let facts = done.facts()?;
    ensure!(
        facts.get("watchdog.bootstatus")? == "0",
        "the guest thinks it was reset"
    );
    let told = events.finish(SOON)?.stdout;
    ensure!(
        told.contains("\"watchdog\"") && told.contains("\"ended\""),
        "the events are {told}"
    );
    Ok(())
}

fn fed(ctx: &Ctx) -> Verdict {
    let orders = "watchdog=3:12,watchdog-stop=3:1,sleep=5000,say=alive,poweroff";
    let done = launch(ctx, "exit", orders)?.finish(SOON)?;
    done.expect_code(0)?;
    done.expect_line("alive")
}

fn reset(ctx: &Ctx) -> Verdict {
    // The default action; the watchdog's own end is a matter of closing the device without a word.
    let done = ctx
        .guest("watchdog=1:2,sleep-forever")
        .args(["--watchdog", "on"])
        .run()?;
    done.expect_code(3)
}

fn reboot(ctx: &Ctx) -> Verdict {
    let vm = ctx
        .guest("watchdog=2:2,hang")
        .args(["--watchdog", "on", "--on-reset", "reboot"])
        .control()
        .spawn()?;
    vm.wait_for("FACT watchdog.bootstatus=0", SOON)?;
    // WDIOF_CARDRESET.
    vm.wait_for("FACT watchdog.bootstatus=32", SOON)?;
    vm.ctl_ok(&["stop"])?;
    vm.finish(SOON)?.expect_code(0)
}

fn pause(ctx: &Ctx) -> Verdict {
    let vm = launch(ctx, "pause", "watchdog=1:2,sleep=8000,say=alive,poweroff")?;
    vm.wait_for("WATCHDOG fed", SOON)?;
    let deadline = std::time::Instant::now() + SOON;
    while !vm.ctl_ok(&["info"])?.contains("\"paused\"") {
        ensure!(std::time::Instant::now() < deadline, "the VM is not paused");
        std::thread::sleep(Duration::from_millis(50));
    }
    vm.ctl_ok(&["resume"])?;
    let done = vm.finish(SOON)?;
    done.expect_code(0)?;
    done.expect_line("alive")
}

fn notify(ctx: &Ctx) -> Verdict {
    let vm = launch(ctx, "notify", "watchdog=1:2,sleep=6000,say=alive,poweroff")?;
    vm.wait_for("FACT watchdog.timeout", SOON)?;
    let events = vm.ctl_start(&["events"])?;
    let done = vm.finish(SOON)?;
    done.expect_code(0)?;
    done.expect_line("alive")?;
    let told = events.finish(SOON)?.stdout;
    let times = told.matches("\"watchdog\"").count();
    ensure!(times == 1, "told {times} times: {told}");
    Ok(())
}
