//! One tracing instance of the kernel with the few events a boot is timed by.
//!
//! `kvm_entry` and `kvm_exit` come ten thousand times in a boot, and recording them would cost what
//! is to be measured. So there are two kinds of runs. A [`Events::Whole`] run records neither. A
//! [`Events::Split`] run records the first of each: an event that triggers its own end is not
//! recorded, so each is ended by the other.
//!
//! ```text
//!  direct boot:  entry(rip in kernel) ✔   ends exit     exit   ends entry
//!  firmware:     entry ✔   exit   ends entry   ···   exit(in kernel) ✔   entry(in kernel)  ends exit
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

const TRACEFS: &str = "/sys/kernel/tracing";
/// Where a guest's kernel runs, bzImage's decompressor included; SeaBIOS moves itself to the end of
/// RAM, which lies above.
const KERNEL_FROM: u64 = 0x100_0000;
const KERNEL_TO: u64 = 0x800_0000;
const KERNEL_VIRTUAL: u64 = 0xffff_ffff_8000_0000;
/// Init's mark on port 0x80.
const MARK_PORT: u16 = 0x80;
const MARK: u8 = 0x41;

/// An instance, removed on drop.
pub(crate) struct Trace {
    dir: PathBuf,
}

/// What to record beside exec, init's mark and exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Events {
    /// Nothing more.
    Whole,
    /// The first entry into the guest and the first into its kernel.
    Split,
}

/// One line of a trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    /// Since an arbitrary start, the same for all events.
    pub(crate) at: Duration,
    pub(crate) name: String,
    /// The thread it happened in.
    pub(crate) pid: u32,
    pub(crate) fields: String,
}

impl Trace {
    pub(crate) fn new() -> Result<Self> {
        if !Path::new(TRACEFS).join("instances").exists() {
            let flags = rustix::mount::MountFlags::empty();
            rustix::mount::mount("tracefs", TRACEFS, "tracefs", flags, None)
                .with_context(|| format!("cannot mount tracefs at {TRACEFS}; this needs root"))?;
        }
        let dir = Path::new(TRACEFS).join("instances/perf-boot");
        let _ = fs::remove_dir(&dir);
        fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let trace = Self { dir };
        trace.set("tracing_on", "0")?;
        trace.set("trace_clock", "mono")?;
        trace.set(
            "events/kvm/kvm_pio/filter",
            &format!("port == {MARK_PORT:#x} && val == {MARK:#x}"),
        )?;
        trace.set("events/kvm/kvm_exit/filter", &in_kernel("guest_rip"))?;
        for event in [
            "sched/sched_process_exec",
            "sched/sched_process_exit",
            "kvm/kvm_pio",
        ] {
            trace.set(&format!("events/{event}/enable"), "1")?;
        }
        Ok(trace)
    }

    /// Empties the buffer, sets what to record and records.
    pub(crate) fn start(&self, events: Events) -> Result<()> {
        self.set("tracing_on", "0")?;
        self.set("trace", "")?;
        let wanted = if events == Events::Split { "1" } else { "0" };
        let ends = [
            ("kvm_exit", "disable_event:kvm:kvm_entry:1", String::new()),
            (
                "kvm_entry",
                "disable_event:kvm:kvm_exit:1",
                format!(" if {}", in_kernel("rip")),
            ),
        ];
        for (event, rule, condition) in ends {
            let trigger = format!("events/kvm/{event}/trigger");
            // What is left of an earlier run.
            let _ = self.set(&trigger, &format!("!{rule}"));
            if events == Events::Split {
                self.set(&trigger, &format!("{rule}{condition}"))?;
            }
            self.set(&format!("events/kvm/{event}/enable"), wanted)?;
        }
        self.set("tracing_on", "1")
    }

    /// Stops and returns what was recorded.
    pub(crate) fn stop(&self) -> Result<Vec<Event>> {
        self.set("tracing_on", "0")?;
        let path = self.dir.join("trace");
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(text.lines().filter_map(parse).collect())
    }

    fn set(&self, file: &str, value: &str) -> Result<()> {
        let path = self.dir.join(file);
        fs::write(&path, value)
            .with_context(|| format!("cannot write `{value}` to {}", path.display()))
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = self.set("tracing_on", "0");
        let _ = self.set("events/enable", "0");
        let _ = fs::remove_dir(&self.dir);
    }
}

fn in_kernel(field: &str) -> String {
    format!(
        "({field} >= {KERNEL_FROM:#x} && {field} < {KERNEL_TO:#x}) || {field} >= {KERNEL_VIRTUAL:#x}"
    )
}

/// Whether the event `vcpu 0, rip 0x1000000` enters the guest in its kernel.
pub(crate) fn enters_kernel(event: &Event) -> bool {
    let rip = event.fields.split_once("rip 0x").and_then(|(_, rest)| {
        let hex = rest.split(|c: char| !c.is_ascii_hexdigit()).next()?;
        u64::from_str_radix(hex, 16).ok()
    });
    rip.is_some_and(|rip| (KERNEL_FROM..KERNEL_TO).contains(&rip) || rip >= KERNEL_VIRTUAL)
}

/// `qemu-system-x86-123 [000] d..1. 12.345678: kvm_entry: vcpu 0, rip 0xfff0`
fn parse(line: &str) -> Option<Event> {
    let line = line.trim_start();
    if line.starts_with('#') {
        return None;
    }
    let (task, rest) = line.split_once(" [")?;
    let pid = task.trim_end().rsplit_once('-')?.1.parse().ok()?;
    let mut words = rest.split_whitespace().skip(1);
    let stamp = words.find(|w| w.ends_with(':') && w.starts_with(|c: char| c.is_ascii_digit()))?;
    let (seconds, micros) = stamp.trim_end_matches(':').split_once('.')?;
    let at =
        Duration::from_secs(seconds.parse().ok()?) + Duration::from_micros(micros.parse().ok()?);
    let name = words.next()?.trim_end_matches(':').to_owned();
    Some(Event {
        at,
        name,
        pid,
        fields: words.collect::<Vec<_>>().join(" "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        let event = parse(
            "   qemu-system-x86-123     [000] d..1.    12.345678: kvm_entry: vcpu 0, rip 0xfff0",
        )
        .unwrap();
        assert_eq!(event.at, Duration::from_micros(12_345_678));
        assert_eq!(
            (event.pid, event.name.as_str(), event.fields.as_str()),
            (123, "kvm_entry", "vcpu 0, rip 0xfff0")
        );
        let event = parse("       vcpu-0-9 [000] ..... 3.000001: kvm_pio: pio_write at 0x80 size 1 count 1 val 0x41 ").unwrap();
        assert_eq!(event.fields, "pio_write at 0x80 size 1 count 1 val 0x41");
        assert!(!enters_kernel(&event));
        let event = parse("vmm-9 [000] ..... 3.000001: kvm_entry: vcpu 0, rip 0x1000040 ").unwrap();
        assert!(enters_kernel(&event));
        assert_eq!(parse("# tracer: nop"), None);
        assert_eq!(parse(""), None);
    }
}
