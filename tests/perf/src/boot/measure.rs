//! One case: boot it a few times, take the medians, look at the VMM's memory once.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::Serialize;

use crate::case::{Case, RAM_MIB, Then};
use crate::kit;
use crate::trace::{self, Event, Events, Trace};
use testudo_perf::memory;

/// A boot that takes longer hangs. In a lab with `--icount` this is virtual time, which leaps while
/// the lab waits for a file of the emulating machine, so it is generous.
const LIMIT: Duration = Duration::from_secs(120);
/// When an idle guest's VMM has settled.
const SETTLED: Duration = Duration::from_secs(4);

/// Points in time, in nanoseconds since exec of the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Times {
    pub(crate) first_run: u64,
    pub(crate) kernel: u64,
    pub(crate) init: u64,
    pub(crate) exit: u64,
}

/// What was measured of one case.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) vmm: &'static str,
    pub(crate) kernel: &'static str,
    /// Medians, each for itself; `None` if the case failed.
    pub(crate) times: Option<Times>,
    /// Largest difference between runs in exec→exit, in parts per thousand.
    pub(crate) spread_permille: Option<u64>,
    /// PSS of the VMM without guest RAM, in KiB.
    pub(crate) pss_kib: Option<u64>,
    /// Size of the VMM's binary; libraries not counted.
    pub(crate) binary_bytes: Option<u64>,
    /// Why something is missing.
    pub(crate) failure: Option<String>,
}

/// `warm`: the VMM has run before.
pub(crate) fn case(case: &Case, runs: u32, warm: bool, out: &Path) -> Row {
    let mut row = Row {
        vmm: case.vmm.name(),
        kernel: case.kernel_name,
        times: None,
        spread_permille: None,
        pss_kib: None,
        binary_bytes: std::fs::metadata(case.program()).ok().map(|m| m.len()),
        failure: None,
    };
    if let Err(error) = fill(&mut row, case, runs, warm, out) {
        row.failure = Some(format!("{error:#}"));
    }
    row
}

fn fill(row: &mut Row, case: &Case, runs: u32, warm: bool, out: &Path) -> Result<()> {
    // In memory while it is written: the output folder is the emulating machine's, and virtual time
    // leaps while the lab waits for that.
    let name = case.name().replace([' ', ','], "-");
    let console = kit::stage().join(format!("{name}.console"));
    let measured = runs_of(row, case, runs, warm, &console);
    let stderr = console.with_extension("stderr");
    for file in [&stderr, &console] {
        // A VMM that fails early leaves no console.
        let _ = file
            .file_name()
            .map(|name| std::fs::copy(file, out.join(name)));
    }
    measured.with_context(|| {
        let said = std::fs::read_to_string(&stderr).unwrap_or_default();
        said.lines().last().unwrap_or("it said nothing").to_owned()
    })
}

