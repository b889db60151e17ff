//! Several vCPUs: all online, running, and in the shape that was asked for.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::batch::Test;
use crate::context::{Ctx, Kernel};
use crate::ensure;
use crate::facts::Facts;
use crate::outcome::Verdict;
use crate::running::Running;
use crate::tests::boot::mtrr_registers;

pub(crate) const TESTS: &[Test] = &[
    Test::new("cpus::own_2", |c| flat(c, Kernel::OwnBzimage, 2)),
    Test::new("cpus::own_4", |c| flat(c, Kernel::OwnVmlinux, 4)),
    Test::new("cpus::own_16", |c| flat(c, Kernel::OwnBzimage, 16)).seconds(300),
    Test::new("cpus::stock_2", |c| flat(c, Kernel::StockVmlinux, 2)),
    Test::new("cpus::stock_4", |c| flat(c, Kernel::StockBzimage, 4)).seconds(180),
    Test::new("cpus::stock_16", |c| flat(c, Kernel::StockBzimage, 16)).seconds(400),
    Test::new("cpus::two_sockets_of_two_cores_of_two_threads", sockets).seconds(240),
    Test::new("cpus::as_many_as_there_can_be", most).seconds(240),
    Test::new("cpus::affinity_binds_the_thread", affinity),
    Test::new("cpus::affinity_to_an_absent_cpu_is_said", absent_cpu),
];

/// 254 vCPUs are built and run; a guest that starts them all would take an emulated host minutes.
fn most(ctx: &Ctx) -> Verdict {
    let vm = ctx
        .guest("sleep-forever")
        .args(["--cpus", "254", "--memory", "256M"])
        .control()
        .spawn()?;
    let info = info_when_up(&vm)?;
    let ids: BTreeSet<u64> = cpus_of(&info)
        .filter_map(|cpu| cpu.get("id").and_then(Value::as_u64))
        .collect();
    let threads: BTreeSet<i64> = cpus_of(&info)
        .filter_map(|cpu| cpu.get("tid").and_then(Value::as_i64))
        .collect();
    ensure!(ids.len() == 254, "{} different APIC ids", ids.len());
    ensure!(threads.len() == 254, "{} different threads", threads.len());
    vm.ctl_ok(&["stop"])?;
    vm.finish(Duration::from_secs(120))?.expect_code(0)
}

/// What `ctl info` says as soon as the VMM listens, whatever the guest has come to.
fn info_when_up(vm: &Running<'_>) -> Verdict<Value> {
    let begun = Instant::now();
    loop {
        let done = vm.ctl(&["info"])?;
        if done.expect_code(0).is_ok() || begun.elapsed() > crate::tests::SOON {
            done.expect_code(0)?;
            return Ok(serde_json::from_str(&done.stdout)?);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn cpus_of(info: &Value) -> impl Iterator<Item = &Value> {
    info.get("cpus")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

fn affinity(ctx: &Ctx) -> Verdict {
    let vm = ctx
        .guest("sleep-forever")
        .args(["--cpus", "2", "--cpu-affinity", "1:0"])
        .control()
        .spawn()?;
    let info = info_when_up(&vm)?;
    let tid = cpus_of(&info)
        .find(|cpu| cpu.get("index").and_then(Value::as_u64) == Some(1))
        .and_then(|cpu| cpu.get("tid").and_then(Value::as_i64))
        .unwrap_or_default();
    let status = std::fs::read_to_string(format!("/proc/{}/task/{tid}/status", vm.pid()))?;
    ensure!(
        status.lines().any(|l| l == "Cpus_allowed_list:\t0"),
        "thread {tid} of vCPU 1 may use other CPUs than 0: {status}"
    );
    vm.ctl_ok(&["stop"])?;
    vm.finish(crate::tests::SOON)?.expect_code(0)
}

fn absent_cpu(ctx: &Ctx) -> Verdict {
    let done = ctx
        .guest("poweroff")
        .args(["--cpu-affinity", "0:1000"])
        .run()?;
    done.expect_code(1)?;
    done.expect_one_line_error(&["vCPU 0", "cannot bind to host CPUs 1000"])
}

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
        .finish(Duration::from_secs(400))?;
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
