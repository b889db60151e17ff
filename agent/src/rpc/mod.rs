//! The server: connections, their frames, and the way of an answer back.
//!
//! Everything here runs on the loop and never blocks. What a client can make grow is bounded: frames by
//! the protocol, requests under way and bytes not yet taken by constants here.

mod connection;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::SocketFlags;
use testudo_agent_protocol::{Frame, refusal, response};

use connection::Connection;
pub(crate) use connection::Incoming;

use crate::failure::Failure;
use crate::poll::{Poll, READ, Source};

/// Connections at once.
const MOST_CONNECTIONS: usize = 64;

/// Whom to answer. Each is answered once.
#[derive(Debug)]
#[must_use = "somebody waits for an answer"]
pub(crate) struct ReplyTo {
    connection: u32,
    stream: u32,
}

/// All connections.
pub(crate) struct Server {
    listener: OwnedFd,
    connections: BTreeMap<u32, Connection>,
    next: u32,
}

impl Server {
    /// Takes a listening socket.
    pub(crate) fn new(listener: OwnedFd, poll: &Poll) -> io::Result<Self> {
        poll.add(&listener, Source::RequestListener, READ)?;
        Ok(Self {
            listener,
            connections: BTreeMap::new(),
            next: 0,
        })
    }

    /// Somebody connects.
    pub(crate) fn accept(&mut self, poll: &Poll) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while let Ok(socket) = rustix::net::accept_with(&self.listener, flags) {
            if self.connections.len() >= MOST_CONNECTIONS {
                log::warn!("more than {MOST_CONNECTIONS} connections: one more is refused");
                continue;
            }
            let id = self.next;
            self.next = self.next.wrapping_add(1);
            if poll
                .add(socket.as_fd(), Source::Connection(id), READ)
                .is_ok()
            {
                self.connections.insert(id, Connection::new(socket));
            }
        }
    }

    /// A connection is ready; gives the requests that are complete.
    pub(crate) fn ready(&mut self, id: u32, poll: &Poll) -> Vec<(ReplyTo, Incoming)> {
        let Some(connection) = self.connections.get_mut(&id) else {
            return Vec::new();
        };
        let (requests, going_on) = connection.turn();
        if going_on {
            poll.change(&*connection, Source::Connection(id), connection.wants());
        } else {
            self.close(id, poll);
        }
        let to = |stream| ReplyTo {
            connection: id,
            stream,
        };
        requests
            .into_iter()
            .map(|(stream, incoming)| (to(stream), incoming))
            .collect()
    }

    /// Answers.
    #[expect(clippy::needless_pass_by_value, reason = "an answer is given once")]
    pub(crate) fn answer(&mut self, to: ReplyTo, answer: Result<Vec<u8>, Failure>, poll: &Poll) {
        let frame: Frame = match answer {
            Ok(payload) => response(to.stream, payload),
            Err(failure) => refusal(to.stream, failure.code, &failure.to_string()),
        };
        let Some(connection) = self.connections.get_mut(&to.connection) else {
            // Whoever asked has gone.
            return;
        };
        if connection.send(&frame) {
            poll.change(
                &*connection,
                Source::Connection(to.connection),
                connection.wants(),
            );
        } else {
            self.close(to.connection, poll);
        }
    }

    /// Bytes of answers that clients have not taken yet.
    pub(crate) fn unsent(&self) -> usize {
        self.connections.values().map(Connection::unsent).sum()
    }

    pub(crate) fn count(&self) -> usize {
        self.connections.len()
    }

    fn close(&mut self, id: u32, poll: &Poll) {
        if let Some(connection) = self.connections.remove(&id) {
            poll.remove(&connection);
        }
    }
}
