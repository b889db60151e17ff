//! From what a driver wrote into queue registers to rings that can be used.

use testudo_memory::RamView;
use thiserror::Error;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use crate::model::features;

/// A queue's registers as the driver left them. Nothing in them is checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueRegisters {
    /// The largest size the device takes.
    pub max_size: u16,
    /// The size the driver chose.
    pub size: u16,
    /// The interrupt vector the driver chose, in the transport's terms.
    pub vector: u16,
    /// The driver wants the queue.
    pub enabled: bool,
    /// Descriptor area, guest-physical.
    pub descriptors: u64,
    /// Driver area (available ring), guest-physical.
    pub driver: u64,
    /// Device area (used ring), guest-physical.
    pub device: u64,
}

impl QueueRegisters {
    /// No interrupt for this queue.
    pub const NO_VECTOR: u16 = 0xffff;

    /// The registers after reset.
    pub fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            vector: Self::NO_VECTOR,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
        }
    }
}

/// The driver set a queue up wrongly; the device needs a reset.
#[derive(Debug, Error)]
pub enum QueueSetupError {
    /// Not a size the queue can have.
    #[error("queue {index} cannot have {size} descriptors: a power of two up to {max}")]
    Size {
        /// The queue.
        index: u16,
        /// What the driver chose.
        size: u16,
        /// The most it may choose.
        max: u16,
    },
    /// An area is misaligned or outside guest RAM.
    #[error("queue {index}: the {area} at {address:#x} is misaligned or not in guest RAM")]
    Area {
        /// The queue.
        index: u16,
        /// Which area.
        area: &'static str,
        /// Where the driver put it.
        address: u64,
    },
}

/// A queue whose size and areas have been checked against guest RAM. There is no other way to
/// rings.
pub struct CheckedQueue(Queue);

/// Bytes of each area of a queue with `size` descriptors (virtio 1.2 §2.7), event fields included.
pub(super) fn area_lengths(size: u16) -> [usize; 3] {
    let size = usize::from(size);
    [
        size.saturating_mul(16),
        size.saturating_mul(2).saturating_add(6),
        size.saturating_mul(8).saturating_add(6),
    ]
}

impl CheckedQueue {
    /// Checks `registers` of queue `index` against `ram`.
    pub fn check(
        index: u16,
        registers: &QueueRegisters,
        negotiated: u64,
        ram: &RamView,
    ) -> Result<Self, QueueSetupError> {
        let QueueRegisters { max_size, size, .. } = *registers;
        let bad_size = QueueSetupError::Size {
            index,
            size,
            max: max_size,
        };
        let Ok(mut queue) = Queue::new(max_size) else {
            return Err(bad_size);
        };
        if queue.try_set_size(size).is_err() {
            return Err(bad_size);
        }
        let [descriptors, driver, device] = area_lengths(size);
        let bad = |area, address| QueueSetupError::Area {
            index,
            area,
            address,
        };
        let within = |area, address, len, access| {
            let at = GuestAddress(address);
            let reachable = address != 0 && ram.check_range(at, len, access);
            reachable.then_some(at).ok_or(bad(area, address))
        };
        let (area, at) = ("descriptor area", registers.descriptors);
        let table = within(area, at, descriptors, Permissions::Read)?;
        queue
            .try_set_desc_table_address(table)
            .map_err(|_| bad(area, at))?;
        let (area, at) = ("driver area", registers.driver);
        let avail = within(area, at, driver, Permissions::Read)?;
        queue
            .try_set_avail_ring_address(avail)
            .map_err(|_| bad(area, at))?;
        let (area, at) = ("device area", registers.device);
        let used = within(area, at, device, Permissions::Write)?;
        queue
            .try_set_used_ring_address(used)
            .map_err(|_| bad(area, at))?;
        queue.set_event_idx(negotiated & features::EVENT_IDX != 0);
        queue.set_ready(true);
        Ok(Self(queue))
    }

    pub(super) fn into_queue(self) -> Queue {
        self.0
    }
}
