//! virtio-balloon (virtio 1.2 §5.5): memory that the guest does without, given back to the host.
//!
//! It goes back in two ways: by inflating, when the host asks for so many pages, and by reports of
//! what is free anyway, which the guest sends by itself. Either way the pages stay guest RAM: one
//! that is touched again is there again, as zeroes.
//!
//! Queues are numbered by what was agreed on, in the order of the list below, not by the numbers of
//! §5.5.2: that is what drivers do.
//!
//! | queue | there with |
//! |---|---|
//! | inflate, deflate | always |
//! | statistics | STATS_VQ |
//! | reporting | PAGE_REPORTING |
//!
//! FREE_PAGE_HINT is not offered. A hint may be outdated when the host reads it, so nothing may be
//! thrown away by it; it serves migration.

mod link;
mod pfns;
mod stats;
mod worker;

use std::io;
use std::time::Duration;

use crate::model::{ActivateError, Activated, Queues, SavedState, Shape, VirtioModel};
use crate::timer::Timer;
use crate::worker::{Attachment, IoHandle};
pub use link::BalloonLink;
use worker::{Role, Worker};

const DEVICE_TYPE: u16 = 5;
const QUEUE_SIZE: u16 = 128;
const CONFIG_LEN: u32 = 16;
const ACTUAL: std::ops::Range<usize> = 4..8;
const POISON: std::ops::Range<usize> = 12..16;

mod bits {
    pub(super) const STATS_VQ: u64 = 1 << 1;
    pub(super) const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub(super) const PAGE_POISON: u64 = 1 << 4;
    pub(super) const REPORTING: u64 = 1 << 5;
}

/// What the balloon does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BalloonOptions {
    /// The guest takes pages back when it has no others.
    pub deflate_on_oom: bool,
    /// The guest tells of its memory this often.
    pub stats: Option<Duration>,
    /// The guest reports pages that are free.
    pub reporting: bool,
    /// Bytes in a page of the host's that guest RAM consists of, a power of two: parts of one cannot
    /// be given back.
    pub page: u64,
}

/// The model.
pub struct Balloon {
    options: BalloonOptions,
    link: BalloonLink,
    io: IoHandle,
    state: State,
}

enum State {
    /// The timer is for statistics.
    Idle(Option<Timer>),
    Running(Attachment<Worker>),
    /// The thread the worker was in is gone.
    Lost,
}

impl Balloon {
    /// A balloon whose size is set by `link`, served in `io`'s thread.
    pub fn new(options: BalloonOptions, link: BalloonLink, io: IoHandle) -> io::Result<Self> {
        let timer = options.stats.map(|_| Timer::new()).transpose()?;
        Ok(Self {
            options,
            link,
            io,
            state: State::Idle(timer),
        })
    }

    fn features(&self) -> u64 {
        let BalloonOptions {
            deflate_on_oom,
            stats,
            reporting,
            ..
        } = self.options;
        let mut features = 0;
        if deflate_on_oom {
            features |= bits::DEFLATE_ON_OOM;
        }
        if stats.is_some() {
            features |= bits::STATS_VQ;
        }
        if reporting {
            features |= bits::REPORTING | bits::PAGE_POISON;
        }
        features
    }

    fn config(&self) -> [u8; CONFIG_LEN as usize] {
        let [n0, n1, n2, n3] = self.link.target_pages().to_le_bytes();
        let [a0, a1, a2, a3] = self.link.actual_pages().to_le_bytes();
        let [p0, p1, p2, p3] = self.link.poison().to_le_bytes();
        // The hint's command id is 0: no hints are wanted.
        [n0, n1, n2, n3, a0, a1, a2, a3, 0, 0, 0, 0, p0, p1, p2, p3]
    }
}

impl VirtioModel for Balloon {
    fn shape(&self) -> Shape {
        let features = self.features();
        let extra = [bits::STATS_VQ, bits::REPORTING];
        let extra = extra.iter().filter(|bit| features & **bit != 0).count();
        Shape {
            name: "balloon",
            device_type: DEVICE_TYPE,
            features,
            queues: vec![QUEUE_SIZE; extra.saturating_add(2)],
            config_len: CONFIG_LEN,
            gauges: self.link.gauges(self.options.stats.is_some()),
            ..Shape::default()
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::model::read_bytes(&self.config(), offset, data);
    }

    /// The driver writes how large the balloon is, and what it fills free pages with.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut config = self.config();
        let from = usize::try_from(offset)
            .ok()
            .and_then(|o| config.get_mut(o..));
        for (to, from) in from.unwrap_or_default().iter_mut().zip(data) {
            *to = *from;
        }
        let word = |at: std::ops::Range<usize>| {
            let bytes = config.get(at).and_then(|b| b.first_chunk::<4>());
            u32::from_le_bytes(bytes.copied().unwrap_or_default())
        };
        self.link.set_actual_pages(word(ACTUAL));
        self.link.set_poison(word(POISON));
    }

    fn start(&mut self, on: Activated) -> Result<(), ActivateError> {
        let State::Idle(timer) = std::mem::replace(&mut self.state, State::Lost) else {
            return Err(ActivateError::Host {
                what: "the thread that served the balloon has ended",
                source: "start the VM again".into(),
            });
        };
        let mut roles = vec![Role::Inflate, Role::Deflate];
        if on.features & bits::STATS_VQ != 0 {
            roles.push(Role::Stats);
        }
        if on.features & bits::REPORTING != 0 {
            roles.push(Role::Reporting);
        }
        let queues = on.queues.into_iter().map(|queue| {
            let role = roles.get(usize::from(queue.index)).copied();
            (role.unwrap_or(Role::Unused), queue)
        });
        let worker = Worker::new(
            self.options,
            self.link.clone(),
            on.features & bits::PAGE_POISON != 0,
            timer,
            queues.collect(),
            on.ram,
            on.device,
        );
        let attached = self.io.attach(worker).map_err(|e| ActivateError::Host {
            what: "the balloon's worker cannot be attached",
            source: Box::new(e),
        })?;
        self.state = State::Running(attached);
        Ok(())
    }

    fn stop(&mut self) -> Queues {
        match std::mem::replace(&mut self.state, State::Lost) {
            State::Running(attached) => match attached.detach() {
                Ok(worker) => {
                    let (timer, queues) = worker.into_parts();
                    self.state = State::Idle(timer);
                    queues
                }
                Err(e) => {
                    log::warn!("virtio-balloon: {e}");
                    Vec::new()
                }
            },
            idle_or_lost => {
                self.state = idle_or_lost;
                Vec::new()
            }
        }
    }

    fn reset(&mut self) {
        self.link.set_actual_pages(0);
        self.link.set_poison(0);
    }

    fn saved_state(&self) -> SavedState {
        SavedState::QueuesOnly
    }
}

#[cfg(test)]
mod tests;
