//! What holds the VMM's process: system call filters on every thread, no new privileges.

use std::fs;

use crate::batch::Test;
use crate::context::Ctx;
use crate::ensure;
use crate::outcome::Verdict;
use crate::tests::SOON;

const SIGSYS: i32 = 31;

pub(crate) const TESTS: &[Test] = &[
    Test::new("isolation::every_thread_is_filtered", |c| {
        filtered(c, &[], true)
    }),
    Test::new("isolation::filters_can_be_off", |c| {
        filtered(c, &["--seccomp", "off"], false)
    }),
    Test::new("isolation::filters_can_log_only", log_only),
    Test::new("isolation::an_unlisted_call_kills_the_vmm", probe),
];

fn filtered(ctx: &Ctx, args: &[&str], expected: bool) -> Verdict {
    let vm = ctx
        .guest("rng=64,sleep-forever")
        .args(["--cpus", "2"])
        .args(args)
        .control()
        .spawn()?;
    vm.wait_for("SLEEPING", SOON)?;
    vm.ctl_ok(&["info"])?;
    let mut threads = 0;
    for task in fs::read_dir(format!("/proc/{}/task", vm.pid()))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let field = |name: &str| {
            let value = status
                .lines()
                .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
            value.unwrap_or_default().trim().to_owned()
        };
        let (name, mode) = (field("Name"), field("Seccomp"));
        let wanted = if expected { "2" } else { "0" };
        ensure!(
            mode == wanted,
            "thread {name} has seccomp mode {mode} instead of {wanted}"
        );
        ensure!(
            !expected || field("NoNewPrivs") == "1",
            "thread {name} may gain privileges"
        );
        threads += 1;
    }
    ensure!(
        threads >= 3,
        "only {threads} threads for two vCPUs and control"
    );
    vm.ctl_ok(&["stop"])?;
    vm.finish(SOON)?.expect_code(0)
}

/// Whatever a guest's life takes is in the profiles: with logging in the place of killing nothing differs.
fn log_only(ctx: &Ctx) -> Verdict {
    let done = ctx
        .guest("facts,rng=64,serial-flood=4,poweroff")
        .args(["--seccomp", "log"])
        .run()?;
    done.expect_code(0)
}

fn probe(ctx: &Ctx) -> Verdict {
    for thread in ["ctl", "vcpu", "io"] {
        let done = ctx.vmm().args(["seccomp-probe", thread]).run()?;
        ensure!(
            done.signal() == Some(SIGSYS),
            "thread kind {thread}: ended with {}: {}",
            done.status,
            done.stderr.trim()
        );
    }
    Ok(())
}
