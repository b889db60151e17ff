//! The kernel's data path while the guest's memory grows.

use super::host::{Tap, echo};
use super::{ECHO, WAIT, counter, counters, finish, ping};
use crate::context::Ctx;
use crate::ensure;
use crate::outcome::Verdict;
use crate::tests::{SOON, mem};

/// Pages of the zone that plugged memory is in, which are in use: the kernel takes from it first.
const USED: &str = "fact normal_used $(awk '/^Node/{n = $4 == \"Normal\"} n && /nr_free_pages/{f = $2} \
                    n && $1 == \"managed\"{m = $2} END{print m - f}' /proc/zoneinfo)\n";

/// New memory is the guest kernel's, which puts packets there; each is compared.
pub(super) fn vhost(ctx: &Ctx) -> Verdict {
    let tap = Tap::new(22, &[])?;
    let script = tap.script(&format!("{ECHO}{WAIT}{USED}"));
    let launch = ctx
        .script(&script)
        .cmdline("memhp_default_state=online_kernel");
    let launch = launch.args(["--memory", "512M,max=1536M", "--net", "tap=t22,vhost"]);
    let vm = launch.control().spawn()?;
    vm.wait_for("READY", SOON)?;
    let total = 24 << 20;
    let mut sizes = [640, 1024, 1536].into_iter();
    let mut next = total / 8;
    echo(&tap.connect(7)?, total, |received| {
        if received >= next
            && let Some(size) = sizes.next()
        {
            next += total / 4;
            mem::resize(&vm, size)?;
        }
        Ok(())
    })?;
    ensure!(sizes.next().is_none(), "the transfer was over too early");
    echo(&tap.connect(7)?, 8 << 20, |_| Ok(()))?;
    ping(ctx, &tap, 1400, 20)?;
    let counters = counters(&vm)?;
    ensure!(counter(&counters, "queue0.chains") == 0, "{counters}");
    let used: i64 = finish(vm)?.number("normal_used")?;
    ensure!(used > 1000, "{used} pages of new memory are in use");
    Ok(())
}
