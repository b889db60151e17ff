//! Frames over a byte stream, as passt and QEMU's `-netdev stream` speak it: four bytes of length,
//! the most significant first, then a frame as it is on a cable.
//!
//! ```text
//!   socket ─read─▶ Inbox: bytes, at most two frames' worth ─front, consume─▶ guest
//!   guest ─sendmsg─▶ socket;   what it did not take of one frame ─▶ unsent ─flush─▶ socket
//! ```
//! A frame stays in the inbox until the guest has room for it, and the guest's next frame stays in
//! its queue until the one before has gone whole: a slow side costs no more memory than that. Both
//! survive a pause and a reset of the guest's device, for the other side is in the middle of them.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::net::SendFlags;
use testudo_memory::RamView;
use thiserror::Error;
use vm_memory::Permissions;

use super::vectors::{MAX, Vectors};
use super::wire::HEADER;
use crate::queue::Chain;

/// Bytes of length before each frame.
const PREFIX: usize = 4;
/// The longest frame: 64 KiB of packet, its link header and tag.
pub(super) const LONGEST: usize = 65536 + 18;
/// One frame that waits, and room to read on behind it.
const INBOX: usize = 128 << 10;

/// The stream makes no sense, and there is no way back into it.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("it announces a frame of {0} bytes, and there are none of more than {LONGEST}")]
pub(super) struct BadLength(usize);

/// Bytes that were read, of which frames are taken.
pub(super) struct Inbox {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Inbox {
    fn new() -> Self {
        Self {
            bytes: vec![0; INBOX],
            start: 0,
            end: 0,
        }
    }

    fn unread(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    /// The first frame, if all of it is there.
    fn front(&self) -> Result<Option<&[u8]>, BadLength> {
        let Some((prefix, rest)) = self.unread().split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let len = usize::try_from(u32::from_be_bytes(*prefix)).unwrap_or(usize::MAX);
        if len > LONGEST {
            return Err(BadLength(len));
        }
        Ok(rest.get(..len))
    }

    /// Forgets the first frame.
    fn consume(&mut self) {
        if let Ok(Some(frame)) = self.front() {
            let len = frame.len();
            self.start = self.start.saturating_add(PREFIX).saturating_add(len);
        }
    }

    /// Where to read on: never empty, unless the first frame is there.
    fn room(&mut self) -> &mut [u8] {
        if self.start != 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end = self.end.saturating_sub(self.start);
            self.start = 0;
        }
        self.bytes.get_mut(self.end..).unwrap_or_default()
    }

    /// So many bytes were put there.
    fn filled(&mut self, count: usize) {
        self.end = self.end.saturating_add(count).min(self.bytes.len());
    }
}

/// Both directions of a stream.
pub(super) struct Stream {
    inbox: Inbox,
    /// The end of a frame whose beginning was sent.
    unsent: Vec<u8>,
    /// How much of it has gone since.
    gone: usize,
}

/// What became of a frame that shall be sent.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pushed {
    /// It has gone, or will before any other.
    Yes,
    /// There is no room now.
    Later,
    /// No stream carries such a frame.
    Never,
}

impl Stream {
    pub(super) fn new() -> Self {
        Self {
            inbox: Inbox::new(),
            unsent: Vec::new(),
            gone: 0,
        }
    }

    /// Length of the next frame, which is there as a whole. `WouldBlock` if none is yet; any other
    /// error is the end of the stream.
    pub(super) fn front(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        loop {
            let front = self.inbox.front();
            if let Some(frame) = front.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))? {
                return Ok(frame.len());
            }
            match rustix::io::read(socket, self.inbox.room()) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(got) => self.inbox.filled(got),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// The next frame, if [`Self::front`] found one.
    pub(super) fn frame(&self) -> &[u8] {
        self.inbox.front().ok().flatten().unwrap_or_default()
    }

    /// Takes it out.
    pub(super) fn consume(&mut self) {
        self.inbox.consume();
    }

    /// Sends what is left of a frame; whether nothing is.
    pub(super) fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        loop {
            let left = self.unsent.get(self.gone..).unwrap_or_default();
            if left.is_empty() {
                self.unsent.clear();
                self.gone = 0;
                return Ok(true);
            }
            match rustix::net::send(socket, left, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(sent) => self.gone = self.gone.saturating_add(sent),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(false),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Whether a frame is under way.
    pub(super) fn is_sending(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Sends the frame in `chain`, which has a header before it. An error is the end of the stream.
    pub(super) fn push(
        &mut self,
        socket: BorrowedFd<'_>,
        vectors: &mut Vectors,
        ram: &RamView,
        chain: &Chain,
    ) -> io::Result<Pushed> {
        if !self.flush(socket)? {
            return Ok(Pushed::Later);
        }
        let header = u32::try_from(HEADER).unwrap_or(0);
        let frame = chain.readable_len().saturating_sub(header);
        let len = usize::try_from(frame).unwrap_or(usize::MAX);
        vectors.clear();
        let gathered = vectors.push_from(ram, chain.readable(), header, Permissions::Read);
        if len > LONGEST || gathered.is_err() || vectors.len() >= MAX {
            return Ok(Pushed::Never);
        }
        let mut prefix = frame.to_be_bytes();
        let sent = match vectors.send(socket, &mut prefix) {
            Ok(sent) => sent,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Pushed::Later),
            Err(e) => return Err(e),
        };
        self.keep(sent, prefix, len, ram, chain);
        Ok(Pushed::Yes)
    }

    /// Keeps what follows the first `sent` bytes of prefix and frame. The guest may have changed the
    /// frame in the meantime, but not its length.
    fn keep(
        &mut self,
        sent: usize,
        prefix: [u8; PREFIX],
        len: usize,
        ram: &RamView,
        chain: &Chain,
    ) {
        let all = PREFIX.saturating_add(len);
        if sent >= all {
            return;
        }
        let first = prefix.get(sent..).unwrap_or_default();
        let inside = sent.saturating_sub(PREFIX);
        self.unsent.extend_from_slice(first);
        let place = self.unsent.len();
        self.unsent.resize(all.saturating_sub(sent), 0);
        let at = u32::try_from(HEADER.saturating_add(inside)).unwrap_or(u32::MAX);
        let rest = self.unsent.get_mut(place..).unwrap_or_default();
        // Memory that went away is zeroes: the length has been announced.
        if let Err(e) = chain.read(ram, at, rest) {
            log::debug!("virtio-net: the end of a frame is not there any more: {e}");
        }
    }
}

#[cfg(test)]
mod tests;
