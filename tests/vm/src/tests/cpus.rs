//! Several vCPUs: all online, running, and in the shape that was asked for.

use std::collections::BTreeSet;

use crate::batch::Test;
use crate::context::{Ctx, Kernel};
use crate::ensure;
use crate::facts::Facts;
use crate::outcome::Verdict;
use crate::tests::boot::mtrr_registers;

pub(crate) const TESTS: &[Test] = &[
    Test::new("cpus::own_2", |c| flat(c, Kernel::OwnBzimage, 2)),
    Test::new("cpus::own_4", |c| flat(c, Kernel::OwnVmlinux, 4)),
    Test::new("cpus::own_16", |c| flat(c, Kernel::OwnBzimage, 16)).seconds(300),
    Test::new("cpus::stock_2", |c| flat(c, Kernel::StockVmlinux, 2)),
    Test::new("cpus::stock_4", |c| flat(c, Kernel::StockBzimage, 4)).seconds(180),
    Test::new("cpus::stock_16", |c| flat(c, Kernel::StockBzimage, 16)).seconds(400),
    Test::new("cpus::two_sockets_of_two_cores_of_two_threads", sockets).seconds(240),
];

fn flat(ctx: &Ctx, kernel: Kernel, cpus: usize) -> Verdict {
    shape(ctx, kernel, &cpus.to_string(), (1, cpus, 1))
}

fn sockets(ctx: &Ctx) -> Verdict {
    shape(
        ctx,
        Kernel::OwnBzimage,
        "8,sockets=2,cores=2,threads=2",
        (2, 2, 2),
    )
}

fn shape(ctx: &Ctx, kernel: Kernel, argument: &str, shape: (usize, usize, usize)) -> Verdict {
    let (sockets, cores, threads) = shape;
    let cpus = sockets * cores * threads;
    let done = ctx
        .guest("facts,percpu,msr,dmesg=4,poweroff")
        .kernel(kernel)
        .args(["--cpus", argument, "--memory", "512M"])
        .spawn()?
        .finish(std::time::Duration::from_secs(400))?;
    done.expect_code(0)?;
    let facts = done.facts()?;
    for fact in ["cpus_online", "cpus_present", "percpu.ran"] {
        ensure!(
            facts.number::<usize>(fact)? == cpus,
            "{fact} is {} of {cpus}",
            facts.get(fact)?
        );
    }
    topology(&facts, shape)?;
    mtrr_registers(&facts, cpus)?;
    ensure!(
        !done.stdout.contains("inconsistent"),
        "the CPUs differ in their MTRRs"
    );
    Ok(())
}

/// What `lscpu` would show, from `/sys`: how many packages, cores in each, threads in each core.
fn topology(facts: &Facts, (sockets, cores, threads): (usize, usize, usize)) -> Verdict {
    let cpus = sockets * cores * threads;
    let mut apic_ids = BTreeSet::new();
    let mut core_ids = BTreeSet::new();
    let mut packages = BTreeSet::new();
    for cpu in 0..cpus {
        let key = format!("cpu.{cpu}");
        let field = |name| facts.field(&key, name);
        packages.insert(field("package")?);
        core_ids.insert((field("package")?, field("die")?, field("core")?));
        ensure!(
            apic_ids.insert(field("apicid")?),
            "two CPUs have APIC id {}",
            field("apicid")?
        );
        let siblings = count(field("threads")?);
        ensure!(
            siblings == threads,
            "CPU {cpu} has {siblings} threads in its core, not {threads}"
        );
        let in_package = count(field("cores")?);
        ensure!(
            in_package == cores * threads,
            "CPU {cpu} has {in_package} CPUs in its package, not {}",
            cores * threads
        );
    }
    ensure!(
        packages.len() == sockets,
        "{} packages, not {sockets}",
        packages.len()
    );
    ensure!(
        core_ids.len() == sockets * cores,
        "{} cores, not {}",
        core_ids.len(),
        sockets * cores
    );
    Ok(())
}

/// How many CPUs a list such as `0-3,8` has.
fn count(list: &str) -> usize {
    list.split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
            Some(last.saturating_sub(first) + 1)
        })
        .sum()
}

#[cfg(test)]
mod check {
    use super::*;

    #[test]
    fn a_shape_is_compared_in_all_its_levels() {
        let facts = Facts::read(
            "FACT cpu.0=package:0 die:0 core:0 threads:0-1 cores:0-1 apicid:0\n\
             FACT cpu.1=package:0 die:0 core:0 threads:0-1 cores:0-1 apicid:1\n\
             FACT cpu.2=package:1 die:0 core:0 threads:2-3 cores:2,3 apicid:2\n\
             FACT cpu.3=package:1 die:0 core:0 threads:2-3 cores:2,3 apicid:3\n",
        );
        assert!(topology(&facts, (2, 1, 2)).is_ok());
        for wrong in [(1, 4, 1), (1, 2, 2), (2, 2, 1), (4, 1, 1)] {
            assert!(topology(&facts, wrong).is_err(), "{wrong:?}");
        }
    }
}
