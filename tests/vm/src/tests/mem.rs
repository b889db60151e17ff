//! Memory that is plugged and unplugged while the guest runs.

use std::time::Duration;

use serde_json::Value;

use crate::agent::{Agent, eventually, info, resident_mib};
use crate::batch::Test;
use crate::context::{Ctx, Kernel};
use crate::ensure;
use crate::outcome::Verdict;
use crate::running::Running;
use crate::tests::SOON;

const MIB: u64 = 1 << 20;
/// For the guest to plug or unplug what it was asked to.
const LIMIT: Duration = Duration::from_secs(90);
/// New memory is used at once, and for what can be moved away again.
pub(crate) const MOVABLE: &str = "memhp_default_state=online_movable";

pub(crate) const TESTS: &[Test] = &[
    Test::new("mem::grows_and_shrinks_under_load", |c| {
        load(c, Kernel::OwnBzimage, "128M", "")
    })
    .seconds(300),
    Test::new("mem::grows_and_shrinks_under_load_stock", |c| {
        load(c, Kernel::StockBzimage, "256M", "")
    })
    .seconds(300),
    Test::new("mem::shared_memory_grows_and_shrinks", |c| {
        load(c, Kernel::OwnBzimage, "128M", ",shared")
    })
    .seconds(300),
    Test::new("mem::devices_reach_plugged_memory", dma).seconds(180),
    Test::new("mem::a_reboot_unplugs_everything", reboot).seconds(180),
    Test::new("mem::bad_sizes_are_one_clear_line", bad_sizes),
];

fn level(vm: &Running<'_>, key: &str) -> Verdict<u64> {
    let info = info(vm)?;
    let memory = info.get("memory").and_then(|m| m.get(key));
    Ok(memory.and_then(Value::as_u64).unwrap_or(0) / MIB)
}

/// Asks for so much in all, and waits until the guest has plugged or unplugged the rest.
pub(crate) fn resize(vm: &Running<'_>, total_mib: u64) -> Verdict {
    vm.ctl_ok(&["resize-memory", &format!("{total_mib}M")])?;
    let boot = level(vm, "boot_bytes")?;
    ensure!(
        level(vm, "requested_bytes")? == total_mib,
        "the request is not noted"
    );
    eventually("plugged memory", LIMIT, || {
        let plugged = level(vm, "plugged_bytes")?;
        let is = format!("{plugged} MiB of {} MiB", total_mib - boot);
        Ok((plugged == total_mib - boot, is))
    })
}

fn load(ctx: &Ctx, kernel: Kernel, boot: &str, more: &str) -> Verdict {
    let vm = ctx
        .guest("agent,poweroff")
        .kernel(kernel)
        .cmdline(MOVABLE)
        .args(["--memory", &format!("{boot},max=2G{more}")])
        .control()
        .spawn()?;
    let mut guest = Agent::of(vm, 1)?;
    let before: u64 = guest.ask("total")?.number("mem.total_kib")?;

    resize(&guest.vm, 2048)?;
    eventually("the guest's memory", SOON, || {
        let total: u64 = guest.ask("total")?.number("mem.total_kib")?;
        let more = (total - before) >> 10;
        Ok((more >= 2048 - 256, format!("{more} MiB more")))
    })?;

    // More than there was at boot: what is held lies in the memory that came.
    guest.ask("hold 700")?;
    let high: u64 = guest.ask("total")?.number("mem.high_pages")?;
    ensure!(high > 150_000, "only {high} held pages are in new memory");
    ensure!(
        guest.ask("verify")?.get("mem.wrong_pages")? == "0",
        "memory does not hold what is written"
    );
    let full = resident_mib(&guest.vm)?;
    ensure!(full >= 700, "only {full} MiB are on the host");

    // What is in use moves out of the way.
    resize(&guest.vm, 1280)?;
    ensure!(
        guest.ask("verify")?.get("mem.wrong_pages")? == "0",
        "what was held did not survive the unplugging of what was around it"
    );

    guest.ask("drop")?;
    guest.ask("caches")?;
    resize(&guest.vm, 256)?;
    let rest = resident_mib(&guest.vm)?;
    ensure!(
        rest < 300,
        "{rest} of {full} MiB are still on the host, for 256 MiB"
    );

    // And once more: ranges that have gone come again.
    resize(&guest.vm, 1024)?;
    guest.ask("hold 400")?;
    ensure!(
        guest.ask("verify")?.get("mem.wrong_pages")? == "0",
        "memory that came again does not hold what is written"
    );
    guest.quit()?.finish(SOON)?.expect_code(0)
}

