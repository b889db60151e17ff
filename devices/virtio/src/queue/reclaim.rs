//! Taking a queue back from a data path outside of this process (vhost-user) that went away without
//! a word.
//!
//! Nobody wrote down which chains it held. Both rings count from the start of the queue, so their
//! indices tell how many; which ones can be told if chains came back in the order in which they were
//! made available, and whether they did can be seen where the rings still show both:
//!
//! ```text
//!                    ┌─ the last `size` ─┐                    ┌────┐
//!   available  … (…) a  b  c  d  e  f    │ avail.idx   used … a  b  c  d │ used.idx    held: e f
//! ```
//! A data path that returns chains in another order leaves no way to know, whatever one infers: the
//! same rings come about with different chains held.

use std::sync::atomic::Ordering;

use testudo_memory::RamView;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{QueueFault, VirtQueue};

impl VirtQueue {
    /// Makes the chains available again that a data path, which is gone for good, took and did not
    /// return. Only for a queue with no chain in flight here. An error if they cannot be told; then
    /// the queue goes on after them.
    pub fn reclaim(&mut self, ram: &RamView) -> Result<(), QueueFault> {
        let size = self.queue.size();
        let available = self.queue.avail_idx(ram, Ordering::Acquire)?.0;
        let used = self.queue.used_idx(ram, Ordering::Acquire)?.0;
        self.continue_at(ram, available)?;
        let held = available.wrapping_sub(used);
        if held > size {
            return Err(QueueFault::InFlight { size });
        }
        for back in 1..=size.saturating_sub(held) {
            let position = used.wrapping_sub(back);
            if self.made_available(ram, position)? != self.returned(ram, position)? {
                return Err(QueueFault::Unordered { held });
            }
        }
        self.continue_at(ram, used)
    }

    fn made_available(&self, ram: &RamView, position: u16) -> Result<u32, QueueFault> {
        let slot = u64::from(position.checked_rem(self.queue.size()).unwrap_or(0));
        let ring = self.queue.avail_ring().saturating_add(4);
        let at = GuestAddress(ring.saturating_add(slot.saturating_mul(2)));
        let head: u16 = ram.load(at, Ordering::Relaxed).map_err(unreadable)?;
        Ok(u16::from_le(head).into())
    }

    fn returned(&self, ram: &RamView, position: u16) -> Result<u32, QueueFault> {
        let slot = u64::from(position.checked_rem(self.queue.size()).unwrap_or(0));
        let ring = self.queue.used_ring().saturating_add(4);
        let at = GuestAddress(ring.saturating_add(slot.saturating_mul(8)));
        let id: u32 = ram.load(at, Ordering::Relaxed).map_err(unreadable)?;
        Ok(u32::from_le(id))
    }
}

fn unreadable(source: GuestMemoryError) -> QueueFault {
    QueueFault::Ring(virtio_queue::Error::GuestMemory(source))
}
