//! A virtqueue whose every guest-controlled value has been checked once, here.
//!
//! On top of `virtio-queue`, which reads rings but lets much pass in silence (a chain that loops
//! simply ends; the in-flight count is the caller's affair):
//!
//! * [`CheckedQueue`] is the only way from registers to rings: size and addresses fit guest RAM.
//! * [`VirtQueue::pop`] yields a [`Chain`] whose buffers are ordered, inside guest RAM and bounded
//!   in number and total length. A malformed chain goes back to the driver with length 0 and is
//!   counted. A ring that contradicts itself is a [`QueueFault`]: the device needs a reset.
//! * No more chains are in flight than the queue is long (CVE-2016-5403), and each is returned
//!   once, because returning consumes the `Chain`.
//!
//! Owned by one worker at a time. Guest memory may change at any moment: descriptors are copied,
//! then checked, then used from the copy; buffers are reached through vm-memory, which checks each
//! access against the view it is given.

mod chain;
mod counters;
mod reclaim;
mod setup;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use testudo_memory::RamView;
use thiserror::Error;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

pub use chain::{Buffer, Chain, ChainError, MalformedChain};
pub use counters::{DeviceCounters, QueueCounters};
pub use setup::{CheckedQueue, QueueRegisters, QueueSetupError};

use crate::signal::QueueInterrupt;

/// The driver broke the ring itself; what else is in it means nothing.
#[derive(Debug, Error)]
pub enum QueueFault {
    /// An available-ring entry names no descriptor.
    #[error("the available ring names descriptor {head}, the queue has {size}")]
    Head {
        /// What the entry says.
        head: u16,
        /// Queue size.
        size: u16,
    },
    /// More chains were made available than the queue has descriptors.
    #[error("more than {size} chains are in flight")]
    InFlight {
        /// Queue size.
        size: u16,
    },
    /// A whole ring of malformed chains.
    #[error("{count} malformed chains in a row")]
    Malformed {
        /// How many.
        count: u16,
    },
    /// Whoever served the queue before returned chains out of order, so nobody can tell which it
    /// held.
    #[error("{held} chains are lost: who held them did not return chains in order")]
    Unordered {
        /// How many.
        held: u16,
    },
    /// The rings are out of reach or contradict themselves.
    #[error("the rings cannot be used")]
    Ring(#[source] virtio_queue::Error),
}

impl From<virtio_queue::Error> for QueueFault {
    fn from(source: virtio_queue::Error) -> Self {
        Self::Ring(source)
    }
}

/// How a round over a queue ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Round {
    /// Nothing is left, and the driver kicks when there is more.
    Empty,
    /// Whoever served stopped.
    Stopped,
}

/// A queue's three areas: guest-physical address and bytes, all in guest RAM when the queue was
/// checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingAreas {
    /// Descriptor area.
    pub descriptors: (GuestAddress, usize),
    /// Driver area (available ring).
    pub driver: (GuestAddress, usize),
    /// Device area (used ring).
    pub device: (GuestAddress, usize),
}

/// One queue's rings at work.
pub struct VirtQueue {
    queue: Queue,
    interrupt: QueueInterrupt,
    counters: Arc<QueueCounters>,
    in_flight: u16,
    /// Something was put into the used ring since the driver was last told.
    untold: bool,
    /// The used index when the driver was last told, or its wish last asked.
    told: u16,
}

impl VirtQueue {
    pub(crate) fn new(
        queue: CheckedQueue,
        interrupt: QueueInterrupt,
        counters: Arc<QueueCounters>,
    ) -> Self {
        Self {
            queue: queue.into_queue(),
            interrupt,
            counters,
            in_flight: 0,
            untold: false,
            told: 0,
        }
    }

    /// Descriptors in the queue.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Chains popped and not yet pushed.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// What was counted on this queue.
    pub fn counters(&self) -> &Arc<QueueCounters> {
        &self.counters
    }

    /// The next available chain.
    pub fn pop(&mut self, ram: &RamView) -> Result<Option<Chain>, QueueFault> {
        let size = self.queue.size();
        for _ in 0..size {
            let Some(descriptors) = self.queue.iter(ram)?.next() else {
                return Ok(None);
            };
            if self.in_flight >= size {
                return Err(QueueFault::InFlight { size });
            }
            let head = descriptors.head_index();
            if head >= size {
                return Err(QueueFault::Head { head, size });
            }
            match Chain::walk(descriptors, ram) {
                Ok(chain) => {
                    self.in_flight = self.in_flight.saturating_add(1);
                    QueueCounters::add(&self.counters.chains, 1);
                    return Ok(Some(chain));
                }
                Err(reason) => {
                    log::debug!("descriptor chain {head} goes back unused: {reason}");
                    QueueCounters::add(&self.counters.malformed, 1);
                    self.queue.add_used(ram, head, 0)?;
                    self.untold = true;
                }
            }
        }
        Err(QueueFault::Malformed { count: size })
    }

