//! The worker that flushes: owns the queue and the file between start and stop.

use std::ops::ControlFlow;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use testudo_memory::{RamHandle, RamView};
use vm_memory::GuestAddressSpace;

use super::Backing;
use crate::model::ActiveQueue;
use crate::queue::{Chain, QueueFault};
use crate::signal::DeviceEvents;

/// The one type of request (virtio 1.2 §5.19.6).
const FLUSH: u32 = 0;
/// Bytes of the response.
const RESPONSE: u32 = 4;

/// What a request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Done,
    Failed,
}

impl Answer {
    fn bytes(self) -> [u8; 4] {
        match self {
            Self::Done => 0_i32.to_le_bytes(),
            Self::Failed => (-1_i32).to_le_bytes(),
        }
    }
}

pub(super) struct Worker {
    backing: Backing,
    queue: ActiveQueue,
    ram: RamHandle,
    device: DeviceEvents,
}

impl Worker {
    pub(super) fn new(
        backing: Backing,
        queue: ActiveQueue,
        ram: RamHandle,
        device: DeviceEvents,
    ) -> Self {
        Self {
            backing,
            queue,
            ram,
            device,
        }
    }

    pub(super) fn into_parts(self) -> (Backing, ActiveQueue) {
        (self.backing, self.queue)
    }

    /// Takes what is there, flushes once if anybody asked for it, and answers all.
    fn pass(&mut self) -> Result<(), QueueFault> {
        let view = self.ram.memory();
        let ram: &RamView = &view;
        let mut taken: Vec<(Chain, bool)> = Vec::new();
        self.queue.queue.drain(ram, |_, chain| {
            let flush = is_flush(&chain, ram);
            taken.push((chain, flush));
            Ok(ControlFlow::Continue(()))
        })?;
        let flushed = if taken.iter().any(|(_, flush)| *flush) {
            self.backing.flush()
        } else {
            Answer::Done
        };
        let queue = &mut self.queue.queue;
        for (chain, flush) in taken {
            let answer = if flush { flushed } else { Answer::Failed };
            if answer == Answer::Failed {
                queue.count_error();
            }
            let room = chain.writable_len() >= RESPONSE;
            let written = room && chain.write(ram, 0, &answer.bytes()).is_ok();
            queue.push(ram, chain, if written { RESPONSE } else { 0 })?;
        }
        queue.notify(ram)
    }
}

fn is_flush(chain: &Chain, ram: &RamView) -> bool {
    let mut kind = [0xff; 4];
    matches!(chain.read(ram, 0, &mut kind), Ok(4)) && u32::from_le_bytes(kind) == FLUSH
}

impl Backing {
    fn flush(&mut self) -> Answer {
        let Some(file) = &self.file else {
            return Answer::Done;
        };
        // The guest's stores are in the page cache: the mapping is a shared one of the file.
        match rustix::fs::fdatasync(file) {
            Ok(()) => Answer::Done,
            Err(e) => {
                if !std::mem::replace(&mut self.failed, true) {
                    log::warn!("virtio-pmem: the file cannot be flushed: {e}");
                }
                Answer::Failed
            }
        }
    }
}

impl MutEventSubscriber for Worker {
    fn process(&mut self, _events: Events, ops: &mut EventOps<'_>) {
        let _ = self.queue.kick.read();
        if let Err(e) = self.pass() {
            self.device.needs_reset(&e);
            let _ = ops.remove(Events::new(&*self.queue.kick, EventSet::IN));
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(e) = ops.add(Events::new(&*self.queue.kick, EventSet::IN)) {
            self.device.needs_reset(&e);
        }
    }
}
