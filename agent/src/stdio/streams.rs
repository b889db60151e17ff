//! Streams that have arrived, and what waits for one.
//!
//! The host connects and names a number; a request names the same number; whichever is first waits for
//! the other.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::SocketFlags;
use testudo_agent_protocol::{PREAMBLE, Preamble};

use super::relay::{Relay, Relays, duplicate};
use crate::poll::{Poll, READ, Source};

/// Streams that wait, with and without their preamble.
const MOST_WAITING: usize = 256;
/// How long a stream waits for a request that names it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the host to the process.
    In,
    /// From the process to the host.
    Out,
}

/// A process's descriptor that waits for its stream.
pub(crate) struct Want {
    pub(crate) direction: Direction,
    pub(crate) fd: OwnedFd,
    /// The process, and which of its descriptors.
    pub(crate) owner: (u32, i32),
}

struct Arrival {
    socket: OwnedFd,
    preamble: Vec<u8>,
}

struct Parked {
    socket: OwnedFd,
    since: Instant,
}

/// Both sides of the match.
pub(crate) struct Streams {
    listener: OwnedFd,
    arrivals: BTreeMap<u32, Arrival>,
    parked: BTreeMap<u64, Parked>,
    wanted: BTreeMap<u64, Vec<Want>>,
    next: u32,
}

/// A relay that began: of which owner, and its id.
pub(crate) type Began = ((u32, i32), u32);

impl Streams {
    pub(crate) fn new(listener: OwnedFd, poll: &Poll) -> io::Result<Self> {
        poll.add(&listener, Source::StreamListener, READ)?;
        Ok(Self {
            listener,
            arrivals: BTreeMap::new(),
            parked: BTreeMap::new(),
            wanted: BTreeMap::new(),
            next: 0,
        })
    }

    /// Somebody connects.
    pub(crate) fn accept(&mut self, poll: &Poll) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while let Ok(socket) = rustix::net::accept_with(&self.listener, flags) {
            self.parked
                .retain(|_, parked| parked.since.elapsed() < PATIENCE);
            if self.arrivals.len().saturating_add(self.parked.len()) >= MOST_WAITING {
                log::warn!("{MOST_WAITING} streams wait for requests: one more is refused");
                continue;
            }
            let id = self.next;
            self.next = self.next.wrapping_add(1);
            if poll.add(&socket, Source::Arrival(id), READ).is_ok() {
                self.arrivals.insert(
                    id,
                    Arrival {
                        socket,
                        preamble: Vec::new(),
                    },
                );
            }
        }
    }

    /// A stream's preamble comes in.
    pub(crate) fn arrive(&mut self, id: u32, relays: &mut Relays, poll: &Poll) -> Vec<Began> {
        let Some(arrival) = self.arrivals.get_mut(&id) else {
            return Vec::new();
        };
        // Not a byte more: what follows is the process's.
        let missing = PREAMBLE.saturating_sub(arrival.preamble.len());
        let mut bytes = vec![0; missing];
        match rustix::io::read(&arrival.socket, &mut bytes) {
            Ok(length) if length > 0 => {
                arrival
                    .preamble
                    .extend_from_slice(bytes.get(..length).unwrap_or_default());
            }
            Err(Errno::AGAIN | Errno::INTR) => return Vec::new(),
            Ok(_) | Err(_) => {
                self.drop_arrival(id, poll);
                return Vec::new();
            }
        }
        let Ok(preamble) = <&[u8; PREAMBLE]>::try_from(arrival.preamble.as_slice()) else {
            return Vec::new();
        };
        let preamble = Preamble::from_bytes(preamble);
        let Some(arrival) = self.drop_arrival(id, poll) else {
            return Vec::new();
        };
        let Some(Preamble { number }) = preamble else {
            log::warn!("a stream without a preamble is closed");
            return Vec::new();
        };
        if let Some(wants) = self.wanted.remove(&number) {
            return attach(&arrival.socket, wants, relays, poll);
        }
        let parked = Parked {
            socket: arrival.socket,
            since: Instant::now(),
        };
        if self.parked.insert(number, parked).is_some() {
            log::warn!("stream {number} came twice: the first is closed");
        }
        Vec::new()
    }

    /// A process wants a stream.
    pub(crate) fn want(
        &mut self,
        number: u64,
        wants: Vec<Want>,
        relays: &mut Relays,
        poll: &Poll,
    ) -> Vec<Began> {
        match self.parked.remove(&number) {
            Some(parked) => attach(&parked.socket, wants, relays, poll),
            None => {
                self.wanted.entry(number).or_default().extend(wants);
                Vec::new()
            }
        }
    }

    /// Nobody wants it any more: the process is gone.
    pub(crate) fn forget(&mut self, process: u32) {
        self.wanted.retain(|_, wants| {
            wants.retain(|want| want.owner.0 != process);
            !wants.is_empty()
        });
    }

    /// Bytes that wait in a descriptor whose stream has not come.
    pub(crate) fn waiting(&self, owner: (u32, i32)) -> u64 {
        self.wanted
            .values()
            .flatten()
            .find(|want| want.owner == owner)
            .and_then(|want| rustix::io::ioctl_fionread(&want.fd).ok())
            .unwrap_or_default()
    }

    /// Closes a descriptor whose stream has not come.
    pub(crate) fn close(&mut self, owner: (u32, i32)) {
        self.wanted.retain(|_, wants| {
            wants.retain(|want| want.owner != owner);
            !wants.is_empty()
        });
    }

    pub(crate) fn count(&self) -> usize {
        self.parked.len().saturating_add(self.arrivals.len())
    }

    fn drop_arrival(&mut self, id: u32, poll: &Poll) -> Option<Arrival> {
        let arrival = self.arrivals.remove(&id)?;
        poll.remove(&arrival.socket);
        Some(arrival)
    }
}

fn attach(socket: &OwnedFd, wants: Vec<Want>, relays: &mut Relays, poll: &Poll) -> Vec<Began> {
    let mut began = Vec::new();
    for want in wants {
        // Each relay has a descriptor of its own, for epoll tells them apart by that.
        let Ok(stream) = duplicate(socket.as_fd()) else {
            log::error!("no descriptor left for a stream");
            continue;
        };
        let relay = match want.direction {
            Direction::In => Relay::new(stream, want.fd, want.owner),
            Direction::Out => Relay::new(want.fd, stream, want.owner),
        };
        if let Some(id) = relays.add(relay, poll) {
            began.push((want.owner, id));
        }
    }
    began
}
