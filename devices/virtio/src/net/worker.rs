//! One queue pair at work in its thread: frames both ways, and for the first pair the commands.
//!
//! What a queue waits for is what the loop listens to: the wire while frames can be delivered, its
//! room while one could not be sent, a timer while the rate limit says so, the kicks always. A wire
//! nobody waits for is not listened to, so nothing spins.

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use testudo_memory::RamHandle;
use vm_memory::GuestAddressSpace;

use super::control::Control;
use super::rx::{End, Rx};
use super::shared::{Begin, Lane, Shared};
use super::tx::Tx;
use crate::model::{ActiveQueue, KICKED};
use crate::queue::QueueFault;
use crate::signal::DeviceEvents;
use crate::timer::Timer;

const RX_KICK: u32 = 0;
const TX_KICK: u32 = 1;
const WIRE: u32 = 2;
const WAKE: u32 = 3;
const RX_TIMER: u32 = 4;
const TX_TIMER: u32 = 5;
const CONTROL: u32 = 6;

pub(super) struct Worker {
    lane: Arc<Lane>,
    shared: Arc<Shared>,
    rx: Rx,
    tx: Tx,
    control: Option<Control>,
    /// Frames from the wire are wanted.
    rx_wants: bool,
    /// Room on the wire is wanted.
    tx_wants: bool,
    /// What the loop listens to on the wire.
    listening: EventSet,
    begin: Begin,
    ram: RamHandle,
    device: DeviceEvents,
    /// How the start went.
    started: io::Result<()>,
    failed: bool,
}

