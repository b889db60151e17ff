//! Facts of the machine that figures are of.

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde::Serialize;

/// The host's setting of transparent huge pages.
pub const THP: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// What decides a figure besides the programs that are measured.
#[derive(Debug, Serialize)]
pub struct Machine {
    kernel: String,
    cpu: String,
    clocksource: String,
    transparent_hugepages: String,
    qemu: String,
}

impl Machine {
    /// This machine, and the version of this QEMU.
    pub fn read(qemu: Option<&Path>) -> Machine {
        let read = |path: &str| {
            fs::read_to_string(path)
                .unwrap_or_default()
                .trim()
                .to_owned()
        };
        let cpu = read("/proc/cpuinfo")
            .lines()
            .find_map(|l| {
                Some(
                    l.strip_prefix("model name")?
                        .split_once(':')?
                        .1
                        .trim()
                        .to_owned(),
                )
            })
            .unwrap_or_default();
        let qemu = qemu.and_then(|qemu| {
            let said = Command::new(qemu).arg("--version").output().ok()?;
            Some(
                String::from_utf8(said.stdout)
                    .ok()?
                    .lines()
                    .next()?
                    .to_owned(),
            )
        });
        Machine {
            kernel: read("/proc/sys/kernel/osrelease"),
            cpu,
            clocksource: read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
            transparent_hugepages: read(THP),
            qemu: qemu.unwrap_or_default(),
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Linux {}, {}, clock {}, transparent huge pages {}, {}",
            self.kernel, self.cpu, self.clocksource, self.transparent_hugepages, self.qemu
        )
    }
}
