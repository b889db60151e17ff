//! virtio-pmem (virtio 1.2 §5.19): host memory that the guest reaches as it reaches RAM, and one
//! queue by which it asks that what it wrote there be on the disk.
//!
//! The memory itself is the VMM's affair: it is shown to the guest for as long as the model lives,
//! and no access to it comes here. A request is answered when the host has flushed the file; those
//! that came together share one flush. A device that is read-only has nothing to flush.

mod worker;

use std::fs::File;

use testudo_memory::WindowGuard;

use crate::model::{ActivateError, Activated, Queues, SavedState, Shape, VirtioModel};
use crate::worker::{Attachment, IoHandle};
use worker::Worker;

const DEVICE_TYPE: u16 = 27;
const QUEUE_SIZE: u16 = 64;
const CONFIG_LEN: u32 = 16;

/// Where the guest finds the memory.
pub struct PmemRegion {
    /// First guest-physical address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// Keeps the memory in place.
    pub shown: Box<dyn WindowGuard>,
}

/// The model.
pub struct Pmem {
    region: PmemRegion,
    io: IoHandle,
    state: State,
}

enum State {
    Idle(Backing),
    Running(Attachment<Worker>),
    /// The thread the worker was in is gone, and the file with it.
    Lost,
}

/// What survives from one activation to the next.
struct Backing {
    /// What is flushed, unless it is read-only.
    file: Option<File>,
    /// A failure to flush has been reported; a guest can bring about many.
    failed: bool,
}

impl Pmem {
    /// A device over `region` whose requests are served in `io`'s thread by flushing `file`; a
    /// flush may take long, so the thread should serve nothing else. Without a file the memory is
    /// read-only.
    pub fn new(region: PmemRegion, file: Option<File>, io: IoHandle) -> Self {
        Self {
            region,
            io,
            state: State::Idle(Backing {
                file,
                failed: false,
            }),
        }
    }

    fn config(&self) -> [u8; CONFIG_LEN as usize] {
        let mut config = [0; CONFIG_LEN as usize];
        let (start, size) = config.split_at_mut(8);
        start.copy_from_slice(&self.region.start.to_le_bytes());
        size.copy_from_slice(&self.region.size.to_le_bytes());
        config
    }
}

impl VirtioModel for Pmem {
    fn shape(&self) -> Shape {
        Shape {
            name: "pmem",
            device_type: DEVICE_TYPE,
            queues: vec![QUEUE_SIZE],
            config_len: CONFIG_LEN,
            ..Shape::default()
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::model::read_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn start(&mut self, mut on: Activated) -> Result<(), ActivateError> {
        let queue = on.take_queue(0)?;
        let State::Idle(backing) = std::mem::replace(&mut self.state, State::Lost) else {
            return Err(ActivateError::Host {
                what: "the thread that flushed the file has ended",
                source: "unplug the device and plug it again".into(),
            });
        };
        let worker = Worker::new(backing, queue, on.ram, on.device);
        let attached = self.io.attach(worker).map_err(|e| ActivateError::Host {
            what: "the worker that flushes cannot be attached",
            source: Box::new(e),
        })?;
        self.state = State::Running(attached);
        Ok(())
    }

    fn stop(&mut self) -> Queues {
        match std::mem::replace(&mut self.state, State::Lost) {
            State::Running(attached) => match attached.detach() {
                Ok(worker) => {
                    let (backing, queue) = worker.into_parts();
                    self.state = State::Idle(backing);
                    vec![queue]
                }
                Err(e) => {
                    log::warn!("virtio-pmem: {e}");
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
        SavedState::QueuesOnly
    }
}

#[cfg(test)]
mod tests;