impl Worker {
    #[expect(
        clippy::too_many_arguments,
        reason = "all of it is what one pair is made of"
    )]
    pub(super) fn new(
        lane: Arc<Lane>,
        shared: Arc<Shared>,
        rx: Rx,
        tx: Tx,
        control: Option<Control>,
        begin: Begin,
        ram: RamHandle,
        device: DeviceEvents,
    ) -> Self {
        Self {
            lane,
            shared,
            rx,
            tx,
            control,
            rx_wants: false,
            tx_wants: false,
            listening: EventSet::empty(),
            begin,
            ram,
            device,
            started: Ok(()),
            failed: false,
        }
    }

    /// How the start went; asked once.
    pub(super) fn started(&mut self) -> io::Result<()> {
        std::mem::replace(&mut self.started, Ok(()))
    }

    /// The queues, with nothing in stock.
    pub(super) fn into_queues(self) -> Vec<ActiveQueue> {
        let control = self.control.map(|control| control.queue);
        let pair = [self.rx.into_queue(), self.tx.queue];
        pair.into_iter().chain(control).collect()
    }

    fn receive(&mut self) -> Result<(), QueueFault> {
        if !self.lane.enabled() {
            self.rx_wants = false;
            return Ok(());
        }
        let ram = self.ram.memory();
        let end = self.rx.pass(&ram, &self.lane.wire, &self.shared)?;
        self.rx_wants = matches!(end, End::Idle | End::Yield);
        match end {
            End::Yield => again(&self.rx.queue),
            End::Throttled(wait) => set(&self.lane.rx_timer, wait),
            End::Idle | End::Starved | End::Blocked | End::Gone => {}
        }
        Ok(())
    }

    fn transmit(&mut self) -> Result<(), QueueFault> {
        let ram = self.ram.memory();
        let end = self.tx.pass(&ram, &self.lane.wire, &self.shared)?;
        self.tx_wants = end == End::Blocked;
        match end {
            End::Yield => again(&self.tx.queue),
            End::Throttled(wait) => set(&self.lane.tx_timer, wait),
            End::Idle | End::Starved | End::Blocked | End::Gone => {}
        }
        Ok(())
    }

    fn command(&mut self) -> Result<(), QueueFault> {
        let Some(control) = &mut self.control else {
            return Ok(());
        };
        let _ = control.queue.kick.read();
        let ram = self.ram.memory();
        control.serve(&ram)
    }

    /// One event.
    fn handle(&mut self, events: Events) -> Result<(), QueueFault> {
        match events.data() {
            RX_KICK => self.receive(),
            TX_KICK => self.transmit(),
            RX_TIMER => {
                self.lane.rx_timer.take();
                self.receive()
            }
            TX_TIMER => {
                self.lane.tx_timer.take();
                self.transmit()
            }
            WAKE => {
                let _ = self.lane.wake.read();
                self.receive()?;
                self.transmit()
            }
            CONTROL => self.command(),
            WIRE => self.wire(events.event_set()),
            _ => Ok(()),
        }
    }

    fn wire(&mut self, ready: EventSet) -> Result<(), QueueFault> {
        let broken = ready.intersects(EventSet::ERROR | EventSet::HANG_UP);
        if ready.contains(EventSet::IN) || broken {
            self.receive()?;
        }
        if ready.contains(EventSet::OUT) || broken {
            self.transmit()?;
        }
        if broken {
            // It would be reported for ever. A kick or a change of the pair tries again.
            self.rx_wants = false;
            self.tx_wants = false;
        }
        Ok(())
    }

    /// Makes the loop listen to the wire as far as somebody waits for it.
    fn listen(&mut self, ops: &mut EventOps<'_>) {
        let mut wanted = EventSet::empty();
        wanted.set(EventSet::IN, self.rx_wants);
        wanted.set(EventSet::OUT, self.tx_wants);
        if wanted == self.listening {
            return;
        }
        let events = Events::with_data(&self.lane.wire, WIRE, wanted);
        let done = if self.listening.is_empty() {
            ops.add(events)
        } else if wanted.is_empty() {
            ops.remove(events)
        } else {
            ops.modify(events)
        };
        match done {
            Ok(()) => self.listening = wanted,
            Err(e) => self.fail(&e, ops),
        }
    }

    /// Nothing of the pair can be served any more.
    fn fail(&mut self, error: &dyn std::error::Error, ops: &mut EventOps<'_>) {
        self.device.needs_reset(error);
        if std::mem::replace(&mut self.failed, true) {
            return;
        }
        let _ = ops.remove(Events::new(&*self.rx.queue.kick, EventSet::IN));
        let _ = ops.remove(Events::new(&*self.tx.queue.kick, EventSet::IN));
        if let Some(control) = &self.control {
            let _ = ops.remove(Events::new(&*control.queue.kick, EventSet::IN));
        }
        let _ = ops.remove(Events::new(&self.lane.wake, EventSet::IN));
        let _ = ops.remove(Events::new(&self.lane.rx_timer, EventSet::IN));
        let _ = ops.remove(Events::new(&self.lane.tx_timer, EventSet::IN));
        if !self.listening.is_empty() {
            let _ = ops.remove(Events::new(&self.lane.wire, self.listening));
        }
    }

    fn register(&self, ops: &mut EventOps<'_>) -> Result<(), event_manager::Error> {
        let on = EventSet::IN;
        ops.add(Events::with_data(&*self.rx.queue.kick, RX_KICK, KICKED))?;
        ops.add(Events::with_data(&*self.tx.queue.kick, TX_KICK, KICKED))?;
        ops.add(Events::with_data(&self.lane.wake, WAKE, on))?;
        ops.add(Events::with_data(&self.lane.rx_timer, RX_TIMER, on))?;
        ops.add(Events::with_data(&self.lane.tx_timer, TX_TIMER, on))?;
        match &self.control {
            Some(control) => ops.add(Events::with_data(&*control.queue.kick, CONTROL, on)),
            None => Ok(()),
        }
    }
}

/// Makes the queue's kick an event of the loop once more.
fn again(queue: &ActiveQueue) {
    // Full is signalled already.
    let _ = queue.kick.write(1);
}

fn set(timer: &Timer, wait: std::time::Duration) {
    if let Err(e) = timer.set(wait) {
        log::error!("virtio-net: timer of a rate limit: {e}");
    }
}

impl MutEventSubscriber for Worker {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if self.failed {
            return;
        }
        match self.handle(events) {
            Ok(()) => self.listen(ops),
            Err(e) => self.fail(&e, ops),
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.started = self.begin.carry_out(&self.shared);
        if let Err(e) = self.register(ops) {
            self.device.needs_reset(&e);
            return;
        }
        // What is in the queues already brings no kick.
        again(&self.rx.queue);
        again(&self.tx.queue);
        if let Some(control) = &self.control {
            again(&control.queue);
        }
    }
}
