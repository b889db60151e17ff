//! Doorbells: guest writes that become an eventfd signal without leaving the kernel.

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// The guest write that rings a doorbell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DoorbellAddress {
    /// Any write of any width at this guest-physical address.
    Mmio(u64),
    /// Any write of any width at this I/O port.
    Pio(u16),
}

/// The guard of one registered doorbell: dropping it unregisters it.
pub trait Doorbell: Send + Sync {}

/// Where a device registers its doorbells (KVM's ioeventfd).
pub trait Doorbells: Send + Sync {
    /// From now on a write at `address` signals `event`, until the guard is dropped.
    fn bind(&self, address: DoorbellAddress, event: &Arc<EventFd>)
    -> io::Result<Box<dyn Doorbell>>;
}
