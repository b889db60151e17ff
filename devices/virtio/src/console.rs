//! virtio-console (virtio 1.2 §5.3), as two devices.
//!
//! * A **console**: one port, which Linux makes `/dev/hvc0`. Its size is in the configuration space
//!   (VIRTIO_CONSOLE_F_SIZE), where all guests agree about columns and rows; in the control message of
//!   the multiport form they do not.
//! * **Ports** with names, `/dev/virtio-ports/NAME` (VIRTIO_CONSOLE_F_MULTIPORT). The guest learns when
//!   the host's end is open, and its writers wait until then.
//!
//! Output that the host does not take waits, up to 64 KiB a port; then it stays in the guest's queue
//! and the guest waits. Input is taken up to 64 KiB ahead of the guest. Nothing is lost on either way
//! as long as the other side is there.

mod control;
mod port;
mod worker;

use std::io::{self, Write};
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use port::PortHandle;

use crate::model::{ActivateError, Activated, Queues, SavedState, Shape, VirtioModel};
use crate::worker::{Attachment, IoHandle};
use port::{Size, Wake};
use worker::{Port, Worker};

const DEVICE_TYPE: u16 = 3;
const F_SIZE: u64 = 1 << 0;
const F_MULTIPORT: u64 = 1 << 1;
const QUEUE_SIZE: u16 = 64;

/// Which of the two devices it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Console,
    /// How many ports it can have, port 0 included, which is kept for consoles.
    Ports(u16),
}

impl Kind {
    /// Two queues for each port, and two for control if there is any.
    fn queues(self) -> u16 {
        match self {
            Self::Console => 2,
            Self::Ports(count) => count.saturating_add(1).saturating_mul(2),
        }
    }
}

/// The model.
pub struct Console {
    io: IoHandle,
    kind: Kind,
    size: Size,
    state: State,
}

enum State {
    Idle(Vec<Port>),
    Running(Attachment<Worker>),
    /// The thread the worker was in is gone.
    Lost,
}

/// Where a port's output goes; it answers `WouldBlock` instead of waiting.
pub type PortSink = Box<dyn Write + Send>;

impl Console {
    /// The most ports with names that one device has.
    pub const MAX_PORTS: usize = 16;

    /// A console of this many columns and rows (0 if nobody knows), served in `io`'s thread.
    pub fn single(
        sink: PortSink,
        (columns, rows): (u16, u16),
        io: IoHandle,
    ) -> io::Result<(Self, PortHandle)> {
        let wake: Wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let size = Size::default();
        let (port, handle) = Port::new(0, None, sink, &wake, &size)?;
        size.set(columns, rows);
        size.take_news();
        let console = Self {
            io,
            kind: Kind::Console,
            size,
            state: State::Idle(vec![port]),
        };
        Ok((console, handle))
    }

    /// Ports with these names, at most [`Self::MAX_PORTS`]; the rest are left out.
    pub fn ports(
        ports: Vec<(String, PortSink)>,
        io: IoHandle,
    ) -> io::Result<(Self, Vec<PortHandle>)> {
        let wake: Wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let size = Size::default();
        let made: Vec<(Port, PortHandle)> = (1_u16..)
            .zip(ports.into_iter().take(Self::MAX_PORTS))
            .map(|(id, (name, sink))| Port::new(id, Some(name), sink, &wake, &size))
            .collect::<io::Result<_>>()?;
        let (ports, handles): (Vec<_>, Vec<_>) = made.into_iter().unzip();
        let count = u16::try_from(ports.len()).unwrap_or(0).saturating_add(1);
        let console = Self {
            io,
            kind: Kind::Ports(count),
            size,
            state: State::Idle(ports),
        };
        Ok((console, handles))
    }
}

fn lost() -> ActivateError {
    ActivateError::Host {
        what: "the thread that served the console has ended",
        source: "unplug the device and plug it again".into(),
    }
}

impl VirtioModel for Console {
    fn shape(&self) -> Shape {
        Shape {
            name: "console",
            device_type: DEVICE_TYPE,
            features: match self.kind {
                Kind::Console => F_SIZE,
                Kind::Ports(_) => F_MULTIPORT,
            },
            queues: vec![QUEUE_SIZE; usize::from(self.kind.queues())],
            config_len: 12,
            ..Shape::default()
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (columns, rows) = self.size.get();
        let ports = match self.kind {
            Kind::Console => 1,
            Kind::Ports(count) => u32::from(count),
        };
        let config = columns
            .to_le_bytes()
            .into_iter()
            .chain(rows.to_le_bytes())
            .chain(ports.to_le_bytes())
            .chain([0; 4]);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, value) in data.iter_mut().zip(config.skip(from)) {
            *byte = value;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn start(&mut self, on: Activated) -> Result<(), ActivateError> {
        let State::Idle(ports) = std::mem::replace(&mut self.state, State::Lost) else {
            return Err(lost());
        };
        let worker = match Worker::new(ports, self.size.clone(), on) {
            Ok(worker) => worker,
            Err((ports, error)) => {
                self.state = State::Idle(ports);
                return Err(error);
            }
        };
        let attached = self.io.attach(worker).map_err(|e| ActivateError::Host {
            what: "the console's worker cannot be attached",
            source: Box::new(e),
        })?;
        self.state = State::Running(attached);
        Ok(())
    }

    fn stop(&mut self) -> Queues {
        match std::mem::replace(&mut self.state, State::Lost) {
            State::Running(attached) => match attached.detach() {
                Ok(worker) => {
                    let (ports, queues) = worker.into_parts();
                    self.state = State::Idle(ports);
                    queues
                }
                Err(e) => {
                    log::warn!("virtio-console: {e}");
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
        if let State::Idle(ports) = &mut self.state {
            ports.iter_mut().for_each(Port::reset);
        }
    }

    fn saved_state(&self) -> SavedState {
        SavedState::Unsupported
    }
}

#[cfg(test)]
mod tests;
