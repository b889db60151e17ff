//! Relays: one direction of bytes from one descriptor to another.
//!
//! Edge-triggered: a relay that was told of a change goes on until one of its two ends would block. One
//! buffer serves them all, for bytes stay in it only within a turn.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::Shutdown;

use crate::poll::{Poll, READ_EDGE, Ready, Source, WRITE_EDGE};

/// One read.
const BUFFER: usize = 256 * 1024;
/// Moved in one turn, so that a busy process does not hold up others.
const TURN: usize = 1 << 20;

/// One direction.
pub(crate) struct Relay {
    from: OwnedFd,
    to: OwnedFd,
    /// Of which process, and which of its descriptors.
    pub(crate) owner: (u32, i32),
    /// Read but not yet taken, from `rest_at` on.
    rest: Vec<u8>,
    rest_at: usize,
    /// Bytes read.
    taken: u64,
    /// Nothing more comes.
    ended: bool,
}

/// How a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// One end would block.
    Blocked,
    /// There is more to do; others first.
    More,
    /// All was passed on and nothing more comes, or nobody takes it.
    Over,
}

impl Relay {
    pub(crate) fn new(from: OwnedFd, to: OwnedFd, owner: (u32, i32)) -> Self {
        Self {
            from,
            to,
            owner,
            rest: Vec::new(),
            rest_at: 0,
            taken: 0,
            ended: false,
        }
    }

    fn turn(&mut self, buffer: &mut [u8]) -> Turn {
        let mut moved = 0_usize;
        loop {
            match self.pass_rest() {
                Turn::More => {}
                other => return other,
            }
            if self.ended {
                return Turn::Over;
            }
            if moved >= TURN {
                return Turn::More;
            }
            let length = match rustix::io::read(&self.from, &mut *buffer) {
                Ok(0) => 0,
                // A terminal whose last user has gone.
                Err(Errno::IO) => 0,
                Ok(length) => length,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Turn::Blocked,
                Err(_) => 0,
            };
            if length == 0 {
                self.ended = true;
                continue;
            }
            moved = moved.saturating_add(length);
            self.taken = self
                .taken
                .saturating_add(u64::try_from(length).unwrap_or_default());
            let bytes = buffer.get(..length).unwrap_or_default();
            match rustix::io::write(&self.to, bytes) {
                Ok(done) if done == length => {}
                Ok(done) => self.rest = bytes.get(done..).unwrap_or_default().to_vec(),
                Err(Errno::AGAIN | Errno::INTR) => self.rest = bytes.to_vec(),
                Err(_) => return Turn::Over,
            }
        }
    }

    /// More: there is nothing left of the last read.
    fn pass_rest(&mut self) -> Turn {
        while let Some(rest) = self
            .rest
            .get(self.rest_at..)
            .filter(|rest| !rest.is_empty())
        {
            match rustix::io::write(&self.to, rest) {
                Ok(done) => self.rest_at = self.rest_at.saturating_add(done),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Turn::Blocked,
                Err(_) => return Turn::Over,
            }
        }
        self.rest_at = 0;
        self.rest = Vec::new();
        Turn::More
    }

    /// Bytes that have been written to what this relay reads, taken or not.
    pub(crate) fn written(&self) -> u64 {
        let waiting = rustix::io::ioctl_fionread(&self.from).unwrap_or_default();
        self.taken.saturating_add(waiting)
    }
}

/// All of them.
pub(crate) struct Relays {
    by_id: BTreeMap<u32, Relay>,
    next: u32,
    buffer: Vec<u8>,
}

impl Relays {
    pub(crate) fn new() -> Self {
        Self {
            by_id: BTreeMap::new(),
            next: 0,
            buffer: Vec::new(),
        }
    }

    /// Adds one; both its ends must not block.
    pub(crate) fn add(&mut self, relay: Relay, poll: &Poll) -> Option<u32> {
        while self.by_id.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        for (fd, source, flags) in [
            (&relay.from, Source::RelayFrom(id), READ_EDGE),
            (&relay.to, Source::RelayTo(id), WRITE_EDGE),
        ] {
            match poll.add(fd, source, flags) {
                Ok(()) => {}
                // A regular file is always ready.
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => {}
                Err(e) => {
                    log::error!("cannot relay: {e}");
                    return None;
                }
            }
        }
        self.by_id.insert(id, relay);
        Some(id)
    }

    pub(crate) fn get(&self, id: u32) -> Option<&Relay> {
        self.by_id.get(&id)
    }

    pub(crate) fn count(&self) -> usize {
        self.by_id.len()
    }

    /// Lets one go on; gives it when it is over.
    pub(crate) fn ready(
        &mut self,
        id: u32,
        to_side: bool,
        ready: Ready,
        poll: &Poll,
    ) -> Option<Ended> {
        let relay = self.by_id.get_mut(&id)?;
        if self.buffer.is_empty() {
            self.buffer = vec![0; BUFFER];
        }
        // Nobody takes it any more, and there may never be something to find out with.
        let refused = to_side && ready.broken();
        match relay.turn(&mut self.buffer) {
            Turn::Blocked if !refused => return None,
            Turn::More => {
                poll.change(&relay.from, Source::RelayFrom(id), READ_EDGE);
                return None;
            }
            Turn::Blocked | Turn::Over => {}
        }
        let relay = self.by_id.remove(&id)?;
        poll.remove(&relay.from);
        poll.remove(&relay.to);
        // The other direction of a stream may go on: only this one ends. On pipes and terminals this fails,
        // and closing them says the same.
        let _ = rustix::net::shutdown(&relay.to, Shutdown::Write);
        let _ = rustix::net::shutdown(&relay.from, Shutdown::Read);
        if self.by_id.is_empty() {
            self.buffer = Vec::new();
        }
        Some(Ended {
            owner: relay.owner,
            bytes: relay.written(),
        })
    }

    /// Ends the relay to a process's descriptor, as if its source had ended.
    pub(crate) fn end(&mut self, owner: (u32, i32), poll: &Poll) {
        let ids: Vec<u32> = self
            .by_id
            .iter()
            .filter(|(_, relay)| relay.owner == owner)
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            if let Some(relay) = self.by_id.remove(&id) {
                poll.remove(&relay.from);
                poll.remove(&relay.to);
            }
        }
    }
}

/// A relay that is over.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) owner: (u32, i32),
    pub(crate) bytes: u64,
}

/// A second descriptor of the same file, which does not block.
pub(crate) fn duplicate(fd: impl AsFd) -> rustix::io::Result<OwnedFd> {
    let fd = rustix::io::fcntl_dupfd_cloexec(fd, 0)?;
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(fd)
}
