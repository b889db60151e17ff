//! virtio-rng (virtio 1.2 §5.4): one queue of writable buffers that come back with random bytes.
//!
//! A request gets at most [`REQUEST_LIMIT`] bytes, which the specification allows; a kick is served
//! up to [`KICK_BUDGET`] bytes before other devices of the thread have their turn. With a rate
//! limit, a request finds what the bucket holds; an empty bucket leaves it in the queue until a
//! timer says that there is more.

mod worker;

use std::fs::File;
use std::io::{self, Read};

use crate::limit::RateLimit;
use crate::model::{ActivateError, Activated, Queues, SavedState, Shape, VirtioModel};
use crate::timer::Timer;
use crate::worker::{Attachment, IoHandle};
use worker::{Throttle, Worker};

const DEVICE_TYPE: u16 = 4;
const QUEUE_SIZE: u16 = 256;

/// The most bytes one request is given.
const REQUEST_LIMIT: u32 = 64 * 1024;
/// Bytes served per kick before the thread looks at its other events.
const KICK_BUDGET: u32 = 256 * 1024;

/// Where the bytes come from.
pub enum Entropy {
    /// `getrandom(2)`.
    Host,
    /// A file read as it is: a hardware generator, or a fixed sequence for tests. Reading it must
    /// not block for long.
    File(File),
}

impl Entropy {
    /// Fills the start of `data`; returns how many bytes, 0 at the end of a file.
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Host => Ok(rustix::rand::getrandom(
                data,
                rustix::rand::GetRandomFlags::empty(),
            )?),
            Self::File(file) => file.read(data),
        }
    }
}

/// The model.
pub struct Rng {
    io: IoHandle,
    state: State,
}

enum State {
    Idle(Source),
    Running(Attachment<Worker>),
    /// The thread the worker was in is gone, and the source with it.
    Lost,
}

/// What survives from one activation to the next.
struct Source {
    entropy: Entropy,
    throttle: Option<Throttle>,
    /// A failure to read has been reported; a guest can bring about many.
    failed: bool,
}

impl Rng {
    /// A generator served in `io`'s thread, with at most `limit` bytes a second if given. Fails
    /// only if the limit's timer cannot be made.
    pub fn new(entropy: Entropy, limit: Option<RateLimit>, io: IoHandle) -> io::Result<Self> {
        let throttle = match limit {
            Some(limit) => Some(Throttle::new(limit, Timer::new()?)),
            None => None,
        };
        Ok(Self {
            io,
            state: State::Idle(Source {
                entropy,
                throttle,
                failed: false,
            }),
        })
    }
}

fn lost() -> ActivateError {
    ActivateError::Host {
        what: "the thread that served the generator has ended",
        source: "unplug the device and plug it again".into(),
    }
}

impl VirtioModel for Rng {
    fn shape(&self) -> Shape {
        Shape {
            name: "rng",
            device_type: DEVICE_TYPE,
            features: 0,
            queues: vec![QUEUE_SIZE],
            ..Shape::default()
        }
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn start(&mut self, mut on: Activated) -> Result<(), ActivateError> {
        let queue = on.take_queue(0)?;
        let State::Idle(source) = std::mem::replace(&mut self.state, State::Lost) else {
            return Err(lost());
        };
        let worker = Worker::new(source, queue, on.ram, on.device);
        let attached = self.io.attach(worker).map_err(|e| ActivateError::Host {
            what: "the generator's worker cannot be attached",
            source: Box::new(e),
        })?;
        self.state = State::Running(attached);
        Ok(())
    }

    fn stop(&mut self) -> Queues {
        match std::mem::replace(&mut self.state, State::Lost) {
            State::Running(attached) => match attached.detach() {
                Ok(worker) => {
                    let (source, queue) = worker.into_parts();
                    self.state = State::Idle(source);
                    vec![queue]
                }
                Err(e) => {
                    log::warn!("virtio-rng: {e}");
                    Vec::new()
                }
            },
            idle_or_lost => {
                self.state = idle_or_lost;
                Vec::new()
            }
        }
    }

    fn saved_state(&self) -> SavedState {
        SavedState::QueuesOnly
    }
}

#[cfg(test)]
mod tests;