/// A disk read past the page cache lands in memory that was plugged.
fn dma(ctx: &Ctx) -> Verdict {
    let disk = ctx.path("disk");
    let bytes: Vec<u8> = (0..2 * MIB)
        .flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .collect();
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    std::fs::write(&disk, &bytes)?;
    let vm = ctx
        .guest("agent,poweroff")
        .cmdline(MOVABLE)
        .args(["--memory", "128M,max=1G"])
        .args(["--disk", &format!("path={},ro", disk.display())])
        .control()
        .spawn()?;
    let mut guest = Agent::of(vm, 1)?;
    resize(&guest.vm, 640)?;
    guest.ask("hold 64")?;
    let facts = guest.ask("direct vda 16")?;
    let high: u64 = facts.number("direct.high_pages")?;
    ensure!(high > 3000, "only {high} of 4096 pages are in new memory");
    ensure!(
        facts.get("direct.hash")? == format!("{hash:016x}"),
        "the disk reads otherwise"
    );
    guest.quit()?.finish(SOON)?.expect_code(0)
}

fn reboot(ctx: &Ctx) -> Verdict {
    let vm = ctx
        .guest("agent,reboot")
        .cmdline(MOVABLE)
        .args(["--memory", "128M,max=1G", "--on-reset", "reboot"])
        .control()
        .spawn()?;
    let mut guest = Agent::of(vm, 1)?;
    let total: u64 = guest.ask("total")?.number("mem.total_kib")?;
    resize(&guest.vm, 768)?;
    guest.ask("hold 300")?;
    let vm = guest.quit()?;
    // The request outlives the guest: the next one is asked for the same.
    let mut guest = Agent::of(vm, 2)?;
    ensure!(
        info(&guest.vm)?.get("resets").and_then(Value::as_u64) == Some(1),
        "it did not reset"
    );
    resize(&guest.vm, 768)?;
    guest.ask("hold 300")?;
    ensure!(
        guest.ask("verify")?.get("mem.wrong_pages")? == "0",
        "memory does not hold what is written"
    );
    guest.ask("drop")?;
    resize(&guest.vm, 128)?;
    let again: u64 = guest.ask("total")?.number("mem.total_kib")?;
    ensure!(
        again.abs_diff(total) < 4096,
        "{again} KiB instead of {total} KiB after all of it is gone"
    );
    guest.vm.ctl_ok(&["stop"])?;
    guest.vm.finish(SOON)?.expect_code(0)
}

fn bad_sizes(ctx: &Ctx) -> Verdict {
    for (memory, says) in [
        ("256M,max=128M", "max=128M is no more than the 256M"),
        ("256M,max=257M", "in steps of 2M"),
        ("256M,max=2T", "a VM has at most 1T"),
        ("256M,max=much", "is not a size"),
    ] {
        ctx.guest("poweroff")
            .args(["--memory", memory])
            .run()?
            .expect_one_line_error(&[says])?;
    }
    let vm = ctx
        .guest("sleep-forever")
        .args(["--memory", "128M,max=512M"])
        .control()
        .spawn()?;
    vm.wait_for("SLEEPING", SOON)?;
    for size in ["64M", "513M", "1G", "0"] {
        let refused = vm.ctl(&["resize-memory", size])?;
        refused.expect_one_line_error(&["may be 128M to 512M, in steps of 2M"])?;
    }
    vm.ctl_ok(&["stop"])?;
    vm.finish(SOON)?.expect_code(0)?;
    let fixed = ctx.guest("sleep-forever").control().spawn()?;
    fixed.wait_for("SLEEPING", SOON)?;
    let refused = fixed.ctl(&["resize-memory", "1G"])?;
    refused.expect_one_line_error(&["memory is fixed; start it with --memory SIZE,max=SIZE"])
}
