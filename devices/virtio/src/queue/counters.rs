//! What is counted per queue; any thread may read.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::model::Shape;

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
    /// Requests that were answered with an error.
    pub errors: AtomicU64,
    /// Times a chain had to wait: a rate limit, or a backend that was not ready.
    pub stalls: AtomicU64,
}

impl QueueCounters {
    pub(crate) fn add(counter: &AtomicU64, by: u64) {
        counter.fetch_add(by, Ordering::Relaxed);
    }

    /// Well-formed chains taken, for whoever decides by their rate.
    pub(crate) fn taken(&self) -> u64 {
        self.chains.load(Ordering::Relaxed)
    }

    /// All of them by name.
    pub fn read(&self) -> [(&'static str, u64); 8] {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        [
            ("chains", get(&self.chains)),
            ("malformed", get(&self.malformed)),
            ("bytes_in", get(&self.bytes_in)),
            ("bytes_out", get(&self.bytes_out)),
            ("interrupts", get(&self.interrupts)),
            ("suppressed", get(&self.suppressed)),
            ("errors", get(&self.errors)),
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
    /// What the model counts beside them.
    pub gauges: Vec<(&'static str, Arc<AtomicU64>)>,
}

impl DeviceCounters {
    pub(crate) fn new(shape: &Shape) -> Self {
        Self {
            name: shape.name,
            queues: shape.queues.iter().map(|_| Arc::default()).collect(),
            gauges: shape.gauges.clone(),
        }
    }

    /// All of them by name; those of queue N as `queueN.name`.
    pub fn read(&self) -> Vec<(String, u64)> {
        let of_queues = self.queues.iter().enumerate().flat_map(|(number, queue)| {
            queue
                .read()
                .map(|(name, value)| (format!("queue{number}.{name}"), value))
        });
        let gauges = self
            .gauges
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.load(Ordering::Relaxed)));
        of_queues.chain(gauges).collect()
    }
}
