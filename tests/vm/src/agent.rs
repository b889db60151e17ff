//! A guest whose init holds memory as a test says: the other end of the order `agent`.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::ensure;
use crate::facts::Facts;
use crate::outcome::{Outcome, Verdict};
use crate::running::Running;
use crate::tests::SOON;

/// For one order to the agent: touching memory takes long on an emulated host.
const PATIENCE: Duration = Duration::from_secs(90);

/// A VM and how many orders its agent has had.
pub(crate) struct Agent<'a> {
    pub(crate) vm: Running<'a>,
    orders: usize,
}

impl<'a> Agent<'a> {
    /// Waits until the agent of the `boot`th boot, counted from 1, listens.
    pub(crate) fn of(vm: Running<'a>, boot: usize) -> Verdict<Agent<'a>> {
        vm.wait_for_times("AGENT ready", boot, SOON)?;
        Ok(Agent { vm, orders: 0 })
    }

    /// Gives an order, waits until it is carried out, and returns what it told.
    pub(crate) fn ask(&mut self, order: &str) -> Verdict<Facts> {
        let before = self.vm.console().len();
        self.orders += 1;
        self.vm.send(format!("{order}\n").as_bytes())?;
        let (done, failed) = (
            format!("AGENT done {}\n", self.orders),
            format!("AGENT failed {}: ", self.orders),
        );
        let start = Instant::now();
        loop {
            let console = self.vm.console();
            let said = console.get(before..).unwrap_or_default();
            if said.contains(&done) {
                return Ok(Facts::read(said));
            }
            ensure!(!said.contains(&failed), "`{order}`: {said}");
            ensure!(
                start.elapsed() < PATIENCE,
                "the agent does not answer `{order}`"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends the agent: the guest goes on with its next order.
    pub(crate) fn quit(mut self) -> Verdict<Running<'a>> {
        self.vm.send(b"quit\n")?;
        Ok(self.vm)
    }
}

/// What `ctl info` says.
pub(crate) fn info(vm: &Running<'_>) -> Verdict<Value> {
    Ok(serde_json::from_str(&vm.ctl_ok(&["info"])?)?)
}

/// A counter of a device.
pub(crate) fn counter(vm: &Running<'_>, device: &str, name: &str) -> Verdict<u64> {
    let counters: Value = serde_json::from_str(&vm.ctl_ok(&["counters"])?)?;
    counters
        .get(device)
        .and_then(|d| d.get(name))
        .and_then(Value::as_u64)
        .ok_or_else(|| Outcome::Failed(format!("no counter {device} {name} in {counters}")))
}

/// Memory of the VMM's process that is on the host, in MiB.
pub(crate) fn resident_mib(vm: &Running<'_>) -> Verdict<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid()))?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    let kib: u64 = line
        .and_then(|l| l.split_whitespace().next())
        .and_then(|n| n.parse().ok())
        .unwrap_or(0);
    Ok(kib >> 10)
}

/// Waits until something is so, and says what it was at last if it is not.
pub(crate) fn eventually(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Verdict<(bool, String)>,
) -> Verdict {
    let start = Instant::now();
    loop {
        let (so, is) = look()?;
        if so {
            return Ok(());
        }
        ensure!(start.elapsed() < limit, "{what}: it is {is}");
        std::thread::sleep(Duration::from_millis(100));
    }
}
