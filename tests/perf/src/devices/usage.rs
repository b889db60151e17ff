//! CPU time of a VMM: its cgroup's, and how much of that was the guest's.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

const CGROUPS: &str = "/sys/fs/cgroup";

/// A cgroup of one VMM and its daemon. Kernel threads that work for a process (vhost, io_uring) are in
/// its cgroup since Linux 6.4 and 5.12.
pub(crate) struct Cgroup(PathBuf);

/// Where things stand at a moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Snapshot {
    at: Instant,
    /// Of the cgroup.
    cpu: Duration,
    /// Of it, in the guest. Sampled by the kernel's tick, 250 times a second.
    guest: Duration,
}

/// Between two moments.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Spent {
    pub(crate) elapsed: Duration,
    pub(crate) vmm: Duration,
    pub(crate) guest: Duration,
}

impl Cgroup {
    pub(crate) fn new() -> Result<Cgroup> {
        let dir = PathBuf::from(CGROUPS).join("perf-devices");
        let _ = fs::remove_dir(&dir);
        fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(Cgroup(dir))
    }

    /// Moves a process in.
    pub(crate) fn take(&self, pid: u32) -> Result<()> {
        let path = self.0.join("cgroup.procs");
        fs::write(&path, pid.to_string())
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// What its processes have used; `vmm` is the one that runs the guest.
    pub(crate) fn snapshot(&self, vmm: u32) -> Result<Snapshot> {
        let path = self.0.join("cpu.stat");
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let micros = usage(&text).with_context(|| format!("{} has no usage", path.display()))?;
        let path = format!("/proc/{vmm}/stat");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let ticks = guest_ticks(&text).with_context(|| format!("{path} has no guest time"))?;
        let second = rustix::param::clock_ticks_per_second();
        Ok(Snapshot {
            at: Instant::now(),
            cpu: Duration::from_micros(micros),
            guest: Duration::from_millis(ticks * 1000 / second),
        })
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

impl Snapshot {
    pub(crate) fn since(&self, earlier: &Snapshot) -> Spent {
        let guest = self.guest.saturating_sub(earlier.guest);
        Spent {
            elapsed: self.at.saturating_duration_since(earlier.at),
            vmm: self.cpu.saturating_sub(earlier.cpu).saturating_sub(guest),
            guest,
        }
    }
}

fn usage(stat: &str) -> Option<u64> {
    stat.lines()
        .find_map(|l| l.strip_prefix("usage_usec "))?
        .parse()
        .ok()
}

/// Field 43 of proc(5)'s stat, counted behind the name, which may hold anything.
pub(crate) fn guest_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(43 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_time_is_field_43() {
        let fields: Vec<String> = (3..=52).map(|n| n.to_string()).collect();
        let stat = format!("17 (a ) b) {}", fields.join(" "));
        assert_eq!(guest_ticks(&stat), Some(43));
        assert_eq!(guest_ticks("17 (a) S 1"), None);
    }

    #[test]
    fn the_guest_is_not_the_vmm() {
        let at = Instant::now();
        let snapshot = |cpu, guest| Snapshot {
            at,
            cpu: Duration::from_millis(cpu),
            guest: Duration::from_millis(guest),
        };
        let spent = snapshot(900, 510).since(&snapshot(100, 10));
        assert_eq!(spent.vmm, Duration::from_millis(300));
        assert_eq!(usage("usage_usec 12\nuser_usec 3\n"), Some(12));
    }
}
