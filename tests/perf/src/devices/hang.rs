//! A guest that hangs for a fault of the emulated host, noticed and ended.
//!
//! QEMU's emulation of SVM can deliver an interrupt twice (`helper_vmrun` leaves the vector of an
//! injected interrupt in `exception_index`; when the emulation's loop is left before the next exit, as
//! it is by each timer of `-icount`, it is taken for an exception). The second one comes although the
//! guest has interrupts off, and its handler waits for ever for the lock that the first one holds. Seen
//! every few seconds of I/O, under any VMM. Where a system call is being entered, still on the user's stack,
//! it is a double fault instead. A guest in that state uses its CPU and takes no interrupt,
//! not even its own timer's, which comes 250 times a second when the CPU is busy.
//!
//! A thread of its own watches; it ends when the VMM does.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::usage::guest_ticks;

/// The guest spins on `pause`, which the emulator leaves its loop for, so this lasts long.
const INTERVAL: Duration = Duration::from_millis(50);
/// Hundredths of a second in the guest, of the five in an interval.
const BUSY: u64 = 4;
/// Intervals until it hangs; in its boot it goes without interrupts for a while.
const PATIENCE: u32 = 2;
const PATIENCE_AT_BOOT: u32 = 8;

/// Whether the console tells of an interrupt that came where none may.
pub(crate) fn panicked(console: &str) -> bool {
    console.contains("PANIC: double fault")
}

/// Ends the watch when it is dropped.
pub(crate) struct Watch {
    hung: Arc<AtomicBool>,
    booted: Arc<AtomicBool>,
    _ended: mpsc::Sender<()>,
}

impl Watch {
    /// Kills the VMM when its guest hangs, and after `limit` in any case.
    pub(crate) fn begin(vmm: u32, limit: Duration) -> Watch {
        let (ended, waiting) = mpsc::channel();
        let watch = Watch {
            hung: Arc::default(),
            booted: Arc::default(),
            _ended: ended,
        };
        let (hung, booted) = (Arc::clone(&watch.hung), Arc::clone(&watch.booted));
        thread::spawn(move || {
            let mut detector = Detector::default();
            let rounds = limit.as_millis() / INTERVAL.as_millis();
            for _ in 0..rounds {
                if waiting.recv_timeout(INTERVAL) != Err(mpsc::RecvTimeoutError::Timeout) {
                    return;
                }
                let Some(now) = Sample::take(vmm) else {
                    continue;
                };
                if detector.hangs(now, booted.load(Ordering::Relaxed)) {
                    hung.store(true, Ordering::Relaxed);
                    break;
                }
            }
            let pid = i32::try_from(vmm).ok().and_then(Pid::from_raw);
            if let Some(pid) = pid {
                let _ = kill_process(pid, Signal::KILL);
            }
        });
        watch
    }

    /// The guest's timer runs.
    pub(crate) fn booted(&self) {
        self.booted.store(true, Ordering::Relaxed);
    }

    /// It was killed because its guest hung.
    pub(crate) fn hung(&self) -> bool {
        self.hung.load(Ordering::Relaxed)
    }
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    guest_ticks: u64,
    injections: u64,
}

impl Sample {
    fn take(vmm: u32) -> Option<Sample> {
        let stat = fs::read_to_string(format!("/proc/{vmm}/stat")).ok()?;
        let mine = format!("{vmm}-");
        let vm = fs::read_dir("/sys/kernel/debug/kvm")
            .ok()?
            .flatten()
            .find(|e| e.file_name().to_string_lossy().starts_with(&mine))?;
        let injections = fs::read_to_string(vm.path().join("irq_injections")).ok()?;
        Some(Sample {
            guest_ticks: guest_ticks(&stat)?,
            injections: injections.trim().parse().ok()?,
        })
    }
}

#[derive(Default)]
struct Detector {
    last: Option<Sample>,
    idle_of_interrupts: u32,
}

impl Detector {
    fn hangs(&mut self, now: Sample, booted: bool) -> bool {
        let spins = self.last.replace(now).is_some_and(|last| {
            now.injections == last.injections && now.guest_ticks >= last.guest_ticks + BUSY
        });
        self.idle_of_interrupts = if spins {
            self.idle_of_interrupts + 1
        } else {
            0
        };
        let patience = if booted { PATIENCE } else { PATIENCE_AT_BOOT };
        self.idle_of_interrupts >= patience
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(samples: &[(u64, u64)], booted: bool) -> bool {
        let mut detector = Detector::default();
        samples.iter().any(|(guest_ticks, injections)| {
            let sample = Sample {
                guest_ticks: *guest_ticks,
                injections: *injections,
            };
            detector.hangs(sample, booted)
        })
    }

    #[test]
    fn a_guest_that_uses_its_cpu_without_interrupts_hangs() {
        assert!(after(&[(0, 7), (5, 7), (10, 7)], true));
        assert!(!after(&[(0, 7), (5, 7), (10, 7)], false));
        let long: Vec<(u64, u64)> = (0..9).map(|n| (n * 5, 7)).collect();
        assert!(after(&long, false));
    }

    #[test]
    fn one_that_idles_or_takes_interrupts_does_not() {
        assert!(!after(&[(0, 7), (0, 7), (1, 7), (1, 7)], true));
        assert!(!after(&[(0, 7), (5, 8), (10, 9), (15, 10)], true));
        assert!(!after(&[(0, 7), (5, 7), (10, 9), (15, 9)], true));
    }
}
