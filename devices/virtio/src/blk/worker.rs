//! The worker of one thread of a disk: owns some of its queues between start and stop.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use testudo_memory::{RamHandle, RamView};
use vm_memory::GuestAddressSpace;

use super::disk::{Disk, Switch};
use super::lane::Lane;
use super::request::Request;
use crate::model::{ActiveQueue, KICKED};
use crate::queue::QueueFault;
use crate::signal::DeviceEvents;

const TIMER: u32 = u32::MAX;
const RING: u32 = u32::MAX - 1;
// Below these: the queue at that place has been kicked.

/// What ended a pass over a queue.
enum Pass {
    /// Nothing is left; the driver kicks when there is more.
    Idle,
    /// There is more; others first.
    Yield,
    /// A limit holds it up for so long.
    Throttled(Duration),
}

pub(super) struct Worker {
    disk: Arc<Disk>,
    lane: Lane,
    queues: Vec<ActiveQueue>,
    ram: RamHandle,
    device: DeviceEvents,
    /// The driver has a write cache and flushes it; writes need not be durable by themselves.
    writeback: Switch,
    /// The driver broke a ring: nothing is served until it resets the device.
    broken: bool,
}

impl Worker {
    pub(super) fn new(
        disk: Arc<Disk>,
        lane: Lane,
        queues: Vec<ActiveQueue>,
        ram: RamHandle,
        device: DeviceEvents,
        writeback: Switch,
    ) -> Self {
        Self {
            disk,
            lane,
            queues,
            ram,
            device,
            writeback,
            broken: false,
        }
    }

    pub(super) fn into_parts(self) -> (Lane, Vec<ActiveQueue>) {
        (self.lane, self.queues)
    }

    /// Waits until nothing is under way.
    pub(super) fn quiesce(&mut self) {
        let view = self.ram.memory();
        let durable = self.durable();
        let done = self
            .lane
            .quiesce(&self.disk, &mut self.queues, &view, durable);
        if let Err(e) = done {
            self.device.needs_reset(&e);
        }
    }

    fn durable(&self) -> bool {
        !self.writeback.load(Ordering::Acquire)
    }

    /// Serves the queue at place `number`.
    fn serve(&mut self, number: usize, ram: &RamView) -> Result<(), QueueFault> {
        let ended = self.pass(number, ram)?;
        match ended {
            Pass::Idle => {}
            Pass::Yield => {
                if let Some(queue) = self.queues.get(number)
                    && let Err(e) = queue.kick.write(1)
                {
                    log::debug!("virtio-blk: kick of its own: {e}");
                }
            }
            Pass::Throttled(wait) => {
                if let Err(e) = self.lane.timer.set(wait) {
                    log::error!("virtio-blk: timer of a limit: {e}");
                }
            }
        }
        Ok(())
    }

    fn pass(&mut self, number: usize, ram: &RamView) -> Result<Pass, QueueFault> {
        let durable = self.durable();
        let Some(mut budget) = self.queues.get(number).map(|q| q.queue.size()) else {
            return Ok(Pass::Idle);
        };
        loop {
            let ended = self.take(number, ram, durable, &mut budget)?;
            // Kicks stay off until what was taken is on its way and what is done is answered.
            self.lane
                .settle(&self.disk, &mut self.queues, ram, durable)?;
            if let Some(ended) = ended {
                return Ok(ended);
            }
            let Some(queue) = self.queues.get_mut(number) else {
                return Ok(Pass::Idle);
            };
            if !queue.queue.resume_kicks(ram)? {
                return Ok(Pass::Idle);
            }
        }
    }

    /// Begins what the queue holds.
    fn take(
        &mut self,
        number: usize,
        ram: &RamView,
        durable: bool,
        budget: &mut u16,
    ) -> Result<Option<Pass>, QueueFault> {
        let Some(ActiveQueue { queue, .. }) = self.queues.get_mut(number) else {
            return Ok(Some(Pass::Idle));
        };
        queue.pause_kicks(ram)?;
        while let Some(chain) = queue.pop(ram)? {
            match Request::parse(&chain, ram, self.disk.bounds()) {
                Err(refusal) => self.lane.refuse(queue, ram, chain, refusal)?,
                Ok(request) => {
                    if let Err(wait) = self.disk.throttle.admit(request.cost()) {
                        queue.undo_pop(chain);
                        return Ok(Some(Pass::Throttled(wait)));
                    }
                    self.lane
                        .begin(&self.disk, (number, queue), ram, chain, request, durable)?;
                }
            }
            *budget = budget.saturating_sub(1);
            if *budget == 0 {
                return Ok(Some(Pass::Yield));
            }
        }
        Ok(None)
    }

    fn serve_all(&mut self, ram: &RamView) -> Result<(), QueueFault> {
        (0..self.queues.len()).try_for_each(|number| self.serve(number, ram))
    }

    fn work(&mut self, what: u32, ram: &RamView) -> Result<(), QueueFault> {
        match what {
            TIMER => {
                self.lane.timer.take();
                self.serve_all(ram)
            }
            RING => {
                let durable = self.durable();
                self.lane.settle(&self.disk, &mut self.queues, ram, durable)
            }
            number => {
                let number = usize::try_from(number).unwrap_or(usize::MAX);
                self.serve(number, ram)
            }
        }
    }

    fn interests(&self) -> Vec<(RawFd, u32)> {
        let kicks = (0..).zip(&self.queues);
        let mut all: Vec<_> = kicks.map(|(n, q)| (q.kick.as_raw_fd(), n)).collect();
        all.push((self.lane.timer.as_raw_fd(), TIMER));
        all.extend(self.lane.ring.as_ref().map(|r| (r.as_raw_fd(), RING)));
        all
    }

    /// The driver broke a ring. What is under way is still waited for, by `quiesce`.
    fn give_up(&mut self, fault: &QueueFault, ops: &mut EventOps<'_>) {
        self.device.needs_reset(fault);
        self.broken = true;
        for (fd, data) in self.interests() {
            let _ = ops.remove(Events::with_data_raw(fd, data, EventSet::IN));
        }
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for (fd, data) in self.interests() {
            let how = if data < RING { KICKED } else { EventSet::IN };
            if let Err(e) = ops.add(Events::with_data_raw(fd, data, how)) {
                self.device
                    .needs_reset(&std::io::Error::other(format!("event loop: {e}")));
            }
        }
        // What came while nobody served brings no kick.
        let view = self.ram.memory();
        if let Err(fault) = self.serve_all(&view) {
            self.give_up(&fault, ops);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if self.broken {
            return;
        }
        let view = self.ram.memory();
        if let Err(fault) = self.work(events.data(), &view) {
            self.give_up(&fault, ops);
        }
    }
}
