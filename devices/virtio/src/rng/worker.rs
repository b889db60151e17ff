//! The generator's worker: runs in the I/O thread, owns the queue between start and stop.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use testudo_memory::{RamHandle, RamView};
use vm_memory::GuestAddressSpace;

use super::{KICK_BUDGET, REQUEST_LIMIT, Source};
use crate::limit::{RateLimit, TokenBucket};
use crate::model::ActiveQueue;
use crate::queue::{Chain, QueueFault, VirtQueue};
use crate::signal::DeviceEvents;
use crate::timer::Timer;

const KICK: u32 = 0;
const TIMER: u32 = 1;

/// Bytes moved from the source to the guest at once.
const PIECE: usize = 4096;
/// An almost empty bucket is left to fill up to this before a request is served.
const LEAST: u32 = 64;

/// A rate limit and the timer that ends a wait.
pub(super) struct Throttle {
    bucket: TokenBucket,
    timer: Timer,
    epoch: Instant,
}

impl Throttle {
    pub(super) fn new(limit: RateLimit, timer: Timer) -> Self {
        Self {
            bucket: TokenBucket::new(limit, Duration::ZERO),
            timer,
            epoch: Instant::now(),
        }
    }

    /// How many of `want` bytes may go now; `None` if none, and the timer is set.
    fn grant(&mut self, want: u32) -> Option<u32> {
        if want == 0 {
            return Some(0);
        }
        let now = self.epoch.elapsed();
        let least = u64::from(want.min(LEAST));
        let wait = self.bucket.wait_for(least, now);
        if wait.is_zero() {
            let taken = self.bucket.take(u64::from(want), now);
            return u32::try_from(taken).ok();
        }
        if let Err(e) = self.timer.set(wait) {
            log::error!("virtio-rng: timer of the rate limit: {e}");
        }
        None
    }
}

/// What ended a pass over the queue.
enum Pass {
    /// There is nothing more, and the driver will kick.
    Idle,
    /// There is more; others first.
    Yield,
    /// The rate limit's timer goes on.
    Throttled,
}

pub(super) struct Worker {
    source: Source,
    queue: ActiveQueue,
    ram: RamHandle,
    device: DeviceEvents,
}

impl Worker {
    pub(super) fn new(
        source: Source,
        queue: ActiveQueue,
        ram: RamHandle,
        device: DeviceEvents,
    ) -> Self {
        Self {
            source,
            queue,
            ram,
            device,
        }
    }

    pub(super) fn into_parts(self) -> (Source, ActiveQueue) {
        (self.source, self.queue)
    }

    fn pass(&mut self) -> Result<Pass, QueueFault> {
        let view = self.ram.memory();
        let ram: &RamView = &view;
        let Self { source, queue, .. } = self;
        let mut budget = KICK_BUDGET;
        let mut ended = Pass::Idle;
        queue.queue.drain(ram, |queue, chain| {
            ended = source.serve(queue, ram, chain, &mut budget)?;
            Ok(match ended {
                Pass::Idle => ControlFlow::Continue(()),
                Pass::Yield | Pass::Throttled => ControlFlow::Break(()),
            })
        })?;
        queue.queue.notify(ram)?;
        Ok(ended)
    }

    fn work(&mut self, ops: &mut EventOps<'_>) {
        match self.pass() {
            Ok(Pass::Idle | Pass::Throttled) => {}
            Ok(Pass::Yield) => {
                if let Err(e) = self.queue.kick.write(1) {
                    log::debug!("virtio-rng: kick of its own: {e}");
                }
            }
            Err(e) => {
                self.device.needs_reset(&e);
                let _ = ops.remove(Events::new(&*self.queue.kick, EventSet::IN));
            }
        }
    }
}

impl Source {
    /// Serves one request.
    fn serve(
        &mut self,
        queue: &mut VirtQueue,
        ram: &RamView,
        chain: Chain,
        budget: &mut u32,
    ) -> Result<Pass, QueueFault> {
        let want = chain.writable_len().min(REQUEST_LIMIT);
        let granted = match &mut self.throttle {
            Some(throttle) => throttle.grant(want),
            None => Some(want),
        };
        let Some(granted) = granted else {
            queue.undo_pop(chain);
            return Ok(Pass::Throttled);
        };
        let written = self.fill(ram, &chain, granted);
        if let Some(throttle) = &mut self.throttle {
            let unused = granted.saturating_sub(written);
            throttle.bucket.give_back(u64::from(unused));
        }
        queue.push(ram, chain, written)?;
        // A request costs something even if it asks for nothing.
        *budget = budget.saturating_sub(written.max(LEAST));
        Ok(if *budget == 0 {
            Pass::Yield
        } else {
            Pass::Idle
        })
    }

    /// Writes up to `want` random bytes into `chain`; returns how many.
    fn fill(&mut self, ram: &RamView, chain: &Chain, want: u32) -> u32 {
        let mut piece = [0; PIECE];
        let mut done = 0_u32;
        while done < want {
            let left = usize::try_from(want.saturating_sub(done)).unwrap_or(PIECE);
            let Some(room) = piece.get_mut(..left.min(PIECE)) else {
                break;
            };
            let read = match self.entropy.read(room) {
                Ok(read) => read,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    if !std::mem::replace(&mut self.failed, true) {
                        log::warn!("virtio-rng: the source of entropy fails: {e}");
                    }
                    0
                }
            };
            let bytes = room.get(..read).unwrap_or_default();
            let written = chain.write(ram, done, bytes).unwrap_or(0);
            done = done.saturating_add(u32::try_from(written).unwrap_or(0));
            if read == 0 || written < read {
                break;
            }
        }
        done
    }
}

impl MutEventSubscriber for Worker {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            KICK => {
                // Level-triggered and non-blocking: a kick that comes later is another event.
                let _ = self.queue.kick.read();
            }
            TIMER => {
                if let Some(throttle) = &self.source.throttle {
                    throttle.timer.take();
                }
            }
            _ => return,
        }
        self.work(ops);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let mut added = ops.add(Events::with_data(&*self.queue.kick, KICK, EventSet::IN));
        if let (Ok(()), Some(throttle)) = (&added, &self.source.throttle) {
            added = ops.add(Events::with_data(&throttle.timer, TIMER, EventSet::IN));
        }
        if let Err(e) = added {
            self.device.needs_reset(&e);
        }
    }
}
