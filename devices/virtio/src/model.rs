//! What a virtio device is, without its transport.
//!
//! ```text
//!              start(Activated)                stop() → Queues
//!   idle ───────────────────────────▶ running ─────────────────▶ idle
//!    ▲  └── Err: the guest sees DEVICE_NEEDS_RESET; still idle      │
//!    └──────────────── may be started again ────────────────────────┘
//! ```
//! The transport calls all of it under the device's lock: on a vCPU thread when the driver writes
//! its status, on the control thread at pause and unplug. A pause is a stop; resuming starts the
//! model with the queues that `stop` gave back, which then hold whatever came meanwhile: a model
//! that starts looks at its queues without waiting for a kick. `stop` returns when no request is in flight and
//! nothing of the model touches guest RAM any more.

use std::error::Error as StdError;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use event_manager::EventSet;
use testudo_memory::{HostWindow, RamHandle};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::queue::VirtQueue;
use crate::signal::{DeviceEvents, QueueInterrupt};

/// Feature bits that belong to every device (virtio 1.2 §6).
pub mod features {
    use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
    use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

    /// The device is not a legacy one; a driver must accept it.
    pub const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
    /// A descriptor may point to a table of descriptors.
    pub const INDIRECT: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
    /// Notifications are wanted from an index on, not by a flag.
    pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
    /// What every device here offers beside its own bits. Packed rings and per-queue reset are
    /// not among them.
    pub const COMMON: u64 = VERSION_1 | INDIRECT | EVENT_IDX;
}

/// What a model is, fixed for its life.
#[derive(Debug, Clone, Default)]
pub struct Shape {
    /// A short name for messages: "rng".
    pub name: &'static str,
    /// Device type id (virtio 1.2 §5).
    pub device_type: u16,
    /// Features of this device type; [`features::COMMON`] is added to them.
    pub features: u64,
    /// Those of [`features::COMMON`] it does without: a data path elsewhere may not have them all.
    pub lacks: u64,
    /// The largest size of each queue, each a power of two up to 32768.
    pub queues: Vec<u16>,
    /// Bytes of the device's own configuration space.
    pub config_len: u32,
    /// A region of memory that the driver reaches beside guest RAM (virtio 1.2 §2.10).
    pub shared_memory: Option<SharedMemory>,
    /// What the model counts beside its queues, by name.
    pub gauges: Vec<(&'static str, Arc<AtomicU64>)>,
}

/// A shared memory region.
#[derive(Debug, Clone)]
pub struct SharedMemory {
    /// Its id, in the terms of the device type.
    pub id: u8,
    /// What is in it; its length is a power of two.
    pub window: Arc<HostWindow>,
}

/// Whether and how a model's state can be saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SavedState {
    /// Ring positions are all there is.
    QueuesOnly,
    /// It cannot be saved.
    Unsupported,
}

/// A device type.
pub trait VirtioModel: Send {
    /// What it is.
    fn shape(&self) -> Shape;

    /// Reads its configuration space. The caller keeps `offset + data.len()` within
    /// [`Shape::config_len`].
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes its configuration space, within the same bounds.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// Begins to serve the queues the driver enabled. `on` is frozen: nothing the driver writes
    /// to its registers changes it before the next start.
    fn start(&mut self, on: Activated) -> Result<(), ActivateError>;

    /// Ends service, waits for requests in flight and gives the queues back. Also called when
    /// `start` failed or was never called; then there are none.
    fn stop(&mut self) -> Queues;

    /// The driver has reset the device, which is stopped: what the model kept for that driver beside
    /// its queues ends here. A pause does not come by.
    fn reset(&mut self) {}

    /// Whether its state can be saved.
    fn saved_state(&self) -> SavedState;
}

/// What a model gets to work with from DRIVER_OK to reset.
pub struct Activated {
    /// Guest RAM; take a view for each batch of work.
    pub ram: RamHandle,
    /// The features both sides agreed on.
    pub features: u64,
    /// The enabled queues, lowest first.
    pub queues: Vec<ActiveQueue>,
    /// To tell the driver of configuration changes and of trouble.
    pub device: DeviceEvents,
}

impl Activated {
    /// Takes queue `index` out; an error if the driver did not enable it.
    pub fn take_queue(&mut self, index: u16) -> Result<ActiveQueue, ActivateError> {
        let at = self.queues.iter().position(|q| q.index == index);
        at.map(|at| self.queues.remove(at))
            .ok_or(ActivateError::QueueMissing { index })
    }
}

/// How a kick is watched. Each kick is an event of its own, so that nobody needs to read it, which would be a
/// system call a request. One that nobody has seen yet is an event when it is first watched.
pub const KICKED: EventSet = EventSet::IN.union(EventSet::EDGE_TRIGGERED);

/// One queue at work.
pub struct ActiveQueue {
    /// Its number.
    pub index: u16,
    /// The rings.
    pub queue: VirtQueue,
    /// Signalled when the driver made buffers available; non-blocking. Watch it with [`KICKED`].
    pub kick: Arc<EventFd>,
    /// To interrupt the driver; [`VirtQueue::notify`] does it when the driver wants it.
    pub interrupt: QueueInterrupt,
}

/// The queues a stopped model gives back, with their ring positions.
pub type Queues = Vec<ActiveQueue>;

/// A model could not start; the driver sees DEVICE_NEEDS_RESET.
#[derive(Debug, Error)]
pub enum ActivateError {
    /// The driver left out a queue the device cannot do without.
    #[error("queue {index} is needed but the driver did not enable it")]
    QueueMissing {
        /// The queue.
        index: u16,
    },
    /// The host lacks something.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
}

/// Reads from the configuration space `config`, all of which there is; what lies beyond reads
/// all-ones.
pub(crate) fn read_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0xff);
    let from = usize::try_from(offset).ok().and_then(|o| config.get(o..));
    for (to, from) in data.iter_mut().zip(from.unwrap_or_default()) {
        *to = *from;
    }
}
