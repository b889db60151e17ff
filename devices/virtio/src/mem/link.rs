//! Between the model and whoever owns guest RAM: how much is asked of the guest, how much there is,
//! and the one change that waits to be made.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Where the memory is, and in what pieces it comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemRegion {
    /// First guest-physical address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// Bytes in a block, a power of two of at least a page.
    pub block: u64,
    /// How far beyond the requested size the guest may choose its blocks, in bytes: it has an
    /// alignment of its own.
    pub slack: u64,
}

/// A change of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemChange {
    /// These bytes, none of which is there, are to be there.
    Plug {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// These bytes, all of which are there, are to go.
    Unplug {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// Everything is to go.
    UnplugAll,
}

/// How much there is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemLevels {
    /// What the host wants the guest to have of the region.
    pub requested: u64,
    /// The part of the region that the guest may plug from.
    pub usable: u64,
    /// What the guest has plugged.
    pub plugged: u64,
}

enum Slot {
    Empty,
    Asked(MemChange),
    Answered { done: bool },
}

struct Shared {
    region: MemRegion,
    requested: Arc<AtomicU64>,
    usable: Arc<AtomicU64>,
    plugged: Arc<AtomicU64>,
    slot: Mutex<Slot>,
    /// Readable when there is an answer.
    answered: EventFd,
    /// Readable when the driver is to look at the configuration again.
    changed: EventFd,
    call: Box<dyn Fn() + Send + Sync>,
}

/// Both ends of the link; clones are the same link.
#[derive(Clone)]
pub struct MemLink(Arc<Shared>);

impl MemLink {
    /// A link that calls `call`, from the I/O thread, when a change waits for
    /// [`attend`](Self::attend). `call` must neither block nor attend by itself.
    pub fn new(
        region: MemRegion,
        requested: u64,
        call: Box<dyn Fn() + Send + Sync>,
    ) -> io::Result<Self> {
        let shared = Shared {
            region,
            requested: Arc::default(),
            usable: Arc::default(),
            plugged: Arc::default(),
            slot: Mutex::new(Slot::Empty),
            answered: EventFd::new(EFD_NONBLOCK)?,
            changed: EventFd::new(EFD_NONBLOCK)?,
            call,
        };
        let link = Self(Arc::new(shared));
        link.0.requested.store(requested, Ordering::Release);
        link.shrink_usable();
        Ok(link)
    }

    /// Where the memory is.
    pub fn region(&self) -> MemRegion {
        self.0.region
    }

    /// How much there is.
    pub fn levels(&self) -> MemLevels {
        MemLevels {
            requested: self.0.requested.load(Ordering::Acquire),
            usable: self.0.usable.load(Ordering::Acquire),
            plugged: self.0.plugged.load(Ordering::Acquire),
        }
    }

    /// The host wants the guest to have `bytes` of the region; a driver that runs is told.
    pub fn request(&self, bytes: u64) {
        self.0.requested.store(bytes, Ordering::Release);
        // What lies beyond may still be plugged, so it only grows.
        self.0
            .usable
            .fetch_max(self.usable_for(bytes), Ordering::AcqRel);
        let _ = self.0.changed.write(1);
    }

    fn usable_for(&self, requested: u64) -> u64 {
        let MemRegion { size, slack, .. } = self.0.region;
        match requested {
            0 => 0,
            bytes => size.min(bytes.saturating_add(slack)),
        }
    }

    /// Makes the change that waits, if one does, by `make`, which says whether it was made. For the
    /// owner of guest RAM; the device waits for it if it must stop meanwhile.
    pub fn attend(&self, make: impl FnOnce(MemChange) -> bool) {
        let mut slot = self.slot();
        if let Slot::Asked(change) = *slot {
            let done = make(change);
            *slot = Slot::Answered { done };
            let _ = self.0.answered.write(1);
        }
    }

    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.0.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for a change. Only when none waits.
    pub(super) fn ask(&self, change: MemChange) {
        *self.slot() = Slot::Asked(change);
        (self.0.call)();
    }

    /// The answer, if there is one: whether the change was made.
    pub(super) fn answer(&self) -> Option<bool> {
        let mut slot = self.slot();
        let Slot::Answered { done } = *slot else {
            return None;
        };
        *slot = Slot::Empty;
        Some(done)
    }

    /// The answer if there is one, or else no answer will ever come.
    pub(super) fn answer_or_take_back(&self) -> Option<bool> {
        let old = std::mem::replace(&mut *self.slot(), Slot::Empty);
        let _ = self.0.answered.read();
        match old {
            Slot::Answered { done } => Some(done),
            Slot::Asked(_) | Slot::Empty => None,
        }
    }

    /// After everything was unplugged, what may be plugged is what was asked for.
    pub(super) fn shrink_usable(&self) {
        let requested = self.0.requested.load(Ordering::Acquire);
        self.0
            .usable
            .store(self.usable_for(requested), Ordering::Release);
    }

    pub(super) fn plugged(&self) -> &AtomicU64 {
        &self.0.plugged
    }

    pub(super) fn answered(&self) -> &EventFd {
        &self.0.answered
    }

    pub(super) fn changed(&self) -> &EventFd {
        &self.0.changed
    }

    pub(super) fn gauges(&self) -> Vec<(&'static str, Arc<AtomicU64>)> {
        vec![
            ("requested_bytes", Arc::clone(&self.0.requested)),
            ("usable_bytes", Arc::clone(&self.0.usable)),
            ("plugged_bytes", Arc::clone(&self.0.plugged)),
        ]
    }
}
