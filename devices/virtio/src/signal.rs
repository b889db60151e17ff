//! How a device reaches its driver: queue and configuration interrupts.
//!
//! A transport implements [`Interrupts`]; models and queues hold the two handles below, from any
//! thread. Firing takes no lock of the device, so a worker may fire while a vCPU waits for that
//! worker to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// A transport's interrupts, frozen at activation.
pub trait Interrupts: Send + Sync {
    /// Tells the driver that queue `index` has used buffers.
    fn queue(&self, index: u16);
    /// Tells the driver to look at configuration space and status.
    fn config(&self);
    /// The eventfd whose signal is queue `index`'s interrupt, for a data path in the kernel.
    fn queue_event(&self, index: u16) -> Option<&EventFd>;
}

/// One queue's interrupt.
#[derive(Clone)]
pub struct QueueInterrupt {
    to: Arc<dyn Interrupts>,
    index: u16,
}

impl QueueInterrupt {
    pub(crate) fn new(to: Arc<dyn Interrupts>, index: u16) -> Self {
        Self { to, index }
    }

    /// Fires it.
    pub fn fire(&self) {
        self.to.queue(self.index);
    }

    /// The eventfd behind it, if the driver gave the queue a vector.
    pub fn event(&self) -> Option<&EventFd> {
        self.to.queue_event(self.index)
    }
}

/// Device state that workers change and the transport shows.
#[derive(Default)]
pub(crate) struct Flags {
    generation: AtomicU8,
    needs_reset: AtomicBool,
}

impl Flags {
    pub(crate) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(crate) fn clear(&self) {
        self.needs_reset.store(false, Ordering::Release);
    }
}

/// What a model tells the driver about the device as a whole.
#[derive(Clone)]
pub struct DeviceEvents {
    name: &'static str,
    flags: Arc<Flags>,
    to: Arc<dyn Interrupts>,
}

impl DeviceEvents {
    pub(crate) fn new(name: &'static str, flags: Arc<Flags>, to: Arc<dyn Interrupts>) -> Self {
        Self { name, flags, to }
    }

    /// The configuration space changed: a new generation, and an interrupt.
    pub fn config_changed(&self) {
        self.flags.generation.fetch_add(1, Ordering::AcqRel);
        self.to.config();
    }

    /// The device cannot go on until the driver resets it (virtio 1.2 §2.1.2). Idempotent.
    pub fn needs_reset(&self, reason: &dyn std::error::Error) {
        if !self.flags.needs_reset.swap(true, Ordering::AcqRel) {
            log::debug!("virtio-{} needs a reset: {reason}", self.name);
            self.to.config();
        }
    }
}
