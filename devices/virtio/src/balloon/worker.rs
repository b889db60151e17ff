//! The balloon's worker: runs in the I/O thread, owns the queues between start and stop.

use std::ops::ControlFlow;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use testudo_memory::{Discarded, RamHandle, RamView, discard};
use vm_memory::GuestAddressSpace;

use super::link::{BalloonLink, PAGE};
use super::{BalloonOptions, pfns, stats};
use crate::model::{ActiveQueue, Queues};
use crate::queue::{Chain, QueueFault, Round};
use crate::signal::DeviceEvents;
use crate::timer::Timer;

/// Chains served before other devices of the thread have their turn.
const BUDGET: u32 = 8;
/// Bytes of page numbers that one chain may bring; Linux sends 1 KiB.
const NUMBERS: usize = 64 * 1024;

/// Events that are no queue's.
const TIMER: u32 = 1 << 16;
const CHANGED: u32 = TIMER + 1;

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Inflate,
    Deflate,
    Stats,
    Reporting,
    /// Of a feature that was offered and not agreed on.
    Unused,
}

pub(super) struct Worker {
    options: BalloonOptions,
    link: BalloonLink,
    /// The driver may say what it fills free pages with.
    poison: bool,
    timer: Option<Timer>,
    queues: Vec<(Role, ActiveQueue)>,
    /// The statistics buffer: it goes back when news is wanted.
    held: Option<Chain>,
    ram: RamHandle,
    device: DeviceEvents,
    /// A failure to give memory back has been reported; a guest can bring about many.
    failed: bool,
}

impl Worker {
    pub(super) fn new(
        options: BalloonOptions,
        link: BalloonLink,
        poison: bool,
        timer: Option<Timer>,
        queues: Vec<(Role, ActiveQueue)>,
        ram: RamHandle,
        device: DeviceEvents,
    ) -> Self {
        Self {
            options,
            link,
            poison,
            timer,
            queues,
            held: None,
            ram,
            device,
            failed: false,
        }
    }

    pub(super) fn into_parts(mut self) -> (Option<Timer>, Queues) {
        let stats = self
            .queues
            .iter_mut()
            .find(|(role, _)| *role == Role::Stats);
        if let (Some((_, queue)), Some(chain)) = (stats, self.held.take()) {
            queue.queue.undo_pop(chain);
        }
        let queues = self.queues.into_iter().map(|(_, queue)| queue);
        (self.timer, queues.collect())
    }

    /// Serves queue number `at` of the list.
    fn pass(&mut self, at: usize) -> Result<(), QueueFault> {
        let Self {
            options,
            link,
            poison,
            queues,
            held,
            ram,
            failed,
            ..
        } = self;
        let Some((role, queue)) = queues.get_mut(at) else {
            return Ok(());
        };
        let view = ram.memory();
        let ram: &RamView = &view;
        // Pages whose content the guest counts on are left alone.
        let filled = *poison && link.poison() != 0;
        let mut budget = BUDGET;
        let round = queue.queue.drain(ram, |queue, chain| {
            let done = match role {
                Role::Inflate => inflate(&chain, ram, options.page, link),
                Role::Reporting if !filled => report(&chain, ram, options.page, link),
                Role::Stats => {
                    note(&chain, ram, link);
                    // A driver has one such buffer; of one that has more, the last is kept.
                    return match held.replace(chain) {
                        None => Ok(ControlFlow::Continue(())),
                        Some(earlier) => {
                            queue.push(ram, earlier, 0)?;
                            Ok(ControlFlow::Continue(()))
                        }
                    };
                }
                Role::Reporting | Role::Deflate | Role::Unused => Ok(()),
            };
            if let Err(e) = done {
                queue.count_error();
                if !std::mem::replace(failed, true) {
                    log::warn!("virtio-balloon: memory cannot be given back: {e}");
                }
            }
            queue.push(ram, chain, 0)?;
            budget = budget.saturating_sub(1);
            Ok(match budget {
                0 => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            })
        })?;
        if round == Round::Stopped
            && let Err(e) = queue.kick.write(1)
        {
            log::debug!("virtio-balloon: kick of its own: {e}");
        }
        queue.queue.notify(ram)
    }

