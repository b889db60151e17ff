//! Each kernel in each form boots to user space on one vCPU and finds the machine as it should be.

use crate::batch::Test;
use crate::context::{Ctx, Kernel};
use crate::facts::Facts;
use crate::outcome::Verdict;
use crate::{Outcome, ensure};

pub(crate) const TESTS: &[Test] = &[
    Test::new("boot::own_bzimage", |c| whole(c, Kernel::OwnBzimage)),
    Test::new("boot::own_vmlinux_pvh", |c| whole(c, Kernel::OwnVmlinux)),
    Test::new("boot::stock_bzimage", |c| whole(c, Kernel::StockBzimage)),
    Test::new("boot::stock_vmlinux_pvh", |c| {
        whole(c, Kernel::StockVmlinux)
    }),
    Test::new("boot::own_vmlinux_linux_entry", linux_entry),
    Test::new("boot::without_initrd_the_kernel_says_so", no_initrd),
    Test::new("boot::entropy_differs_between_boots", entropy),
];

const PAT: &str = "x86/PAT: Configuration [0-7]: WB  WC  UC- UC  WB  WP  UC- WT";
/// What a kernel says of firmware it does not like, at any level.
const COMPLAINTS: [&str; 8] = [
    "[Firmware Bug]",
    "[Firmware Warn]",
    "no space for",
    "failed to assign",
    "can't claim",
    "conflicts with",
    "inconsistent",
    "BIOS bug",
];
/// Words of the subjects that no warning may be about.
const SUBJECTS: [&str; 8] = [
    "acpi", "pci", "mtrr", "pat:", "apic", "e820", "mmconfig", "tsc",
];

fn whole(ctx: &Ctx, kernel: Kernel) -> Verdict {
    let elf = matches!(kernel, Kernel::OwnVmlinux | Kernel::StockVmlinux);
    let done = ctx
        .guest("facts,msr,rng=4096,percpu,entropy,dmesg,poweroff")
        .kernel(kernel)
        .args(["--protocol", if elf { "pvh" } else { "auto" }])
        .run()?;
    done.expect_code(0)?;
    done.expect_line("END dmesg")?;
    let facts = done.facts()?;
    ensure!(
        facts.number::<u32>("cpus_online")? == 1,
        "one CPU is not online"
    );
    mtrr_cover_the_hole(&facts)?;
    mtrr_registers(&facts, 1)?;
    log_is_clean(&done.stdout)?;
    random_device(&facts)?;
    let clock = facts.get("clocksource")?;
    ensure!(matches!(clock, "kvm-clock" | "tsc"), "the clock is {clock}");
    ensure!(
        facts.get("random.ready")? == "true",
        "the kernel's random pool is not seeded"
    );
    Ok(())
}

/// The kernel's own reading of the MTRRs: uncachable exactly where the 32-bit PCI window is, and no RAM there.
fn mtrr_cover_the_hole(facts: &Facts) -> Verdict {
    let mut mtrrs = facts.mtrrs()?;
    ensure!(!mtrrs.is_empty(), "/proc/mtrr is empty");
    mtrrs.sort_by_key(|m| m.base);
    let mut next = mtrrs[0].base;
    for mtrr in &mtrrs {
        ensure!(mtrr.kind == "uncachable", "an MTRR is {}", mtrr.kind);
        ensure!(
            mtrr.base == next,
            "the MTRRs leave a gap or overlap at {:#x}",
            mtrr.base
        );
        next = mtrr.base + mtrr.size;
    }
    ensure!(
        next == 1 << 32,
        "the MTRRs end at {next:#x} instead of 4 GiB"
    );
    let hole = mtrrs[0].base;
    ensure!(
        (1 << 32) - hole >= 1 << 30,
        "the 32-bit window begins at {hole:#x}, so it is below 1 GiB"
    );
    for range in facts.iomem()? {
        if range.owner == "System RAM" {
            let outside = range.last < hole || range.first >= 1 << 32;
            ensure!(outside, "RAM at {:#x} is uncachable", range.first);
        }
        if range.owner.starts_with("PCI Bus") && (1 << 20..1 << 32).contains(&range.first) {
            ensure!(
                range.first >= hole,
                "the PCI window at {:#x} is cachable",
                range.first
            );
        }
    }
    Ok(())
}

/// SDM 3A 12.11.2.1: MTRRs on (bit 11), default type write-back (6); the same on every CPU.
pub(crate) fn mtrr_registers(facts: &Facts, cpus: usize) -> Verdict {
    let of = |cpu: usize| facts.group(&format!("msr.{cpu}."));
    let first = of(0);
    for cpu in 0..cpus {
        let raw = facts.get(&format!("msr.{cpu}.0x2ff"))?;
        let value = u64::from_str_radix(raw.trim_start_matches("0x"), 16)?;
        ensure!(
            value & 0x8ff == 0x806,
            "CPU {cpu} has MTRR default type {raw}"
        );
        ensure!(
            of(cpu) == first,
            "CPU {cpu} has other MTRRs than CPU 0: {:?}",
            of(cpu)
        );
    }
    Ok(())
}

