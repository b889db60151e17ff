//! How a VM ends, and that the exit code says so.

use rustix::process::Signal;

use crate::batch::Test;
use crate::context::{Ctx, Kernel};
use crate::ensure;
use crate::outcome::Verdict;
use crate::tests::SOON;

pub(crate) const TESTS: &[Test] = &[
    Test::new("ending::power_off_is_0", |c| {
        ends(c, Kernel::OwnBzimage, "poweroff", 0)
    }),
    Test::new("ending::reboot_is_3", |c| {
        ends(c, Kernel::OwnBzimage, "reboot", 3)
    }),
    Test::new("ending::reboot_by_acpi_is_3", |c| {
        ends(c, Kernel::OwnBzimage, "reboot=acpi", 3)
    }),
    Test::new("ending::reboot_by_keyboard_controller_is_3", |c| {
        ends(c, Kernel::OwnBzimage, "reboot=kbd", 3)
    }),
    Test::new("ending::triple_fault_is_3", |c| {
        ends(c, Kernel::OwnBzimage, "triple-fault", 3)
    }),
    Test::new("ending::panic_is_4", |c| {
        ends(c, Kernel::OwnBzimage, "panic", 4)
    }),
    Test::new("ending::init_that_exits_is_a_panic", |c| {
        ends(c, Kernel::OwnBzimage, "exit", 4)
    }),
    Test::new("ending::stock_power_off_is_0", |c| {
        ends(c, Kernel::StockBzimage, "poweroff", 0)
    }),
    Test::new("ending::stock_reboot_is_3", |c| {
        ends(c, Kernel::StockVmlinux, "reboot", 3)
    }),
    Test::new("ending::stock_panic_is_4", |c| {
        ends(c, Kernel::StockVmlinux, "panic", 4)
    }),
    Test::new("ending::several_cpus_power_off", |c| smp(c, "poweroff", 0)),
    Test::new("ending::several_cpus_reboot", |c| smp(c, "reboot", 3)),
    Test::new("ending::several_cpus_panic", |c| smp(c, "panic", 4)),
    Test::new("ending::on_reset_reboot_boots_again", boots_again),
    Test::new("ending::sigterm_ends_it", |c| signal(c, Signal::TERM)),
    Test::new("ending::sigint_ends_it", |c| signal(c, Signal::INT)),
    Test::new("ending::a_spinning_guest_is_ended", hang),
    Test::new("ending::kill_9_leaves_nothing", kill),
];

fn ends(ctx: &Ctx, kernel: Kernel, orders: &str, code: i32) -> Verdict {
    let done = ctx
        .guest(&format!("say=up,{orders}"))
        .kernel(kernel)
        .run()?;
    done.expect_line("up")?;
    done.expect_code(code)?;
    // What ended as it was meant to is nothing to complain about.
    if code == 0 {
        ensure!(done.stderr.is_empty(), "stderr says {:?}", done.stderr);
    }
    Ok(())
}

fn smp(ctx: &Ctx, orders: &str, code: i32) -> Verdict {
    ctx.guest(orders)
        .args(["--cpus", "4"])
        .run()?
        .expect_code(code)
}

fn boots_again(ctx: &Ctx) -> Verdict {
    let vm = ctx
        .guest("say=another-boot,reboot")
        .args(["--on-reset", "reboot"])
        .control()
        .spawn()?;
    vm.wait_for_times("END say=another-boot", 3, SOON)?;
    let info: serde_json::Value = serde_json::from_str(&vm.ctl_ok(&["info"])?)?;
    let resets = info.get("resets").and_then(serde_json::Value::as_u64);
    ensure!(resets >= Some(2), "info counts {resets:?} resets");
    vm.ctl_ok(&["stop"])?;
    vm.finish(SOON)?.expect_code(0)
}

fn signal(ctx: &Ctx, signal: Signal) -> Verdict {
    let vm = ctx.guest("sleep-forever").control().spawn()?;
    vm.wait_for("SLEEPING", SOON)?;
    vm.signal(signal)?;
    vm.finish(SOON)?.expect_code(0)?;
    ensure!(
        !ctx.path("control").exists(),
        "the control socket is still there"
    );
    Ok(())
}

fn hang(ctx: &Ctx) -> Verdict {
    let vm = ctx.guest("hang").control().spawn()?;
    vm.wait_for("HANGING", SOON)?;
    vm.ctl_ok(&["stop"])?;
    vm.finish(SOON)?.expect_code(0)
}

fn kill(ctx: &Ctx) -> Verdict {
    let start = || {
        ctx.guest("sleep-forever")
            .args(["--cpus", "2"])
            .control()
            .spawn()
    };
    let vm = start()?;
    vm.wait_for("SLEEPING", SOON)?;
    let pid = vm.pid();
    let tree = children_of(pid)?;
    ensure!(tree.is_empty(), "the VMM has child processes: {tree:?}");
    vm.signal(Signal::KILL)?;
    let done = vm.finish(SOON)?;
    ensure!(done.signal() == Some(9), "ended with {}", done.status);
    ensure!(
        !std::path::Path::new(&format!("/proc/{pid}")).exists(),
        "process {pid} is still there"
    );
    // What it left of its socket is in nobody's way.
    let again = start()?;
    again.wait_for("SLEEPING", SOON)?;
    again.ctl_ok(&["stop"])?;
    again.finish(SOON)?.expect_code(0)
}

/// Processes whose parent is `pid`.
fn children_of(pid: u32) -> Verdict<Vec<String>> {
    let mut children = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // The name in parentheses may hold anything, spaces too.
        let after = stat.rsplit(") ").next().unwrap_or_default();
        if after.split(' ').nth(1) == Some(&pid.to_string()) {
            children.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(children)
}
