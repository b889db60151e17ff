//! When the queue of FORGETs is looked at.
//!
//! Nobody waits for a FORGET, and a guest that unlinks or reads a tree sends one for each file. Each would
//! cost an exit, a wake-up of the worker and an interrupt. So while they come in quick succession the driver
//! is asked to kick for half a queue only, and a timer looks at what is there:
//!
//! ```text
//!            kick, the last one less than QUICK ago
//!   eager ────────────────────────────────────────▶ lazy ─┐ half a queue: kick
//!     ▲                                              │ ▲   │ PERIOD over, FEW or more came
//!     └── PERIOD over, fewer than FEW came ──────────┘ └───┘
//! ```
//! Without EVENT_IDX the driver cannot be asked, and it stays eager.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::queue::{QueueFault, VirtQueue};
use crate::timer::Timer;
use testudo_memory::RamView;

const QUICK: Duration = Duration::from_millis(1);
/// How long an inode that nobody knows any more may be held.
const PERIOD: Duration = Duration::from_millis(10);
const FEW: u64 = 4;

pub(super) struct Forgets {
    pub(super) timer: Arc<Timer>,
    lazy: bool,
    /// The period is over, and what came in it is not served to its end yet.
    over: bool,
    last: Option<Instant>,
    /// Chains of the queue when the period began.
    before: u64,
}

impl Forgets {
    pub(super) fn new(timer: Arc<Timer>) -> Self {
        Self {
            timer,
            lazy: false,
            over: false,
            last: None,
            before: 0,
        }
    }

    /// Call it when the timer is an event, before the queue is served.
    pub(super) fn expired(&mut self) {
        self.timer.take();
        self.over = true;
    }

    /// Call it when nothing is left in the queue and the driver kicks again for each. `true` if there is more to
    /// be served at once.
    pub(super) fn served(
        &mut self,
        queue: &mut VirtQueue,
        ram: &RamView,
    ) -> Result<bool, QueueFault> {
        let goes_on = if std::mem::take(&mut self.over) {
            self.lazy = false;
            self.last = None;
            let came = queue.counters().taken().wrapping_sub(self.before);
            came >= FEW && self.begin_period(queue)
        } else {
            self.lazy || (self.quick() && self.begin_period(queue))
        };
        if goes_on {
            queue.postpone_kicks(ram, queue.size() / 2)
        } else {
            Ok(false)
        }
    }

    /// Whether the last kick was a short while ago.
    fn quick(&mut self) -> bool {
        let now = Instant::now();
        let last = self.last.replace(now);
        last.is_some_and(|last| now.saturating_duration_since(last) < QUICK)
    }

    fn begin_period(&mut self, queue: &VirtQueue) -> bool {
        if !queue.can_postpone_kicks() {
            return false;
        }
        if let Err(e) = self.timer.set(PERIOD) {
            log::debug!("virtio-fs: timer of forgets: {e}");
            return false;
        }
        self.before = queue.counters().taken();
        self.lazy = true;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::{Areas, BUFFERS, Desc, get_u16, offer, ram, write_desc};
    use crate::features;
    use crate::queue::{CheckedQueue, QueueRegisters};
    use crate::signal::{Interrupts, QueueInterrupt};
    use vmm_sys_util::eventfd::EventFd;

    struct Deaf;

    impl Interrupts for Deaf {
        fn queue(&self, _index: u16) {}
        fn config(&self) {}
        fn queue_event(&self, _index: u16) -> Option<&EventFd> {
            None
        }
    }

    struct Bench {
        ram: RamView,
        areas: Areas,
        queue: VirtQueue,
        forgets: Forgets,
    }

    impl Bench {
        fn new(negotiated: u64) -> Self {
            let ram = ram();
            let areas = Areas::of(0, 16);
            let registers = QueueRegisters {
                size: 16,
                enabled: true,
                descriptors: areas.desc,
                driver: areas.avail,
                device: areas.used,
                ..QueueRegisters::new(256)
            };
            let checked = CheckedQueue::check(0, &registers, negotiated, &ram).unwrap();
            let interrupt = QueueInterrupt::new(Arc::new(Deaf), 0);
            Self {
                queue: VirtQueue::new(checked, interrupt, Arc::default()),
                forgets: Forgets::new(Arc::new(Timer::new().unwrap())),
                ram,
                areas,
            }
        }

        /// So many come, and are served.
        fn serve(&mut self, count: u16) {
            for head in 0..count {
                write_desc(
                    &self.ram,
                    self.areas.desc,
                    head,
                    Desc::new(BUFFERS, 64, 0, 0),
                );
                offer(&self.ram, &self.areas, head);
                let chain = self.queue.pop(&self.ram).unwrap().unwrap();
                self.queue.push(&self.ram, chain, 0).unwrap();
            }
            assert!(!self.queue.resume_kicks(&self.ram).unwrap());
        }

        /// How many more have to come until the driver kicks.
        fn until_kick(&self) -> u16 {
            let mark = get_u16(&self.ram, self.areas.used + 4 + 8 * 16);
            mark.wrapping_sub(self.queue.positions().0) + 1
        }

        fn kicked(&mut self) {
            assert!(!self.forgets.served(&mut self.queue, &self.ram).unwrap());
        }

        fn expired(&mut self) {
            self.forgets.expired();
            self.kicked();
        }
    }

    #[test]
    fn kicks_in_quick_succession_are_asked_for_half_a_queue() {
        let mut bench = Bench::new(features::EVENT_IDX);
        bench.serve(1);
        bench.kicked();
        assert_eq!(bench.until_kick(), 1, "the first of them");
        bench.serve(1);
        bench.forgets.last = Some(Instant::now());
        bench.kicked();
        assert_eq!(bench.until_kick(), 8);
        // The period goes on as long as many come.
        bench.serve(5);
        bench.expired();
        assert_eq!(bench.until_kick(), 8);
        bench.serve(1);
        bench.expired();
        assert_eq!(bench.until_kick(), 1);
    }

    /// More came than a thread serves at once, so the queue was served to its end for another event than the
    /// timer's: the period ended nevertheless, and the driver is not left waiting for a timer that is not set.
    #[test]
    fn a_period_ends_when_its_forgets_are_served_later() {
        let mut bench = Bench::new(features::EVENT_IDX);
        bench.serve(1);
        bench.forgets.last = Some(Instant::now());
        bench.kicked();
        assert_eq!(bench.until_kick(), 8);
        bench.serve(2);
        bench.forgets.expired();
        bench.serve(1);
        bench.kicked();
        assert_eq!(bench.until_kick(), 1);
    }

    #[test]
    fn kicks_now_and_then_are_asked_for_each() {
        let mut bench = Bench::new(features::EVENT_IDX);
        for _ in 0..3 {
            bench.serve(1);
            bench.forgets.last = Instant::now().checked_sub(QUICK);
            bench.kicked();
            assert_eq!(bench.until_kick(), 1);
        }
    }

    #[test]
    fn a_driver_that_cannot_be_asked_kicks_for_each() {
        let mut bench = Bench::new(0);
        for _ in 0..3 {
            bench.serve(1);
            bench.forgets.last = Some(Instant::now());
            bench.kicked();
            assert!(!bench.forgets.lazy);
        }
    }
}
