//! virtio-blk (virtio 1.2 §5.2): a raw file or block device as a disk.
//!
//! ```text
//!   Disk (host: file, rings, limits; for the life of the process)
//!     ▲ one for each boot
//!   Blk (model) ──start──▶ a Worker in each of its threads, with a Lane and some of the queues
//!                            queue ─▶ Request (checked) ─▶ Lane ─▶ io_uring, or system calls
//! ```
//! The format is raw and never guessed. Requests may overtake each other; a flush covers what was
//! answered before it was made available (§5.2.6.2), which is what `fdatasync` covers. While the
//! driver has no write cache, every write is durable before it is answered.

mod backing;
mod config;
mod disk;
mod inline;
mod lane;
mod request;
mod ring;
mod throttle;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use backing::{BackingError, check_disk_kind, lock_file};
pub use disk::{Disk, DiskEngine, DiskError, DiskOptions, ResizeError};

use config::feature;
use disk::Switch;
use worker::Worker;

use crate::model::{ActivateError, Activated, ActiveQueue, Queues, SavedState, Shape, VirtioModel};
use crate::worker::{Attachment, IoHandle};

const DEVICE_TYPE: u16 = 2;

/// The model.
pub struct Blk {
    disk: Arc<Disk>,
    threads: Vec<IoHandle>,
    /// By number of the thread.
    workers: Vec<(usize, Attachment<Worker>)>,
    /// The configuration field `writeback`.
    cache_on: Switch,
}

impl Blk {
    /// `disk`, served by `threads`: queue N by thread N, modulo their number.
    pub fn new(disk: Arc<Disk>, threads: Vec<IoHandle>) -> Self {
        let cache_on = Arc::new(AtomicBool::new(disk.starts_writeback()));
        Self {
            disk,
            threads,
            workers: Vec::new(),
            cache_on,
        }
    }

    /// Whether writes may be answered before they are durable: a driver that cannot switch the
    /// cache has one if it knows how to flush it (§5.2.5).
    fn writeback(&self, features: u64) -> Switch {
        if features & feature::CONFIG_WCE != 0 {
            return Arc::clone(&self.cache_on);
        }
        Arc::new(AtomicBool::new(features & feature::FLUSH != 0))
    }

    fn attach(
        &mut self,
        number: usize,
        queues: Vec<ActiveQueue>,
        on: &Activated,
        writeback: &Switch,
    ) -> Result<(), ActivateError> {
        let missing = |what| ActivateError::Host {
            what,
            source: "unplug the device and plug it again".into(),
        };
        let Some(io) = self.threads.get(number) else {
            return Err(missing("the disk has no thread"));
        };
        let Some(lane) = self.disk.take_lane(number) else {
            return Err(missing("the thread that served the disk has ended"));
        };
        let worker = Worker::new(
            Arc::clone(&self.disk),
            lane,
            queues,
            on.ram.clone(),
            on.device.clone(),
            Arc::clone(writeback),
        );
        let attached = io.attach(worker).map_err(|e| ActivateError::Host {
            what: "the disk's worker cannot be attached",
            source: Box::new(e),
        })?;
        self.workers.push((number, attached));
        Ok(())
    }
}

impl VirtioModel for Blk {
    fn shape(&self) -> Shape {
        let layout = self.disk.layout();
        Shape {
            name: "blk",
            device_type: DEVICE_TYPE,
            features: layout.features(),
            queues: vec![config::QUEUE_SIZE; layout.queues.into()],
            config_len: config::LEN,
            gauges: self.disk.gauges(),
            ..Shape::default()
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let writeback = self.cache_on.load(Ordering::Acquire);
        let space = self.disk.layout().bytes(writeback);
        let from = usize::try_from(offset).ok();
        let rest = from.and_then(|from| space.get(from..)).unwrap_or_default();
        for (to, byte) in data.iter_mut().zip(rest) {
            *to = *byte;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (config::WRITEBACK, [value]) = (offset, data)
            && !self.disk.layout().readonly
        {
            // What was written before need not become durable by this (§5.2.5.1).
            self.cache_on.store(*value & 1 != 0, Ordering::Release);
        }
    }

    fn start(&mut self, mut on: Activated) -> Result<(), ActivateError> {
        if on.queues.is_empty() {
            return Err(ActivateError::QueueMissing { index: 0 });
        }
        let writeback = self.writeback(on.features);
        let kicks = on.queues.iter().map(|q| Arc::clone(&q.kick)).collect();
        self.disk.started(on.device.clone(), kicks);
        let mut by_thread: Vec<Vec<ActiveQueue>> = Vec::new();
        by_thread.resize_with(self.threads.len(), Vec::new);
        for queue in std::mem::take(&mut on.queues) {
            let number = usize::from(queue.index).checked_rem(self.threads.len());
            if let Some(queues) = number.and_then(|number| by_thread.get_mut(number)) {
                queues.push(queue);
            }
        }
        for (number, queues) in by_thread.into_iter().enumerate() {
            if !queues.is_empty() {
                self.attach(number, queues, &on, &writeback)?;
            }
        }
        Ok(())
    }

    fn stop(&mut self) -> Queues {
        self.disk.stopped();
        let mut queues = Vec::new();
        for (number, attached) in self.workers.drain(..) {
            let stopped = attached
                .with(Worker::quiesce)
                .and_then(|()| attached.detach());
            match stopped {
                Ok(worker) => {
                    let (lane, its_queues) = worker.into_parts();
                    self.disk.return_lane(number, lane);
                    queues.extend(its_queues);
                }
                Err(e) => log::warn!("virtio-blk: {e}"),
            }
        }
        queues.sort_by_key(|queue| queue.index);
        queues
    }

    fn reset(&mut self) {
        self.cache_on
            .store(self.disk.starts_writeback(), Ordering::Release);
    }

    fn saved_state(&self) -> SavedState {
        SavedState::QueuesOnly
    }
}

#[cfg(test)]
mod tests;
