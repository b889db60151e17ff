//! virtio-mem (virtio 1.2 §5.15): memory that comes and goes in blocks, as host and guest agree.
//!
//! ```text
//!   host: requested size ─▶ configuration change ─▶ guest: PLUG or UNPLUG some blocks
//!         ▲                                            │ checked against the block map
//!         │ ctl resize-memory                          ▼
//!   owner of guest RAM ◀── one change at a time ── worker ──answer──▶ guest
//! ```
//! The model never touches guest RAM's account: it asks whoever owns that, by a call that only says
//! that there is something to ask, and answers the guest when the answer is there. Neither a vCPU
//! nor the I/O thread waits meanwhile. A stop takes a question back that nobody has begun to answer;
//! it waits for one in hand.
//!
//! Which blocks are plugged survives a reset of the device, as it must (§5.15.6.2); a guest that
//! boots again gets a new model, with nothing plugged.

mod blocks;
mod link;
mod request;
mod worker;

use crate::model::{ActivateError, Activated, Queues, SavedState, Shape, VirtioModel};
use crate::worker::{Attachment, IoHandle};
use blocks::Blocks;
pub use link::{MemChange, MemLevels, MemLink, MemRegion};
use worker::Worker;

const DEVICE_TYPE: u16 = 24;
const QUEUE_SIZE: u16 = 64;
const CONFIG_LEN: u32 = 56;
/// Unplugged memory may not be accessed, not even read (§5.15.3).
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// The model.
pub struct Mem {
    link: MemLink,
    io: IoHandle,
    state: State,
}

enum State {
    Idle(Blocks),
    Running(Attachment<Worker>),
    /// The thread the worker was in is gone, and the account of blocks with it.
    Lost,
}

impl Mem {
    /// The device at one end of `link`, with nothing plugged, served in `io`'s thread.
    pub fn new(link: MemLink, io: IoHandle) -> Self {
        let region = link.region();
        Self {
            state: State::Idle(Blocks::new(region.size, region.block)),
            link,
            io,
        }
    }

    fn config(&self) -> Vec<u8> {
        let MemRegion {
            start, size, block, ..
        } = self.link.region();
        let levels = self.link.levels();
        // The node, which is only valid with ACPI_PXM, and padding.
        let node = 0;
        [
            block,
            node,
            start,
            size,
            levels.usable,
            levels.plugged,
            levels.requested,
        ]
        .iter()
        .flat_map(|field| field.to_le_bytes())
        .collect()
    }
}

impl VirtioModel for Mem {
    fn shape(&self) -> Shape {
        Shape {
            name: "mem",
            device_type: DEVICE_TYPE,
            features: F_UNPLUGGED_INACCESSIBLE,
            queues: vec![QUEUE_SIZE],
            config_len: CONFIG_LEN,
            gauges: self.link.gauges(),
            ..Shape::default()
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::model::read_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// A driver that has not taken UNPLUGGED_INACCESSIBLE may read unplugged memory: it reads
    /// zeroes or, where there is no memory at all, ones.
    fn start(&mut self, mut on: Activated) -> Result<(), ActivateError> {
        let queue = on.take_queue(0)?;
        let State::Idle(blocks) = std::mem::replace(&mut self.state, State::Lost) else {
            return Err(ActivateError::Host {
                what: "the thread that served the memory device has ended",
                source: "start the VM again".into(),
            });
        };
        let worker = Worker::new(self.link.clone(), blocks, queue, on.ram, on.device);
        let attached = self.io.attach(worker).map_err(|e| ActivateError::Host {
            what: "the memory device's worker cannot be attached",
            source: Box::new(e),
        })?;
        self.state = State::Running(attached);
        Ok(())
    }

    fn stop(&mut self) -> Queues {
        match std::mem::replace(&mut self.state, State::Lost) {
            State::Running(attached) => match attached.detach() {
                Ok(worker) => {
                    let (blocks, queue) = worker.into_parts();
                    self.state = State::Idle(blocks);
                    vec![queue]
                }
                Err(e) => {
                    log::warn!("virtio-mem: {e}");
                    Vec::new()
                }
            },
            idle_or_lost => {
                self.state = idle_or_lost;
                Vec::new()
            }
        }
    }

    fn saved_state(&self) -> SavedState {
        SavedState::Unsupported
    }
}

#[cfg(test)]
mod tests;
