//! What the guest sent and the host has not taken yet.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;

use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};

/// Memory an empty backlog keeps.
const KEPT: usize = 4096;

/// Bytes for the host's socket in order. Its bound is credit: who fills it has asked the stream.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    bytes: VecDeque<u8>,
    /// How many of the first bytes are the device's own words and none of the guest's.
    own: usize,
}

impl Backlog {
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Adds bytes of the guest's.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// Says something to the host before anything of the guest's.
    pub(super) fn say(&mut self, words: &str) {
        for byte in words.bytes().rev() {
            self.bytes.push_front(byte);
        }
        self.own = self.own.saturating_add(words.len());
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Sends what `socket` takes; returns how many bytes of the guest's that were. `WouldBlock` only
    /// if it took nothing.
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let (first, second) = self.bytes.as_slices();
        let slices = [IoSlice::new(first), IoSlice::new(second)];
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let took = sendmsg(socket, &slices, &mut SendAncillaryBuffer::default(), flags)?;
        self.bytes.drain(..took.min(self.bytes.len()));
        let own = took.min(self.own);
        self.own = self.own.saturating_sub(own);
        if self.bytes.is_empty() {
            self.bytes.shrink_to(KEPT);
        }
        Ok(took.saturating_sub(own))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn order_is_kept_and_own_words_are_not_the_guests() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut backlog = Backlog::default();
        backlog.push(b"guest");
        backlog.say("OK\n");
        assert_eq!(backlog.len(), 8);
        assert_eq!(backlog.send(near.as_fd()).unwrap(), 5);
        let mut heard = [0; 8];
        far.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"OK\nguest");
        assert!(backlog.is_empty());
    }

    #[test]
    fn a_full_socket_takes_the_rest_later() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let all: Vec<u8> = (0..1_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
        let mut backlog = Backlog::default();
        backlog.push(&all);
        let mut heard: Vec<u8> = Vec::new();
        let mut sent = 0;
        while heard.len() < all.len() {
            match backlog.send(near.as_fd()) {
                Ok(took) => sent += took,
                Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
            }
            let mut some = [0; 50_000];
            let got = far.read(&mut some).unwrap();
            heard.extend(&some[..got]);
        }
        assert_eq!((sent, heard == all), (all.len(), true));
    }
}
