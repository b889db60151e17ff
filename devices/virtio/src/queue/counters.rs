//! What is counted per queue; any thread may read.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// One queue's counters since the device was made.
#[derive(Debug, Default)]
pub struct QueueCounters {
    /// Well-formed chains taken.
    pub chains: AtomicU64,
    /// Malformed chains returned unused.
    pub malformed: AtomicU64,
    /// Bytes the driver gave in returned chains.
    pub bytes_in: AtomicU64,
    /// Bytes the device wrote into returned chains.
    pub bytes_out: AtomicU64,
    /// Interrupts sent.
    pub interrupts: AtomicU64,
    /// Interrupts the driver did not want.
    pub suppressed: AtomicU64,
    /// Times a chain had to wait: a rate limit, or a backend that was not ready.
    pub stalls: AtomicU64,
}

impl QueueCounters {
    pub(crate) fn add(counter: &AtomicU64, by: u64) {
        counter.fetch_add(by, Ordering::Relaxed);
    }

    /// All of them by name.
    pub fn read(&self) -> [(&'static str, u64); 7] {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        [
            ("chains", get(&self.chains)),
            ("malformed", get(&self.malformed)),
            ("bytes_in", get(&self.bytes_in)),
            ("bytes_out", get(&self.bytes_out)),
            ("interrupts", get(&self.interrupts)),
            ("suppressed", get(&self.suppressed)),
            ("stalls", get(&self.stalls)),
        ]
    }
}

/// A device's counters.
#[derive(Debug)]
pub struct DeviceCounters {
    /// The model's name.
    pub name: &'static str,
    /// One per queue, by queue number.
    pub queues: Vec<Arc<QueueCounters>>,
}

impl DeviceCounters {
    pub(crate) fn new(name: &'static str, queues: usize) -> Self {
        Self {
            name,
            queues: (0..queues).map(|_| Arc::default()).collect(),
        }
    }
}
