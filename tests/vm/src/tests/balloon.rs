//! Memory that guests do without goes back to the host.

use std::fs;
use std::time::Duration;

use crate::agent::{Agent, counter, eventually, resident_mib};
use crate::batch::Test;
use crate::context::{Ctx, Kernel};
use crate::ensure;
use crate::outcome::{Outcome, Verdict};
use crate::running::Running;
use crate::tests::SOON;

const MIB: u64 = 1 << 20;
/// Guests report what is free every two seconds, and the largest pieces only.
const LIMIT: Duration = Duration::from_secs(60);

pub(crate) const TESTS: &[Test] = &[
    Test::new("balloon::inflating_returns_memory_to_the_host", |c| {
        inflate(c, Kernel::OwnBzimage, "256M")
    })
    .seconds(180),
    Test::new("balloon::inflating_returns_memory_stock", |c| {
        inflate(c, Kernel::StockBzimage, "512M")
    })
    .seconds(180),
    Test::new("balloon::shared_memory_goes_back_as_well", |c| {
        inflate(c, Kernel::OwnBzimage, "256M,shared")
    })
    .seconds(180),
    Test::new("balloon::a_guest_without_memory_deflates_it", oom).seconds(180),
    Test::new("balloon::what_is_free_goes_back_unasked", |c| {
        report(c, Kernel::OwnBzimage)
    })
    .seconds(180),
    Test::new("balloon::what_is_free_goes_back_unasked_stock", |c| {
        report(c, Kernel::StockBzimage)
    })
    .seconds(180),
    Test::new("balloon::statistics_are_counters", statistics),
    Test::new("balloon::off_is_off", off),
    Test::new("balloon::idle_guests_are_merged", merge).seconds(300),
];

fn actual_mib(vm: &Running<'_>) -> Verdict<u64> {
    Ok(counter(vm, "balloon", "actual_bytes")? / MIB)
}

fn inflate_to(vm: &Running<'_>, mib: u64) -> Verdict {
    vm.ctl_ok(&["balloon", &format!("{mib}M")])?;
    eventually("the balloon", LIMIT, || {
        let is = actual_mib(vm)?;
        Ok((is == mib, format!("{is} of {mib} MiB")))
    })
}

fn inflate(ctx: &Ctx, kernel: Kernel, memory: &str) -> Verdict {
    let vm = ctx
        .guest("agent,poweroff")
        .kernel(kernel)
        .args(["--memory", memory, "--balloon", "reporting=off"])
        .control()
        .spawn()?;
    let mut guest = Agent::of(vm, 1)?;
    guest.ask("hold 140")?;
    guest.ask("drop")?;
    let before = resident_mib(&guest.vm)?;
    ensure!(before >= 140, "only {before} MiB were on the host");
    let total: u64 = guest.ask("total")?.number("mem.free_kib")?;
    inflate_to(&guest.vm, 128)?;
    let after = resident_mib(&guest.vm)?;
    // The guest takes what it has used before rather than what it has not, but not only that.
    ensure!(
        after + 64 <= before,
        "of {before} MiB on the host {after} were left"
    );
    let less: u64 = guest.ask("total")?.number("mem.free_kib")?;
    ensure!(less + (100 << 10) < total, "{less} of {total} KiB are free");
    inflate_to(&guest.vm, 0)?;
    guest.ask("hold 140")?;
    ensure!(
        guest.ask("verify")?.get("mem.wrong_pages")? == "0",
        "memory that came back does not hold what is written"
    );
    for (size, says) in [("64G", "leave it some"), ("1", "in steps of 4K")] {
        let refused = guest.vm.ctl(&["balloon", size])?;
        refused.expect_one_line_error(&[says])?;
    }
    guest.quit()?.finish(SOON)?.expect_code(0)
}

/// The guest needs more than the balloon leaves it: it takes it back and goes on.
fn oom(ctx: &Ctx) -> Verdict {
    let vm = ctx
        .guest("agent,poweroff")
        .args(["--memory", "256M"])
        .control()
        .spawn()?;
    let mut guest = Agent::of(vm, 1)?;
    inflate_to(&guest.vm, 160)?;
    guest.ask("hold 120")?;
    ensure!(
        guest.ask("verify")?.get("mem.wrong_pages")? == "0",
        "memory does not hold what is written"
    );
    let actual = actual_mib(&guest.vm)?;
    ensure!(actual < 160, "the balloon still has {actual} MiB");
    guest.quit()?.finish(SOON)?.expect_code(0)
}

