//! Serves the ports in the I/O thread, between start and stop.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use testudo_memory::{RamHandle, RamView};
use vm_memory::GuestAddressSpace;

use super::control::{DEVICE_READY, LEN, Message, PORT_OPEN, PORT_READY, Told};
use super::port::{PortHandle, Size, Wake};
use super::{F_MULTIPORT, PortSink};
use crate::model::{ActivateError, Activated, ActiveQueue, Queues};
use crate::queue::{QueueFault, VirtQueue};
use crate::signal::DeviceEvents;

const WAKE: u32 = u32::MAX;
/// Bytes copied at a time.
const PIECE: usize = 4096;
/// Chains of a port that are served before others have their turn.
const BUDGET: u32 = 64;

const CONTROL_RX: u16 = 2;
const CONTROL_TX: u16 = 3;

/// A port with what outlives a pause.
pub(super) struct Port {
    id: u16,
    name: Option<String>,
    handle: PortHandle,
    /// Bytes of the first chain in the TX queue that are with the host already.
    skip: u32,
    told: Told,
    wake: Wake,
}

impl Port {
    pub(super) fn new(
        id: u16,
        name: Option<String>,
        sink: PortSink,
        wake: &Wake,
        size: &Size,
    ) -> io::Result<(Self, PortHandle)> {
        let handle = PortHandle::new(sink, wake, size)?;
        let port = Self {
            id,
            name,
            handle: handle.clone(),
            skip: 0,
            told: Told::default(),
            wake: Arc::clone(wake),
        };
        Ok((port, handle))
    }

    /// The driver is gone.
    pub(super) fn reset(&mut self) {
        self.skip = 0;
        self.told = Told::default();
        self.handle.reset();
    }

    /// The numbers of its queues.
    fn queues(&self) -> (u16, u16) {
        match self.id {
            0 => (0, 1),
            id => {
                let rx = id.saturating_add(1).saturating_mul(2);
                (rx, rx.saturating_add(1))
            }
        }
    }

    /// The guest takes input.
    fn listens(&self) -> bool {
        self.name.is_none() || self.told.guest_open
    }

    /// Output; `true` if there may be more.
    fn serve_tx(&mut self, tx: &mut VirtQueue, ram: &RamView) -> Result<bool, QueueFault> {
        let mut left = BUDGET;
        let mut held = false;
        let mut piece = [0; PIECE];
        tx.drain(ram, |tx, chain| {
            loop {
                // Guest RAM that was taken away has nothing to say.
                let got = chain.read(ram, self.skip, &mut piece).unwrap_or(0);
                if got == 0 {
                    break;
                }
                let put = self.handle.put(piece.get(..got).unwrap_or_default());
                self.skip = self.skip.saturating_add(u32::try_from(put).unwrap_or(0));
                if put < got {
                    held = true;
                    tx.undo_pop(chain);
                    return Ok(ControlFlow::Break(()));
                }
            }
            self.skip = 0;
            tx.push(ram, chain, 0)?;
            left = left.saturating_sub(1);
            Ok(if left == 0 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            })
        })?;
        tx.notify(ram)?;
        self.handle.hold(held || left == 0);
        Ok(left == 0)
    }

    /// Input.
    fn serve_rx(&mut self, rx: &mut VirtQueue, ram: &RamView) -> Result<(), QueueFault> {
        let mut useless = 0_u16;
        rx.pause_kicks(ram)?;
        while self.listens() && self.handle.has_input() {
            let Some(chain) = rx.pop(ram)? else {
                if rx.resume_kicks(ram)? {
                    continue;
                }
                break;
            };
            let room = usize::try_from(chain.writable_len()).unwrap_or(0);
            let input = self.handle.take_input(room.min(PIECE));
            let written = chain.write(ram, 0, &input).unwrap_or(0);
            if written == 0 {
                // A driver may offer such without end.
                if useless >= rx.size() {
                    return Err(QueueFault::Malformed { count: useless });
                }
                useless = useless.saturating_add(1);
                rx.count_error();
            }
            rx.push(ram, chain, u32::try_from(written).unwrap_or(0))?;
        }
        rx.notify(ram)
    }
}

pub(super) struct Worker {
    ports: Vec<Port>,
    queues: Queues,
    size: Size,
    multiport: bool,
    ram: RamHandle,
    device: DeviceEvents,
    wake: Wake,
    broken: bool,
}

fn queue(queues: &mut Queues, index: u16) -> Option<&mut VirtQueue> {
    let found = queues.iter_mut().find(|q| q.index == index);
    found.map(|q| &mut q.queue)
}

