//! The memory device's worker: runs in the I/O thread, owns queue and block map between start and
//! stop. One request that changes something is in flight at a time; those behind it wait in the
//! queue.

use std::ops::ControlFlow;
use std::sync::atomic::Ordering;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use testudo_memory::{RamHandle, RamView};
use vm_memory::GuestAddressSpace;

use super::blocks::Blocks;
use super::link::MemLink;
use super::request::{Change, REQUEST, Response, Said, Verdict, judge};
use crate::model::ActiveQueue;
use crate::queue::{Chain, QueueFault, VirtQueue};
use crate::signal::DeviceEvents;

const KICK: u32 = 0;
const ANSWERED: u32 = 1;
const CHANGED: u32 = 2;

/// A request whose change is being made.
struct Pending {
    chain: Chain,
    change: Change,
}

pub(super) struct Worker {
    link: MemLink,
    blocks: Blocks,
    queue: ActiveQueue,
    ram: RamHandle,
    device: DeviceEvents,
    pending: Option<Pending>,
}

impl Worker {
    pub(super) fn new(
        link: MemLink,
        blocks: Blocks,
        queue: ActiveQueue,
        ram: RamHandle,
        device: DeviceEvents,
    ) -> Self {
        Self {
            link,
            blocks,
            queue,
            ram,
            device,
            pending: None,
        }
    }

    /// Answers what has been done and puts back what nobody has begun to do.
    pub(super) fn into_parts(mut self) -> (Blocks, ActiveQueue) {
        if let Some(pending) = self.pending.take() {
            match self.link.answer_or_take_back() {
                Some(made) => {
                    let view = self.ram.memory();
                    let settled = self.settle(&view, pending, made);
                    if let Err(e) = settled.and_then(|()| self.queue.queue.notify(&view)) {
                        self.device.needs_reset(&e);
                    }
                }
                None => self.queue.queue.undo_pop(pending.chain),
            }
        }
        (self.blocks, self.queue)
    }

    fn settle(&mut self, ram: &RamView, pending: Pending, made: bool) -> Result<(), QueueFault> {
        let said = pending.change.settle(&mut self.blocks, made);
        let plugged = self.blocks.plugged_bytes();
        self.link.plugged().store(plugged, Ordering::Release);
        if made && pending.change == Change::UnplugAll {
            self.link.shrink_usable();
        }
        respond(&mut self.queue.queue, ram, pending.chain, said.into())
    }

    /// Takes an answer if there is one, then requests until one has to wait.
    fn pass(&mut self) -> Result<(), QueueFault> {
        let view = self.ram.memory();
        let ram: &RamView = &view;
        if let Some(pending) = self.pending.take() {
            match self.link.answer() {
                Some(made) => self.settle(ram, pending, made)?,
                None => self.pending = Some(pending),
            }
        }
        if self.pending.is_none() {
            let Self {
                link,
                blocks,
                queue,
                pending,
                ..
            } = self;
            let region = link.region();
            queue.queue.drain(ram, |queue, chain| {
                let request = read(&chain, ram);
                match judge(request, blocks, &region, &link.levels()) {
                    Verdict::Say(response) => {
                        respond(queue, ram, chain, response)?;
                        Ok(ControlFlow::Continue(()))
                    }
                    Verdict::Make(change) => {
                        *pending = Some(Pending { chain, change });
                        link.ask(change.of_memory(blocks, &region));
                        Ok(ControlFlow::Break(()))
                    }
                }
            })?;
        }
        self.queue.queue.notify(ram)
    }

    fn work(&mut self, ops: &mut EventOps<'_>) {
        if let Err(e) = self.pass() {
            self.device.needs_reset(&e);
            let _ = ops.remove(Events::new(&*self.queue.kick, EventSet::IN));
        }
    }
}

fn read(chain: &Chain, ram: &RamView) -> Option<[u8; REQUEST]> {
    let mut request = [0; REQUEST];
    let read = chain.read(ram, 0, &mut request);
    matches!(read, Ok(REQUEST)).then_some(request)
}

fn respond(
    queue: &mut VirtQueue,
    ram: &RamView,
    chain: Chain,
    response: Response,
) -> Result<(), QueueFault> {
    match response.said {
        Said::Error => queue.count_error(),
        Said::Busy => queue.count_stall(),
        Said::Ack | Said::Nack => {}
    }
    let written = chain.write(ram, 0, &response.bytes()).unwrap_or(0);
    let written = u32::try_from(written).unwrap_or(0);
    queue.push(ram, chain, written)
}

impl MutEventSubscriber for Worker {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            KICK => {
                let _ = self.queue.kick.read();
            }
            ANSWERED => {
                let _ = self.link.answered().read();
            }
            CHANGED => {
                let _ = self.link.changed().read();
                self.device.config_changed();
                return;
            }
            _ => return,
        }
        self.work(ops);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        for events in [
            Events::with_data(&*self.queue.kick, KICK, EventSet::IN),
            Events::with_data(self.link.answered(), ANSWERED, EventSet::IN),
            Events::with_data(self.link.changed(), CHANGED, EventSet::IN),
        ] {
            if let Err(e) = ops.add(events) {
                self.device.needs_reset(&e);
            }
        }
    }
}