fn runs_of(row: &mut Row, case: &Case, runs: u32, warm: bool, console: &Path) -> Result<()> {
    let trace = Trace::new()?;
    if !warm {
        // Brings the binary, its libraries and its firmware into the page cache.
        boot(case, &trace, Events::Split, console)?;
    }
    let mut wholes = Vec::new();
    let mut splits = Vec::new();
    for _ in 0..runs.max(1) {
        let (events, pid) = boot(case, &trace, Events::Whole, console)?;
        wholes.push(whole(&events, pid)?);
        let (events, pid) = boot(case, &trace, Events::Split, console)?;
        splits.push(split(&events, pid)?);
    }
    let exits = || wholes.iter().map(|w| w.exit);
    let (least, most) = (exits().min().unwrap_or(0), exits().max().unwrap_or(0));
    row.spread_permille = ((most - least) * 1000).checked_div(least);
    row.times = Some(Times {
        first_run: median(splits.iter().map(|s| s.first_run).collect()),
        kernel: median(splits.iter().map(|s| s.kernel).collect()),
        init: median(wholes.iter().map(|w| w.init).collect()),
        exit: median(exits().collect()),
    });
    drop(trace);
    row.pss_kib = Some(pss(case, console)?);
    Ok(())
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

/// Boots to power-off; the events and the VMM's process id.
fn boot(case: &Case, trace: &Trace, wanted: Events, console: &Path) -> Result<(Vec<Event>, u32)> {
    trace.start(wanted)?;
    let mut child = spawn(case, Then::PowerOff, console)?;
    let pid = child.id();
    let ended = wait(&mut child, LIMIT)?;
    let events = trace.stop()?;
    if !ended {
        bail!("no end within {} s; see its console", LIMIT.as_secs());
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("{status}; see its console and stderr");
    }
    let said = std::fs::read(console).unwrap_or_default();
    if String::from_utf8_lossy(&said).contains("Kernel panic") {
        bail!("the guest's kernel panicked; see its console");
    }
    Ok((events, pid))
}

/// Nanoseconds from exec of the VMM to the first event `name` that `what` takes.
fn since_exec(
    events: &[Event],
    pid: u32,
    name: &str,
    what: impl Fn(&Event) -> bool,
) -> Result<u64> {
    let missing = |name: &str| format!("the trace has no {name} for the VMM");
    let exec = events
        .iter()
        .position(|e| e.name == "sched_process_exec" && e.pid == pid)
        .with_context(|| missing("sched_process_exec"))?;
    let (exec, after) = events[exec..].split_first().context("an event")?;
    let event = after
        .iter()
        .find(|e| e.name == name && what(e))
        .with_context(|| missing(name))?;
    let passed = event.at.saturating_sub(exec.at).as_nanos();
    Ok(u64::try_from(passed).unwrap_or(u64::MAX))
}

#[derive(Debug, PartialEq, Eq)]
struct Whole {
    init: u64,
    exit: u64,
}

fn whole(events: &[Event], pid: u32) -> Result<Whole> {
    Ok(Whole {
        init: since_exec(events, pid, "kvm_pio", |_| true)?,
        exit: since_exec(events, pid, "sched_process_exit", |e| e.pid == pid)?,
    })
}

#[derive(Debug, PartialEq, Eq)]
struct Split {
    first_run: u64,
    kernel: u64,
}

fn split(events: &[Event], pid: u32) -> Result<Split> {
    let first_run = since_exec(events, pid, "kvm_entry", |_| true)?;
    // A VMM without firmware enters the kernel at once.
    let kernel = match since_exec(events, pid, "kvm_entry", trace::enters_kernel) {
        Ok(entry) if entry == first_run => entry,
        _ => since_exec(events, pid, "kvm_exit", |_| true)?,
    };
    Ok(Split { first_run, kernel })
}

fn pss(case: &Case, console: &Path) -> Result<u64> {
    let mut child = spawn(case, Then::Sleep, console)?;
    let found = if wait(&mut child, SETTLED)? {
        Err(anyhow::anyhow!(
            "the VMM ended when it should have been idle"
        ))
    } else {
        memory::pss_without_guest_ram(child.id(), RAM_MIB << 20)
    };
    let _ = child.kill();
    let _ = child.wait();
    found
}

fn spawn(case: &Case, then: Then, console: &Path) -> Result<Child> {
    let log = console.with_extension("stderr");
    let stderr = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
    let stdout = if case.console_on_stdout() {
        let created = File::create(console);
        created
            .with_context(|| format!("cannot create {}", console.display()))?
            .into()
    } else {
        Stdio::null()
    };
    Command::new(case.program())
        .args(case.arguments(then, console)?)
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(stderr)
        .spawn()
        .with_context(|| format!("cannot start {}", case.program().display()))
}

/// Sleeps until the child has ended, or kills it when the time has passed. Says whether it ended.
fn wait(child: &mut Child, limit: Duration) -> Result<bool> {
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .context("a child without a pid")?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("cannot watch the VMM")?;
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    let timeout = Timespec::try_from(limit).context("a time limit out of range")?;
    let ended = poll(&mut fds, Some(&timeout)).context("cannot wait for the VMM")? > 0;
    if !ended && limit == LIMIT {
        let _ = child.kill();
        let _ = child.wait();
    }
    Ok(ended)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(at: u64, name: &str, pid: u32, fields: &str) -> Event {
        Event {
            at: Duration::from_micros(at),
            name: name.to_owned(),
            pid,
            fields: fields.to_owned(),
        }
    }

    #[test]
    fn times_are_told_from_the_exec_of_the_vmm() {
        let events = [
            event(50, "sched_process_exec", 6, ""),
            event(60, "kvm_pio", 5, ""),
            event(100, "sched_process_exec", 7, ""),
            event(170, "kvm_pio", 8, ""),
            event(180, "sched_process_exit", 8, ""),
            event(190, "sched_process_exit", 7, ""),
        ];
        assert_eq!(
            whole(&events, 7).unwrap(),
            Whole {
                init: 70_000,
                exit: 90_000
            }
        );
        let error = whole(&events[..3], 7).unwrap_err().to_string();
        assert_eq!(error, "the trace has no kvm_pio for the VMM");
    }

    #[test]
    fn a_kernel_is_entered_at_once_or_after_firmware() {
        let direct = [
            event(100, "sched_process_exec", 7, ""),
            event(150, "kvm_entry", 8, "vcpu 0, rip 0x1000040"),
            event(151, "kvm_exit", 8, ""),
        ];
        assert_eq!(
            split(&direct, 7).unwrap(),
            Split {
                first_run: 50_000,
                kernel: 50_000
            }
        );
        let firmware = [
            event(100, "sched_process_exec", 7, ""),
            event(150, "kvm_entry", 8, "vcpu 0, rip 0xfff0"),
            event(180, "kvm_exit", 8, ""),
        ];
        assert_eq!(
            split(&firmware, 7).unwrap(),
            Split {
                first_run: 50_000,
                kernel: 80_000
            }
        );
    }
}