/// No error or warning about ACPI, PCI and what goes with them; PAT as Linux sets it when MTRRs are on.
fn log_is_clean(console: &str) -> Verdict {
    let log: Vec<&str> = console
        .lines()
        .skip_while(|l| *l != "DMESG begin")
        .skip(1)
        .take_while(|l| *l != "DMESG end")
        .collect();
    ensure!(!log.is_empty(), "there is no kernel log");
    ensure!(log.iter().any(|l| l.contains(PAT)), "no line `{PAT}`");
    let bad: Vec<&str> = log.into_iter().filter(|l| is_complaint(l)).collect();
    ensure!(bad.is_empty(), "the kernel complains:\n{}", bad.join("\n"));
    Ok(())
}

fn is_complaint(line: &str) -> bool {
    let level: u8 = line
        .strip_prefix('<')
        .and_then(|l| l.split('>').next()?.parse().ok())
        .unwrap_or(7);
    let lower = line.to_lowercase();
    COMPLAINTS.iter().any(|c| line.contains(c))
        || (level <= 4 && SUBJECTS.iter().any(|s| lower.contains(s)))
}

fn random_device(facts: &Facts) -> Verdict {
    let current = facts.get("rng_current")?;
    ensure!(
        current.starts_with("virtio_rng"),
        "the random device is {current}"
    );
    ensure!(
        facts.number::<u32>("rng.bytes")? == 4096,
        "too few random bytes"
    );
    let distinct: u32 = facts.number("rng.distinct")?;
    ensure!(distinct > 240, "4096 random bytes have {distinct} values");
    Ok(())
}

fn linux_entry(ctx: &Ctx) -> Verdict {
    let launch = ctx.guest("say=up,poweroff").kernel(Kernel::OwnVmlinux);
    let done = launch.args(["--protocol", "linux64"]).run()?;
    done.expect_code(0)?;
    done.expect_line("up")
}

/// The initramfs is what it was given and nothing else: without it there is no root.
fn no_initrd(ctx: &Ctx) -> Verdict {
    let done = ctx
        .vmm()
        .arg("run")
        .arg("--kernel")
        .arg(ctx.kernel(Kernel::OwnBzimage))
        .args(["--cmdline", "console=ttyS0 panic=-1"])
        .run()?;
    done.expect_code(4)?;
    ensure!(
        done.stdout.contains("Unable to mount root fs"),
        "the panic is about something else"
    );
    Ok(())
}

fn entropy(ctx: &Ctx) -> Verdict {
    let hash = || -> Verdict<String> {
        let done = ctx.guest("rng=64,poweroff").run()?;
        Ok(done.facts()?.get("rng.hash")?.to_owned())
    };
    let (one, two) = (hash()?, hash()?);
    if one == two {
        return Err(Outcome::Failed(format!(
            "two boots read the same random bytes: {one}"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod check {
    use super::*;

    #[test]
    fn complaints_are_told_from_news() {
        assert!(is_complaint(
            "<4> 0.1 mtrr: your CPUs had inconsistent variable MTRR settings"
        ));
        assert!(is_complaint(
            "<3> 0.1 ACPI BIOS Error (bug): Failure creating named object"
        ));
        assert!(is_complaint(
            "<6> 0.1 pci 0000:00:01.0: BAR 0: no space for [mem size 0x1000]"
        ));
        assert!(!is_complaint(
            "<6> 0.1 ACPI: PCI Root Bridge [PCI0] (domain 0000 [bus 00-ff])"
        ));
        assert!(!is_complaint("<4> 0.1 Spectre V2 : mitigations are off"));
    }

    #[test]
    fn uncachable_has_to_end_at_four_gib() {
        let facts = |mtrr: &str, ram: &str| {
            Facts::read(&format!("FACT mtrr.0={mtrr}\nFACT iomem.0={ram}\n"))
        };
        let uc = "reg00: base=0x0c0000000 ( 3072MB), size= 1024MB, count=1: uncachable";
        assert!(mtrr_cover_the_hole(&facts(uc, "00100000-0fffffff : System RAM")).is_ok());
        assert!(mtrr_cover_the_hole(&facts(uc, "00100000-c0ffffff : System RAM")).is_err());
        assert!(mtrr_cover_the_hole(&facts(uc, "a0000000-bfffffff : PCI Bus 0000:00")).is_err());
        let short = "reg00: base=0x0c0000000 ( 3072MB), size= 512MB, count=1: uncachable";
        assert!(mtrr_cover_the_hole(&facts(short, "00100000-0fffffff : System RAM")).is_err());
    }
}