fn report(ctx: &Ctx, kernel: Kernel) -> Verdict {
    let vm = ctx
        .guest("agent,poweroff")
        .kernel(kernel)
        .args(["--memory", "512M"])
        .control()
        .spawn()?;
    let mut guest = Agent::of(vm, 1)?;
    guest.ask("hold 300")?;
    let before = resident_mib(&guest.vm)?;
    ensure!(before >= 300, "only {before} MiB were on the host");
    guest.ask("drop")?;
    eventually("memory on the host", LIMIT, || {
        let now = resident_mib(&guest.vm)?;
        Ok((
            now + 200 <= before,
            format!("{now} MiB, of {before} before"),
        ))
    })?;
    let reported = counter(&guest.vm, "balloon", "reported_bytes")? / MIB;
    ensure!(reported >= 200, "{reported} MiB were reported");
    guest.ask("hold 300")?;
    ensure!(
        guest.ask("verify")?.get("mem.wrong_pages")? == "0",
        "memory that came back does not hold what is written"
    );
    guest.quit()?.finish(SOON)?.expect_code(0)
}

fn statistics(ctx: &Ctx) -> Verdict {
    let vm = ctx
        .guest("agent,poweroff")
        .args(["--memory", "256M", "--balloon", "stats=1"])
        .control()
        .spawn()?;
    let mut guest = Agent::of(vm, 1)?;
    let total: u64 = guest.ask("total")?.number("mem.total_kib")?;
    // The first are of the driver's start; the kernel has given memory free since.
    eventually("all memory of the guest", SOON, || {
        let told = counter(&guest.vm, "balloon", "guest_total_bytes")? >> 10;
        Ok((told == total, format!("{told} KiB instead of {total} KiB")))
    })?;
    let free = counter(&guest.vm, "balloon", "guest_free_bytes")? / MIB;
    guest.ask("hold 100")?;
    eventually("free memory of the guest", SOON, || {
        let now = counter(&guest.vm, "balloon", "guest_free_bytes")? / MIB;
        Ok((now + 80 <= free, format!("{now} MiB, {free} before")))
    })?;
    guest.quit()?.finish(SOON)?.expect_code(0)
}

fn off(ctx: &Ctx) -> Verdict {
    let vm = ctx
        .guest("sleep-forever")
        .args(["--balloon", "off"])
        .control()
        .spawn()?;
    vm.wait_for("SLEEPING", SOON)?;
    vm.ctl(&["balloon", "64M"])?
        .expect_one_line_error(&["this VM has no balloon; start it with --balloon on"])?;
    let info = vm.ctl_ok(&["info"])?;
    ensure!(!info.contains("virtio-balloon"), "it is there: {info}");
    vm.ctl_ok(&["stop"])?;
    vm.finish(SOON)?.expect_code(0)
}

/// Two guests of the same kernel have much in common; KSM finds it.
fn merge(ctx: &Ctx) -> Verdict {
    const KSM: &str = "/sys/kernel/mm/ksm";
    let set = |file: &str, value: &str| fs::write(format!("{KSM}/{file}"), value);
    if set("pages_to_scan", "20000").is_err() {
        return Err(Outcome::Skipped("this host's kernel has no KSM".into()));
    }
    set("sleep_millisecs", "20")?;
    let sharing = || -> Verdict<u64> {
        let text = fs::read_to_string(format!("{KSM}/pages_sharing"))?;
        Ok(text.trim().parse().unwrap_or(0))
    };
    let spawn = |name: &str| -> Verdict<Running<'_>> {
        let vm = ctx
            .guest("sleep-forever")
            .args(["--memory", "64M,mergeable"])
            .control_at(&ctx.path(name))
            .spawn()?;
        vm.wait_for("SLEEPING", SOON)?;
        Ok(vm)
    };
    let (one, two) = (spawn("one")?, spawn("two")?);
    set("run", "1")?;
    // The kernel's text and read-only data alone are some thousand pages.
    let merged = eventually("pages shared", Duration::from_secs(120), || {
        let pages = sharing()?;
        Ok((pages >= 2000, format!("{pages}")))
    });
    set("run", "2")?;
    merged?;
    for vm in [one, two] {
        vm.ctl_ok(&["stop"])?;
        vm.finish(SOON)?.expect_code(0)?;
    }
    Ok(())
}