    /// Takes chains until there are no more and gives each to `serve`, which may stop the round.
    /// While it goes on the driver need not kick; when it ends with [`Round::Empty`] the driver
    /// will. After [`Round::Stopped`] the driver has not been asked to: whoever stopped comes back
    /// by itself. The driver is not interrupted: see [`Self::notify`].
    pub fn drain(
        &mut self,
        ram: &RamView,
        mut serve: impl FnMut(&mut Self, Chain) -> Result<ControlFlow<()>, QueueFault>,
    ) -> Result<Round, QueueFault> {
        loop {
            self.pause_kicks(ram)?;
            while let Some(chain) = self.pop(ram)? {
                if serve(self, chain)?.is_break() {
                    return Ok(Round::Stopped);
                }
            }
            // Chains that came between the last look and this bring no kick.
            if !self.resume_kicks(ram)? {
                return Ok(Round::Empty);
            }
        }
    }

    /// Notes that a request was answered with an error.
    pub fn count_error(&self) {
        QueueCounters::add(&self.counters.errors, 1);
    }

    /// Notes that a request has to wait.
    pub fn count_stall(&self) {
        QueueCounters::add(&self.counters.stalls, 1);
    }

    /// Makes the chain popped last available again, as if it had not been popped.
    pub fn undo_pop(&mut self, chain: Chain) {
        self.put_back(chain);
        QueueCounters::add(&self.counters.stalls, 1);
    }

