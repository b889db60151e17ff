//! Sizes of guest memory and ways of backing it.

use std::time::Duration;

use rustix::process::Signal;

use crate::batch::Test;
use crate::context::{Ctx, Kernel};
use crate::facts::Facts;
use crate::outcome::Verdict;
use crate::tests::SOON;
use crate::{ensure, smaps};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// What the VMM itself may cost. The init is asleep, so all device queues and threads are there.
const PSS_LIMIT_KIB: u64 = 3 << 10;

pub(crate) const TESTS: &[Test] = &[
    Test::new("memory::own_64m", |c| {
        size(c, Kernel::OwnBzimage, 64 * MIB, &[])
    }),
    Test::new("memory::own_vmlinux_64m", |c| {
        size(c, Kernel::OwnVmlinux, 64 * MIB, &[])
    }),
    Test::new("memory::own_5g", |c| {
        size(c, Kernel::OwnBzimage, 5 * GIB, &[])
    }),
    Test::new("memory::stock_5g", |c| {
        size(c, Kernel::StockVmlinux, 5 * GIB, &[])
    }),
    Test::new("memory::own_64g_sparse", |c| {
        size(c, Kernel::OwnVmlinux, 64 * GIB, &[])
    })
    .seconds(300),
    Test::new("memory::stock_64g_sparse", |c| {
        size(c, Kernel::StockBzimage, 64 * GIB, &[])
    })
    .seconds(300),
    Test::new("memory::shared", |c| {
        size(c, Kernel::OwnBzimage, 256 * MIB, &["shared"])
    }),
    Test::new("memory::prefaulted", |c| {
        size(c, Kernel::OwnBzimage, 256 * MIB, &["prefault=2"])
    }),
    Test::new("memory::mergeable", |c| {
        size(c, Kernel::OwnBzimage, 256 * MIB, &["mergeable"])
    }),
    Test::new("memory::no_transparent_hugepages", |c| {
        size(c, Kernel::OwnBzimage, 256 * MIB, &["thp=off"])
    }),
    Test::new("memory::hugetlb_2m", |c| {
        size(c, Kernel::OwnBzimage, 256 * MIB, &["hugepages=2M"])
    }),
    Test::new(
        "memory::prefaulted_ram_is_there_at_start",
        prefault_is_resident,
    ),
    Test::new(
        "memory::prefaulted_ram_is_there_at_the_second_boot",
        prefault_again,
    ),
    Test::new("memory::is_backed_as_asked", backing),
    Test::new("memory::the_vmm_itself_is_small", pss),
];

fn size(ctx: &Ctx, kernel: Kernel, bytes: u64, options: &[&str]) -> Verdict {
    let mut argument = format!("{}M", bytes / MIB);
    for option in options {
        argument = format!("{argument},{option}");
    }
    let done = ctx
        .guest("facts,touch=24,poweroff")
        .kernel(kernel)
        .args(["--memory", &argument])
        .spawn()?
        .finish(Duration::from_secs(300))?;
    done.expect_code(0)?;
    let facts = done.facts()?;
    ensure!(
        facts.number::<u64>("touch.wrong_pages")? == 0,
        "memory does not hold what is written"
    );
    ram_is_all_there(&facts, bytes)
}

/// The RAM of the memory map adds up to what was asked for, but for the first MiB's holes; RAM that does
/// not fit below the 32-bit window goes on at 4 GiB.
fn ram_is_all_there(facts: &Facts, bytes: u64) -> Verdict {
    let ram: Vec<_> = facts
        .iomem()?
        .into_iter()
        .filter(|r| r.owner == "System RAM")
        .collect();
    let sum: u64 = ram.iter().map(|r| r.last - r.first + 1).sum();
    ensure!(
        sum <= bytes && bytes - sum <= 2 * MIB,
        "{bytes:#x} bytes of RAM are {sum:#x} to the guest"
    );
    let above = ram.iter().any(|r| r.first >= 4 * GIB);
    ensure!(above == (bytes > 3 * GIB), "RAM above 4 GiB: {above}");
    // The kernel's own share: its image, its hash tables, and 64 bytes for each 4 KiB.
    let total: u64 = facts.number::<u64>("mem_total_kib")? << 10;
    let share = bytes / 32 + 64 * MIB;
    ensure!(
        total + share > bytes,
        "only {total:#x} of {bytes:#x} bytes are usable"
    );
    Ok(())
}

fn prefault_is_resident(ctx: &Ctx) -> Verdict {
    let vm = ctx
        .guest("sleep-forever")
        .args(["--memory", "256M,prefault"])
        .spawn()?;
    vm.wait_for("SLEEPING", SOON)?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid()))?;
    let resident: u64 = status
        .lines()
        .find_map(|l| {
            l.strip_prefix("VmRSS:")?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .unwrap_or(0);
    ensure!(resident >= 256 << 10, "{resident} KiB are resident");
    Ok(())
}

fn prefault_again(ctx: &Ctx) -> Verdict {
    let mut vm = ctx
        .guest("echo,reboot")
        .args(["--memory", "128M,prefault", "--on-reset", "reboot"])
        .spawn()?;
    vm.wait_for("ECHO ready", SOON)?;
    vm.send(b"quit\n")?;
    vm.wait_for_times("ECHO ready", 2, SOON)?;
    let resident = crate::agent::resident_mib(&vm)?;
    ensure!(resident >= 128, "{resident} MiB are resident");
    vm.signal(Signal::TERM)?;
    vm.finish(SOON)?.expect_code(0)
}

/// The host's kernel tells how it backs the mapping; the boots above only show that it works.
fn backing(ctx: &Ctx) -> Verdict {
    for (option, flag, expected) in [
        ("thp=on", "hg", true),
        ("thp=off", "hg", false),
        ("mergeable", "mg", true),
        ("shared", "sh", true),
        ("hugepages=2M", "ht", true),
    ] {
        let memory = format!("128M,{option}");
        let vm = ctx
            .guest("sleep-forever")
            .args(["--memory", &memory])
            .spawn()?;
        vm.wait_for("SLEEPING", SOON)?;
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", vm.pid()))?;
        let flags = smaps::guest_ram_flags(&smaps);
        let is = flags.iter().any(|f| f == flag);
        ensure!(
            is == expected,
            "with {option} the flags of guest RAM are {flags:?}"
        );
        vm.signal(Signal::TERM)?;
        vm.finish(SOON)?.expect_code(0)?;
    }
    Ok(())
}

fn pss(ctx: &Ctx) -> Verdict {
    let vm = ctx.guest("sleep-forever").control().spawn()?;
    vm.wait_for("SLEEPING", SOON)?;
    let pss = vm.pss()?;
    ensure!(
        pss.kib <= PSS_LIMIT_KIB,
        "besides guest RAM the VMM costs {pss}, more than {PSS_LIMIT_KIB} KiB"
    );
    Ok(())
}