    /// Returns the statistics buffer, upon which the driver fills it anew.
    fn ask_for_stats(&mut self) -> Result<(), QueueFault> {
        self.set_timer();
        let stats = self
            .queues
            .iter_mut()
            .find(|(role, _)| *role == Role::Stats);
        if let (Some((_, queue)), Some(chain)) = (stats, self.held.take()) {
            let view = self.ram.memory();
            queue.queue.push(&view, chain, 0)?;
            queue.queue.notify(&view)?;
        }
        Ok(())
    }

    fn set_timer(&self) {
        if let (Some(timer), Some(every)) = (&self.timer, self.options.stats)
            && let Err(e) = timer.set(every)
        {
            log::error!("virtio-balloon: timer of the statistics: {e}");
        }
    }
}

/// Gives the pages a driver has put into the balloon back to the host.
fn inflate(chain: &Chain, ram: &RamView, page: u64, link: &BalloonLink) -> std::io::Result<()> {
    let len = usize::try_from(chain.readable_len()).unwrap_or(NUMBERS);
    let mut bytes = vec![0; len.min(NUMBERS)];
    let read = chain.read(ram, 0, &mut bytes).unwrap_or(0);
    let numbers = pfns::numbers(bytes.get(..read).unwrap_or_default());
    for (first, count) in pfns::runs(numbers.collect()) {
        let gpa = u64::from(first).saturating_mul(PAGE);
        let done = discard(ram, gpa, count.saturating_mul(PAGE), page)?;
        link.count_inflated(done);
    }
    if len > NUMBERS {
        return Err(std::io::Error::other("too many pages at once"));
    }
    Ok(())
}

/// Gives pages that are free back to the host.
fn report(chain: &Chain, ram: &RamView, page: u64, link: &BalloonLink) -> std::io::Result<()> {
    for buffer in chain.writable() {
        let done: Discarded = discard(ram, buffer.address.0, buffer.len.into(), page)?;
        link.count_reported(done);
    }
    Ok(())
}

fn note(chain: &Chain, ram: &RamView, link: &BalloonLink) {
    let mut bytes = [0; stats::ENTRY * stats::ENTRIES];
    let read = chain.read(ram, 0, &mut bytes).unwrap_or(0);
    for (tag, value) in stats::entries(bytes.get(..read).unwrap_or_default()) {
        link.set_stat(tag, value);
    }
}

impl MutEventSubscriber for Worker {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let done = match events.data() {
            CHANGED => {
                let _ = self.link.changed().read();
                self.device.config_changed();
                return;
            }
            TIMER => {
                if let Some(timer) = &self.timer {
                    timer.take();
                }
                self.ask_for_stats()
            }
            at => {
                let at = usize::try_from(at).unwrap_or(usize::MAX);
                if let Some((_, queue)) = self.queues.get(at) {
                    let _ = queue.kick.read();
                }
                self.pass(at)
            }
        };
        if let Err(e) = done {
            self.device.needs_reset(&e);
            for (_, queue) in &self.queues {
                let _ = ops.remove(Events::new(&*queue.kick, EventSet::IN));
            }
            if let Some(timer) = &self.timer {
                let _ = ops.remove(Events::new(timer, EventSet::IN));
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let kicks = (0_u32..).zip(&self.queues);
        let mut events: Vec<Events> = kicks
            .map(|(at, (_, queue))| Events::with_data(&*queue.kick, at, EventSet::IN))
            .collect();
        let changed = self.link.changed();
        events.push(Events::with_data(changed, CHANGED, EventSet::IN));
        if let Some(timer) = &self.timer {
            events.push(Events::with_data(timer, TIMER, EventSet::IN));
        }
        for events in events {
            if let Err(e) = ops.add(events) {
                self.device.needs_reset(&e);
            }
        }
        self.set_timer();
    }
}
