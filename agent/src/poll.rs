//! The one epoll set. Each registration carries a [`Source`], which is what its owner is found by.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};

/// Whose descriptor became ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// Somebody connects to send requests.
    RequestListener,
    /// Somebody connects to carry a process's bytes.
    StreamListener,
    /// A connection with requests.
    Connection(u32),
    /// A stream whose preamble is not complete.
    Arrival(u32),
    /// A job has ended.
    Jobs,
    /// A child has ended, or somebody wants the agent to.
    Signals,
    /// The kernel has found or lost a device.
    Uevents,
    /// The stage of a process that is being started.
    Starting(u32),
    /// What a relay reads from.
    RelayFrom(u32),
    /// What a relay writes to.
    RelayTo(u32),
    /// A file of a cgroup has changed.
    CgroupFiles,
    /// The machine's power button.
    Button,
}

impl Source {
    fn pack(self) -> u64 {
        let (kind, id) = match self {
            Self::RequestListener => (0, 0),
            Self::StreamListener => (1, 0),
            Self::Connection(id) => (2, id),
            Self::Arrival(id) => (3, id),
            Self::Jobs => (4, 0),
            Self::Signals => (5, 0),
            Self::Uevents => (6, 0),
            Self::Starting(id) => (7, id),
            Self::RelayFrom(id) => (8, id),
            Self::RelayTo(id) => (9, id),
            Self::CgroupFiles => (10, 0),
            Self::Button => (11, 0),
        };
        (kind << 32) | u64::from(id)
    }

    fn unpack(data: u64) -> Option<Self> {
        let id = u32::try_from(data & 0xffff_ffff).ok()?;
        Some(match data >> 32 {
            0 => Self::RequestListener,
            1 => Self::StreamListener,
            2 => Self::Connection(id),
            3 => Self::Arrival(id),
            4 => Self::Jobs,
            5 => Self::Signals,
            6 => Self::Uevents,
            7 => Self::Starting(id),
            8 => Self::RelayFrom(id),
            9 => Self::RelayTo(id),
            10 => Self::CgroupFiles,
            11 => Self::Button,
            _ => return None,
        })
    }
}

/// What a descriptor is ready for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ready(EventFlags);

impl Ready {
    /// The other end is gone altogether, or the descriptor is in error.
    pub(crate) fn broken(self) -> bool {
        self.0.intersects(EventFlags::HUP | EventFlags::ERR)
    }
}

/// What to be told about.
pub(crate) const READ: EventFlags = EventFlags::IN;
pub(crate) const READ_WRITE: EventFlags = EventFlags::IN.union(EventFlags::OUT);
/// Told once for each change; the owner goes on until the descriptor would block.
pub(crate) const READ_EDGE: EventFlags = EventFlags::IN.union(EventFlags::ET);
pub(crate) const WRITE_EDGE: EventFlags = EventFlags::OUT.union(EventFlags::ET);

/// The set.
pub(crate) struct Poll {
    set: OwnedFd,
}

impl Poll {
    pub(crate) fn new() -> io::Result<Self> {
        let set = epoll::create(CreateFlags::CLOEXEC)?;
        Ok(Self { set })
    }

    pub(crate) fn add(&self, fd: impl AsFd, source: Source, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::add(
            &self.set,
            fd,
            EventData::new_u64(source.pack()),
            flags,
        )?)
    }

    /// Also tells again what is ready now.
    pub(crate) fn change(&self, fd: impl AsFd, source: Source, flags: EventFlags) {
        // Fails only for a descriptor that was never added.
        let _ = epoll::modify(&self.set, fd, EventData::new_u64(source.pack()), flags);
    }

    pub(crate) fn remove(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.set, fd);
    }

    /// Waits.
    pub(crate) fn wait(&self) -> io::Result<Vec<(Source, Ready)>> {
        let mut events: Vec<Event> = Vec::with_capacity(32);
        match epoll::wait(&self.set, rustix::buffer::spare_capacity(&mut events), None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
            Err(e) => return Err(e.into()),
        }
        Ok(events
            .iter()
            .filter_map(|event| {
                // Copied out: the struct is packed.
                let (data, flags) = (event.data, event.flags);
                Some((Source::unpack(data.u64())?, Ready(flags)))
            })
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_survive_packing() {
        for source in [
            Source::RequestListener,
            Source::Connection(u32::MAX),
            Source::RelayTo(7),
            Source::CgroupFiles,
        ] {
            assert_eq!(Source::unpack(source.pack()), Some(source));
        }
        assert_eq!(Source::unpack(u64::MAX), None);
    }
}
