//! A thread's share of the queues: owns them between start and stop.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use testudo_memory::{RamHandle, RamView};
use vm_memory::GuestAddressSpace;

use super::forgets::Forgets;
use super::host;
use super::server::{Desk, Server};
use crate::model::{ActiveQueue, KICKED};
use crate::queue::QueueFault;
use crate::signal::DeviceEvents;
use crate::timer::Timer;

/// The queue that is called hiprio: FORGETs come by it.
const FORGETS: u16 = 0;
/// What events of timers are told by, that of FORGETs and that of mapped files; a place of a queue is less.
const TIMER: u32 = u32::MAX;
const LOOK: u32 = u32::MAX - 1;
/// Requests served per kick before the thread looks at its other queues.
const BUDGET: u32 = 256;
/// The driver is told of answers after this long even if there are more requests.
const PATIENCE: Duration = Duration::from_micros(100);

pub(super) struct Worker {
    server: Arc<Server>,
    desk: Desk,
    queues: Vec<ActiveQueue>,
    /// Where the queue of FORGETs is this thread's.
    forgets: Option<Forgets>,
    ram: RamHandle,
    device: DeviceEvents,
}

impl Worker {
    pub(super) fn new(
        server: Arc<Server>,
        queues: Vec<ActiveQueue>,
        timer: Arc<Timer>,
        ram: RamHandle,
        device: DeviceEvents,
    ) -> Self {
        let forgets = queues.iter().any(|q| q.index == FORGETS);
        Self {
            server,
            desk: Desk::new(),
            queues,
            forgets: forgets.then(|| Forgets::new(timer)),
            ram,
            device,
        }
    }

    pub(super) fn into_queues(self) -> Vec<ActiveQueue> {
        self.queues
    }

    /// Serves a queue; `true` if there is more in it.
    fn pass(&mut self, at: usize) -> Result<bool, QueueFault> {
        let view = self.ram.memory();
        let ram: &RamView = &view;
        let Self {
            server,
            desk,
            queues,
            ..
        } = self;
        let Some(queue) = queues.get_mut(at) else {
            return Ok(false);
        };
        let identity = match host::prepare_thread() {
            Ok(identity) => identity,
            Err(e) => {
                self.device.needs_reset(&e);
                return Ok(false);
            }
        };
        let mut budget = BUDGET;
        let mut told = Instant::now();
        queue.queue.drain(ram, |queue, chain| {
            let served = server.serve(desk, &identity, ram, &chain);
            if served.failed {
                queue.count_error();
            }
            queue.push(ram, chain, served.written)?;
            let now = Instant::now();
            if now.saturating_duration_since(told) >= PATIENCE {
                queue.notify(ram)?;
                told = now;
            }
            budget = budget.saturating_sub(1);
            Ok(if budget == 0 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            })
        })?;
        queue.queue.notify(ram)?;
        Ok(budget == 0)
    }

    /// If that is the queue of FORGETs, decides when it is looked at next.
    fn look_later(&mut self, at: usize) -> Result<bool, QueueFault> {
        let queue = self.queues.get_mut(at).filter(|q| q.index == FORGETS);
        let (Some(forgets), Some(queue)) = (&mut self.forgets, queue) else {
            return Ok(false);
        };
        let view = self.ram.memory();
        forgets.served(&mut queue.queue, &view)
    }
}

impl MutEventSubscriber for Worker {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.data() == LOOK {
            self.server.look();
            return;
        }
        let expired = events.data() == TIMER;
        if expired && let Some(forgets) = &mut self.forgets {
            forgets.expired();
        }
        let at = match usize::try_from(events.data()) {
            Ok(at) if !expired => Some(at),
            _ => self.queues.iter().position(|q| q.index == FORGETS),
        };
        let Some(at) = at else {
            return;
        };
        let done = self.pass(at).and_then(|more| {
            if more {
                return Ok(true);
            }
            self.look_later(at)
        });
        let Some(queue) = self.queues.get(at) else {
            return;
        };
        match done {
            Ok(false) => {}
            Ok(true) => {
                if let Err(e) = queue.kick.write(1) {
                    log::debug!("virtio-fs: kick of its own: {e}");
                }
            }
            Err(e) => {
                self.device.needs_reset(&e);
                let _ = ops.remove(Events::new(&*queue.kick, KICKED));
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(e) = host::prepare_thread() {
            self.device.needs_reset(&e);
            return;
        }
        // One of the workers watches mapped files.
        if let (Some(_), Some(timer)) = (&self.forgets, &self.server.look)
            && let Err(e) = ops.add(Events::with_data(timer, LOOK, EventSet::IN))
        {
            self.device.needs_reset(&e);
        }
        if let Some(forgets) = &self.forgets
            && let Err(e) = ops.add(Events::with_data(&*forgets.timer, TIMER, EventSet::IN))
        {
            self.device.needs_reset(&e);
        }
        for (at, queue) in (0..).zip(&self.queues) {
            let added = ops.add(Events::with_data(&*queue.kick, at, KICKED));
            if let Err(e) = added {
                self.device.needs_reset(&e);
            }
        }
    }
}

/// Forgets a session in the thread that served it, whose system call filter allows for that.
pub(super) struct Farewell(pub(super) Arc<Server>);

impl MutEventSubscriber for Farewell {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {}

    fn init(&mut self, _ops: &mut EventOps<'_>) {
        self.0.forget_session();
    }
}
