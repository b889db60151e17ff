//! What host and guest say about the balloon's size, and what has been counted.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use testudo_memory::Discarded;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::stats;

/// Bytes in a page of the protocol's, whatever the guest's and the host's have (§5.5.6).
pub(super) const PAGE: u64 = 4096;

struct Shared {
    target: Arc<AtomicU64>,
    actual: Arc<AtomicU64>,
    poison: AtomicU32,
    /// Readable when the driver is to look at the configuration again.
    changed: EventFd,
    inflated: Arc<AtomicU64>,
    reported: Arc<AtomicU64>,
    kept: Arc<AtomicU64>,
    stats: Vec<(&'static str, Arc<AtomicU64>)>,
}

/// Between the model and whoever sets the balloon's size; clones are the same link.
#[derive(Clone)]
pub struct BalloonLink(Arc<Shared>);

impl BalloonLink {
    /// A link for a balloon that is to have `bytes`.
    pub fn new(bytes: u64) -> io::Result<Self> {
        let shared = Shared {
            target: Arc::default(),
            actual: Arc::default(),
            poison: AtomicU32::new(0),
            changed: EventFd::new(EFD_NONBLOCK)?,
            inflated: Arc::default(),
            reported: Arc::default(),
            kept: Arc::default(),
            stats: stats::NAMES.map(|name| (name, Arc::default())).into(),
        };
        shared.target.store(bytes, Ordering::Release);
        Ok(Self(Arc::new(shared)))
    }

    /// The balloon is to have `bytes`; a driver that runs is told.
    pub fn request(&self, bytes: u64) {
        self.0.target.store(bytes, Ordering::Release);
        let _ = self.0.changed.write(1);
    }

    pub(super) fn target_pages(&self) -> u32 {
        let bytes = self.0.target.load(Ordering::Acquire);
        u32::try_from(bytes / PAGE).unwrap_or(u32::MAX)
    }

    pub(super) fn actual_pages(&self) -> u32 {
        let bytes = self.0.actual.load(Ordering::Acquire);
        u32::try_from(bytes / PAGE).unwrap_or(u32::MAX)
    }

    pub(super) fn set_actual_pages(&self, pages: u32) {
        let bytes = u64::from(pages).saturating_mul(PAGE);
        self.0.actual.store(bytes, Ordering::Release);
    }

    pub(super) fn poison(&self) -> u32 {
        self.0.poison.load(Ordering::Acquire)
    }

    pub(super) fn set_poison(&self, value: u32) {
        self.0.poison.store(value, Ordering::Release);
    }

    pub(super) fn changed(&self) -> &EventFd {
        &self.0.changed
    }

    /// What an inflated range came to.
    pub(super) fn count_inflated(&self, done: Discarded) {
        self.0.inflated.fetch_add(done.bytes, Ordering::Relaxed);
        self.0.kept.fetch_add(done.skipped, Ordering::Relaxed);
    }

    /// What a reported range came to.
    pub(super) fn count_reported(&self, done: Discarded) {
        self.0.reported.fetch_add(done.bytes, Ordering::Relaxed);
        self.0.kept.fetch_add(done.skipped, Ordering::Relaxed);
    }

    /// A statistic of the guest's.
    pub(super) fn set_stat(&self, tag: usize, value: u64) {
        if let Some((_, gauge)) = self.0.stats.get(tag) {
            gauge.store(value, Ordering::Relaxed);
        }
    }

    pub(super) fn gauges(&self, stats: bool) -> Vec<(&'static str, Arc<AtomicU64>)> {
        let mut gauges = vec![
            ("target_bytes", Arc::clone(&self.0.target)),
            ("actual_bytes", Arc::clone(&self.0.actual)),
            ("inflated_bytes", Arc::clone(&self.0.inflated)),
            ("reported_bytes", Arc::clone(&self.0.reported)),
            ("kept_bytes", Arc::clone(&self.0.kept)),
        ];
        if stats {
            gauges.extend(self.0.stats.iter().cloned());
        }
        gauges
    }
}
