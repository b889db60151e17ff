//! Virtio models and the virtio-pci transport (virtio 1.2, modern devices only).
//!
//! A [`VirtioModel`] knows queues and its own configuration space; it knows no transport. A
//! [`VirtioDevice`] is a model with the registers every transport shows: features, status, queue
//! set-up. [`VirtioPci`] shows those over PCI. A model's queues are served off the vCPU by an
//! [`IoThread`].
//!
//! ```text
//!   vCPU: BAR write ─▶ VirtioPci ─▶ VirtioDevice ──start/stop──▶ VirtioModel
//!   vCPU: doorbell ═(ioeventfd)═▶ kick ─▶ IoThread: model's worker ─▶ VirtQueue ─▶ guest RAM
//!                                                        └─▶ QueueInterrupt ═(irqfd)═▶ guest
//! ```
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]

mod balloon;
mod blk;
mod console;
mod device;
mod fs;
mod iovec;
mod limit;
mod limiter;
mod mem;
mod model;
mod net;
mod pci;
mod pmem;
mod queue;
mod rng;
mod signal;
mod timer;
mod vhost_user;
mod vsock;
mod worker;

pub use balloon::{Balloon, BalloonLink, BalloonOptions};
pub use blk::{
    BackingError, Blk, Disk, DiskEngine, DiskError, DiskOptions, ResizeError, check_disk_kind,
    lock_file,
};
pub use console::{Console, PortHandle, PortSink};
pub use device::{DeviceError, Status, Transition, VirtioDevice};
pub use fs::{Caching, Export, ExportError, Fs, FsOptions, Mender};
pub use limit::{RateLimit, TokenBucket};
pub use limiter::Limits;
pub use mem::{Mem, MemChange, MemLevels, MemLink, MemRegion};
pub use model::{
    ActivateError, Activated, ActiveQueue, KICKED, Queues, SavedState, Shape, SharedMemory,
    VirtioModel, features,
};
pub use net::{
    Net, NetPort, PortSettings, VhostError, VhostMemory, VhostNet, Way, Wire, WireError, attach_tap,
};
pub use pci::{VirtioPci, VirtioPciError, Wiring};
pub use pmem::{Pmem, PmemRegion};
pub use queue::{
    Buffer, Chain, ChainError, CheckedQueue, DeviceCounters, MalformedChain, QueueCounters,
    QueueFault, QueueRegisters, QueueSetupError, RingAreas, Round, VirtQueue,
};
pub use rng::{Entropy, Rng};
pub use signal::{DeviceEvents, Interrupts, QueueInterrupt};
pub use vhost_user::{
    Backend, Malformed, PeerError, VhostUser, VhostUserError, VhostUserKind, VhostUserOptions,
};
pub use vsock::{Vsock, VsockBackend, VsockError, VsockHost};
pub use worker::{AttachError, Attachment, DetachError, IoHandle, IoThread, SpawnError};

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod driver;