impl Worker {
    pub(super) fn new(
        ports: Vec<Port>,
        size: Size,
        on: Activated,
    ) -> Result<Self, (Vec<Port>, ActivateError)> {
        let Some(wake) = ports.first().map(|port| Arc::clone(&port.wake)) else {
            let error = ActivateError::QueueMissing { index: 0 };
            return Err((ports, error));
        };
        Ok(Self {
            ports,
            queues: on.queues,
            size,
            multiport: on.features & F_MULTIPORT != 0,
            ram: on.ram,
            device: on.device,
            wake,
            broken: false,
        })
    }

    pub(super) fn into_parts(self) -> (Vec<Port>, Queues) {
        (self.ports, self.queues)
    }

    fn pass(&mut self) -> Result<(), QueueFault> {
        let view = self.ram.memory();
        let ram: &RamView = &view;
        if self.size.take_news() {
            self.device.config_changed();
        }
        if self.multiport {
            self.control(ram)?;
        }
        let mut more = false;
        for port in &mut self.ports {
            if port.name.is_some() && !self.multiport {
                continue;
            }
            let (rx, tx) = port.queues();
            if let Some(tx) = queue(&mut self.queues, tx) {
                more |= port.serve_tx(tx, ram)?;
            }
            if let Some(rx) = queue(&mut self.queues, rx) {
                port.serve_rx(rx, ram)?;
            }
        }
        if more {
            let _ = self.wake.write(1);
        }
        Ok(())
    }

    fn control(&mut self, ram: &RamView) -> Result<(), QueueFault> {
        let Self {
            ports,
            queues,
            wake,
            ..
        } = self;
        if let Some(tx) = queue(queues, CONTROL_TX) {
            let mut left = BUDGET;
            tx.drain(ram, |tx, chain| {
                let mut bytes = [0; LEN];
                if matches!(chain.read(ram, 0, &mut bytes), Ok(LEN)) {
                    hear(ports, Message::from_bytes(bytes));
                } else {
                    tx.count_error();
                }
                tx.push(ram, chain, 0)?;
                left = left.saturating_sub(1);
                Ok(if left == 0 {
                    let _ = wake.write(1);
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                })
            })?;
            tx.notify(ram)?;
        }
        let Some(rx) = queue(queues, CONTROL_RX) else {
            return Ok(());
        };
        rx.pause_kicks(ram)?;
        for port in ports {
            loop {
                let connected = port.handle.connected();
                let name = port.name.as_deref().unwrap_or_default();
                let Some(message) = port.told.due(port.id.into(), name, connected) else {
                    break;
                };
                let Some(chain) = rx.pop(ram)? else {
                    if rx.resume_kicks(ram)? {
                        continue;
                    }
                    return rx.notify(ram);
                };
                let written = chain.write(ram, 0, &message).unwrap_or(0);
                if written < message.len() {
                    rx.count_error();
                }
                rx.push(ram, chain, u32::try_from(written).unwrap_or(0))?;
                port.told.sent(connected);
            }
        }
        rx.notify(ram)
    }

    fn work(&mut self, ops: &mut EventOps<'_>) {
        if self.broken {
            return;
        }
        if let Err(e) = self.pass() {
            self.broken = true;
            self.device.needs_reset(&e);
            for queue in &self.queues {
                let _ = ops.remove(Events::new(&*queue.kick, EventSet::IN));
            }
        }
    }
}

/// What the driver says.
fn hear(ports: &mut [Port], message: Message) {
    let of_port = ports.iter_mut().find(|p| u32::from(p.id) == message.port);
    match (message.event, of_port) {
        (DEVICE_READY, _) if message.value == 1 => {
            ports.iter_mut().for_each(|port| port.told.device_ready());
        }
        (PORT_READY, Some(port)) if message.value == 1 => port.told.port_ready(),
        (PORT_OPEN, Some(port)) => port.told.guest_open = message.value != 0,
        _ => log::debug!("virtio-console: {message:?} means nothing here"),
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let kicks = self
            .queues
            .iter()
            .map(|q: &ActiveQueue| Events::with_data(&*q.kick, q.index.into(), EventSet::IN));
        let wake = Events::with_data(&*self.wake, WAKE, EventSet::IN);
        for events in kicks.chain([wake]) {
            if let Err(e) = ops.add(events) {
                self.device.needs_reset(&e);
            }
        }
        // What came while nobody served.
        let _ = self.wake.write(1);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        // Level-triggered and non-blocking: what is signalled later is another event.
        match events.data() {
            WAKE => {
                let _ = self.wake.read();
            }
            index => {
                let kicked = self.queues.iter().find(|q| u32::from(q.index) == index);
                if let Some(queue) = kicked {
                    let _ = queue.kick.read();
                }
            }
        }
        self.work(ops);
    }
}
