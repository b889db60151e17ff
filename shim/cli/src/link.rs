//! What a command and a pod's supervisor say to each other, over a `SOCK_SEQPACKET` socket.
//!
//! ```text
//!  command ─▶ supervisor   Ask (JSON), with its stdout and stderr by SCM_RIGHTS where it attaches;
//!                          then Ask::…, or bytes of standard input: a packet that begins with 0
//!  supervisor ─▶ command   Tell (JSON)
//! ```
//! Output never passes through here: the supervisor writes it to the descriptors it was given.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};
use testudo_protocol::Connection;

use crate::values::Signal;

/// What begins a packet of standard input.
const INPUT: u8 = 0;
/// Bytes of standard input in one packet.
pub const INPUT_MOST: usize = 32 * 1024;

/// Packets of input that a command may send before it is told that one was taken.
pub const INPUT_WINDOW: usize = 8;

/// What a command asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Ask {
    /// Show me its output, and take my input. Stdout and stderr ride along.
    Attach {
        /// The pod ends when I go without a word.
        owner: bool,
        /// I shall send input.
        stdin: bool,
    },
    /// Tell me its end.
    Wait,
    /// I go; the pod stays.
    Detach,
    /// There is no more input.
    EndOfInput,
    /// My terminal has this size.
    Resize {
        /// Rows.
        rows: u16,
        /// Columns.
        columns: u16,
    },
    /// To the container's first process, or all of them.
    Signal {
        /// Which.
        signal: Signal,
    },
    /// Ask the container to end; end it if it has not within these seconds.
    Stop {
        /// Seconds.
        timeout_s: u64,
    },
    /// Let nothing of the container run.
    Pause,
    /// Let it run again.
    Resume,
}

/// What a supervisor tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tell {
    /// The container runs.
    Started,
    /// It could not be started.
    Failed {
        /// Why, for a person.
        why: String,
        /// As a shell counts.
        code: u8,
    },
    /// It has ended, and all that was written has been passed on.
    Exited {
        /// As a shell counts.
        code: u8,
        /// What ended it, if not the container itself.
        why: Option<String>,
    },
    /// One packet of input has been taken; another may be sent.
    Taken,
    /// Asked and done.
    Done,
    /// Asked and not done.
    Refused {
        /// Why.
        why: String,
    },
}

/// What came.
#[derive(Debug)]
pub enum Incoming {
    /// A question and descriptors.
    Ask(Ask, Vec<OwnedFd>),
    /// Standard input.
    Input(Vec<u8>),
    /// The other end has gone.
    Gone,
}

/// One end.
pub struct Link(pub Connection);

impl Link {
    /// Asks.
    pub fn ask(&self, ask: &Ask, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.0.send(&serde_json::to_vec(ask)?, fds)
    }

    /// Tells.
    pub fn tell(&self, tell: &Tell) -> io::Result<()> {
        self.0.send(&serde_json::to_vec(tell)?, &[])
    }

    /// Sends input, at most [`INPUT_MOST`] bytes of it.
    pub fn input(&self, bytes: &[u8]) -> io::Result<()> {
        let mut packet = Vec::with_capacity(bytes.len().saturating_add(1));
        packet.push(INPUT);
        packet.extend_from_slice(bytes);
        self.0.send(&packet, &[])
    }

    /// What the supervisor tells next; nothing when it has gone.
    pub fn told(&self) -> io::Result<Option<Tell>> {
        let mut received = self.0.receive();
        if received
            .as_ref()
            .is_err_and(|e| e.kind() == io::ErrorKind::ConnectionReset)
        {
            // It went without reading everything from here; what it had told before comes after that.
            received = self.0.receive();
        }
        let message = received?.message;
        if message.is_empty() {
            return Ok(None);
        }
        Ok(Some(serde_json::from_slice(&message)?))
    }

    /// What a command says next. What cannot be read is its end.
    pub fn incoming(&self) -> Incoming {
        let Ok(received) = self.0.receive() else {
            return Incoming::Gone;
        };
        match received.message.split_first() {
            None => Incoming::Gone,
            Some((&INPUT, bytes)) => Incoming::Input(bytes.to_vec()),
            Some(_) => match serde_json::from_slice(&received.message) {
                Ok(ask) => Incoming::Ask(ask, received.fds),
                Err(_) => Incoming::Gone,
            },
        }
    }
}
