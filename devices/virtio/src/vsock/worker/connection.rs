//! One connection: a stream, the host's socket, and what is under way between them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use event_manager::EventSet;
use rustix::net::{Shutdown, shutdown};

use super::connections::Ports;
use crate::vsock::backlog::Backlog;
use crate::vsock::stream::{Phase, Stream};

pub(super) struct Connection {
    pub(super) ports: Ports,
    pub(super) stream: Stream,
    /// Watched by epoll while it is here.
    pub(super) socket: Option<OwnedFd>,
    pub(super) backlog: Backlog,
    /// The socket has, or may have, something to read: bytes, or its end.
    pub(super) readable: bool,
    /// Epoll has told of the end of what it has to read: no other event will.
    pub(super) ended: bool,
    /// The socket has taken everything so far.
    pub(super) writable: bool,
    shut_to_host: bool,
    shut_to_guest: bool,
    /// Chains to fill by the next read.
    pub(super) burst: usize,
    /// In the queue of those that have data for the guest.
    pub(super) queued: bool,
    /// In the queue of those that owe the guest a packet without data.
    pub(super) urgent: bool,
    /// When patience ends with whoever has to act now.
    pub(super) deadline: Option<Duration>,
    /// Until when the guest's connection is tried.
    pub(super) dial_until: Duration,
}

impl Connection {
    pub(super) fn new(ports: Ports, stream: Stream) -> Self {
        Self {
            ports,
            stream,
            socket: None,
            backlog: Backlog::default(),
            readable: true,
            ended: false,
            writable: true,
            shut_to_host: false,
            shut_to_guest: false,
            burst: 1,
            queued: false,
            urgent: false,
            deadline: None,
            dial_until: Duration::ZERO,
        }
    }

    /// What epoll says of the socket.
    pub(super) fn event(&mut self, events: EventSet) {
        let gone = EventSet::HANG_UP | EventSet::ERROR;
        self.readable |= events.intersects(EventSet::IN | EventSet::READ_HANG_UP | gone);
        self.ended |= events.intersects(EventSet::READ_HANG_UP | gone);
        self.writable |= events.intersects(EventSet::OUT | gone);
        if events.intersects(gone) {
            // Both ways are shut: what is left to read is read, and nothing will be taken.
            self.host_takes_no_more();
        }
    }

    fn host_takes_no_more(&mut self) {
        self.backlog.clear();
        self.stream.host_takes_no_more();
    }

    /// What a write came to.
    pub(super) fn sent(&mut self, result: io::Result<usize>) -> usize {
        match result {
            Ok(took) => took,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.writable = false;
                0
            }
            Err(_) => {
                self.host_takes_no_more();
                0
            }
        }
    }

    /// A read failed: the host is gone, unless there is just nothing yet.
    pub(super) fn receive_failed(&mut self, error: &io::Error) {
        match error.kind() {
            io::ErrorKind::Interrupted => self.readable = true,
            io::ErrorKind::WouldBlock => {}
            _ => {
                self.stream.host_sends_no_more();
                self.host_takes_no_more();
            }
        }
    }

    /// Ends the stream at once: what is under way to the host is lost.
    pub(super) fn break_off(&mut self) {
        if self.stream.phase() != Phase::Gone {
            self.stream.refuse();
            self.host_takes_no_more();
        }
    }

    /// The guest has answered: the host's client is told, and may go on.
    pub(super) fn opened(&mut self) {
        let words = format!("OK {}\n", self.ports.0);
        self.backlog.say(&words);
        self.deadline = None;
    }

    /// Moves on what is under way to the host.
    pub(super) fn flush(&mut self) {
        while self.writable && !self.backlog.is_empty() {
            let Some(socket) = &self.socket else {
                return;
            };
            let before = self.backlog.len();
            let result = self.backlog.send(socket.as_fd());
            let took = self.sent(result);
            self.stream
                .delivered(u32::try_from(took).unwrap_or(u32::MAX));
            if self.backlog.len() == before {
                break;
            }
        }
        self.shut();
    }

    /// Passes the end of a direction on.
    fn shut(&mut self) {
        let Some(socket) = &self.socket else {
            return;
        };
        let stream = &self.stream;
        let to_host = stream.guest_is_done() && self.backlog.is_empty();
        let to_guest = stream.guest_takes_no_more();
        // Each fails only if the host is gone, of which epoll tells.
        if to_host && !std::mem::replace(&mut self.shut_to_host, true) {
            let _ = shutdown(socket, Shutdown::Write);
        }
        if to_guest && !std::mem::replace(&mut self.shut_to_guest, true) {
            let _ = shutdown(socket, Shutdown::Read);
        }
    }

    /// Nothing goes between stream and socket any more.
    pub(super) fn is_through(&self) -> bool {
        matches!(self.stream.phase(), Phase::Closing | Phase::Gone) && self.backlog.is_empty()
    }

    /// Whether it owes the guest a packet without data, and whether it has data for it.
    pub(super) fn wants(&mut self) -> (bool, bool) {
        let readable = self.readable && self.socket.is_some();
        let room = self.stream.room() > 0;
        self.stream.blocked(readable && !room);
        (self.stream.due().is_some(), readable && room)
    }
}