    /// As [`Self::undo_pop`] for a device that holds chains in stock and ends: nobody had to wait.
    /// The chain popped last goes back first.
    pub fn put_back(&mut self, chain: Chain) {
        drop(chain);
        self.queue.go_to_previous_position();
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// Returns a chain whose first `written` writable bytes the device filled.
    pub fn push(&mut self, ram: &RamView, chain: Chain, written: u32) -> Result<(), QueueFault> {
        let written = written.min(chain.writable_len());
        QueueCounters::add(&self.counters.bytes_in, u64::from(chain.readable_len()));
        QueueCounters::add(&self.counters.bytes_out, u64::from(written));
        self.in_flight = self.in_flight.saturating_sub(1);
        let head = chain.into_head();
        self.queue.add_used(ram, head, written)?;
        self.untold = true;
        Ok(())
    }

    /// Returns chains, each with the number of bytes filled, so that the driver sees all of them or
    /// none yet: for a message that takes several chains.
    pub fn push_all(
        &mut self,
        ram: &RamView,
        chains: impl IntoIterator<Item = (Chain, u32)>,
    ) -> Result<(), QueueFault> {
        let mut chains = chains.into_iter().peekable();
        let mut next = self.queue.next_used();
        while let Some((chain, written)) = chains.next() {
            if chains.peek().is_none() {
                // This one moves the used index past all of them.
                self.queue.set_next_used(next);
                return self.push(ram, chain, written);
            }
            let written = written.min(chain.writable_len());
            QueueCounters::add(&self.counters.bytes_in, u64::from(chain.readable_len()));
            QueueCounters::add(&self.counters.bytes_out, u64::from(written));
            self.in_flight = self.in_flight.saturating_sub(1);
            let slot = next.checked_rem(self.queue.size()).unwrap_or(0);
            let element = used_element(chain.into_head(), written);
            let at = self.queue.used_ring().checked_add(4);
            let at = at.and_then(|ring| ring.checked_add(u64::from(slot).saturating_mul(8)));
            let at = at.ok_or(virtio_queue::Error::AddressOverflow)?;
            ram.write_slice(&element, GuestAddress(at))
                .map_err(virtio_queue::Error::GuestMemory)?;
            next = next.wrapping_add(1);
        }
        Ok(())
    }

    /// Interrupts the driver if it wants to hear of what was returned; call it once per batch.
    pub fn notify(&mut self, ram: &RamView) -> Result<(), QueueFault> {
        if !std::mem::take(&mut self.untold) {
            return Ok(());
        }
        if self.interrupt_wanted(ram)? {
            QueueCounters::add(&self.counters.interrupts, 1);
            self.interrupt.fire();
        } else {
            QueueCounters::add(&self.counters.suppressed, 1);
        }
        Ok(())
    }

    /// With EVENT_IDX: whether the used index passed the driver's mark since it was asked last
    /// (virtio 1.2 §2.7.7.2). Without, a flag in the available ring says it.
    fn interrupt_wanted(&mut self, ram: &RamView) -> Result<bool, QueueFault> {
        // What was returned is visible before the driver's wish is read; the driver does it the
        // other way round.
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.told, self.queue.next_used());
        let available = self.queue.avail_ring();
        let load = |offset: u64| {
            let at = available.checked_add(offset);
            let at = at.ok_or(virtio_queue::Error::AddressOverflow)?;
            let value = ram.load::<u16>(GuestAddress(at), Ordering::Acquire);
            value
                .map(u16::from_le)
                .map_err(virtio_queue::Error::GuestMemory)
        };
        if !self.queue.event_idx_enabled() {
            return Ok(u32::from(load(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        let mark = load(
            u64::from(self.queue.size())
                .saturating_mul(2)
                .saturating_add(4),
        )?;
        let past_mark = self.told.wrapping_sub(mark).wrapping_sub(1);
        Ok(past_mark < self.told.wrapping_sub(old))
    }

    /// Asks the driver not to kick while the device is looking at the queue anyway.
    pub fn pause_kicks(&mut self, ram: &RamView) -> Result<(), QueueFault> {
        Ok(self.queue.disable_notification(ram)?)
    }

    /// Asks for kicks again; `true` if chains came meanwhile, which then bring no kick.
    pub fn resume_kicks(&mut self, ram: &RamView) -> Result<bool, QueueFault> {
        Ok(self.queue.enable_notification(ram)?)
    }

    /// Whether [`Self::postpone_kicks`] does anything.
    pub fn can_postpone_kicks(&self) -> bool {
        self.queue.event_idx_enabled()
    }

    /// Asks for a kick only when `chains` more are available (virtio 1.2 §2.7.10); `true` if they are already,
    /// and then bring none. Fewer bring none either: whoever calls this looks by himself after a while.
    /// Without EVENT_IDX the driver goes on kicking for each.
    pub fn postpone_kicks(&mut self, ram: &RamView, chains: u16) -> Result<bool, QueueFault> {
        if !self.can_postpone_kicks() {
            return Ok(false);
        }
        let chains = chains.clamp(1, self.size().max(1));
        let next = self.queue.next_avail();
        let [_, _, device] = setup::area_lengths(self.queue.size());
        // avail_event is what the used ring ends with.
        let at = u64::try_from(device)
            .ok()
            .and_then(|len| len.checked_sub(2));
        let at = at.and_then(|len| self.queue.used_ring().checked_add(len));
        let at = at.ok_or(virtio_queue::Error::AddressOverflow)?;
        let mark = next.wrapping_add(chains.wrapping_sub(1));
        ram.store(mark.to_le(), GuestAddress(at), Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)?;
        // The mark is visible before the driver's index is read; the driver does it the other way round.
        fence(Ordering::SeqCst);
        let available = self.queue.avail_idx(ram, Ordering::Acquire)?.0;
        Ok(available.wrapping_sub(next) >= chains)
    }

    /// The next position to be looked at in the available ring, and to be filled in the used ring.
    pub fn positions(&self) -> (u16, u16) {
        (self.queue.next_avail(), self.queue.next_used())
    }

    /// Takes over from a data path outside of this process (vhost), which stopped with `next_avail`
    /// to be looked at next and nothing in flight. What it put into the used ring is read from there.
    /// Only for a queue with no chain in flight here either.
    pub fn continue_at(&mut self, ram: &RamView, next_avail: u16) -> Result<(), QueueFault> {
        let next_used = self.queue.used_idx(ram, Ordering::Acquire)?.0;
        self.queue.set_next_avail(next_avail);
        self.queue.set_next_used(next_used);
        self.told = next_used;
        self.in_flight = 0;
        Ok(())
    }

    /// How many chains have been returned in all, as the used ring says: for a data path outside of
    /// this process, which counts there.
    pub fn used_index(&self, ram: &RamView) -> Result<u16, QueueFault> {
        Ok(self.queue.used_idx(ram, Ordering::Acquire)?.0)
    }

    /// Where the rings are, for a data path outside of this process.
    pub fn areas(&self) -> RingAreas {
        let [descriptors, driver, device] = setup::area_lengths(self.queue.size());
        RingAreas {
            descriptors: (GuestAddress(self.queue.desc_table()), descriptors),
            driver: (GuestAddress(self.queue.avail_ring()), driver),
            device: (GuestAddress(self.queue.used_ring()), device),
        }
    }
}

/// An entry of the used ring (virtio 1.2 §2.7.8).
fn used_element(head: u16, written: u32) -> [u8; 8] {
    let [h0, h1, h2, h3] = u32::from(head).to_le_bytes();
    let [w0, w1, w2, w3] = written.to_le_bytes();
    [h0, h1, h2, h3, w0, w1, w2, w3]
}

#[cfg(test)]
mod tests;
