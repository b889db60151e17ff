//! rtnetlink(7): messages as bytes, and a socket that asks the kernel.
//!
//! ```text
//!  nlmsghdr: length, type, flags, sequence, port │ a fixed part │ attributes: length, type, bytes, padding
//! ```

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// `include/uapi/linux/netlink.h`
pub(super) const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
pub(super) const DUMP: u16 = 0x300;
pub(super) const REPLACE: u16 = 0x100;
pub(super) const CREATE: u16 = 0x400;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const HEADER: usize = 16;
/// The kernel answers at once; a lost answer is a bug.
const PATIENCE: Duration = Duration::from_secs(5);
/// The kernel's own bound for a dump's packet.
const PACKET: usize = 32 * 1024;

/// A message in the making.
pub(super) struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// With its fixed part.
    pub(super) fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(flags | REQUEST).to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(fixed);
        Self { bytes }
    }

    /// Adds an attribute.
    pub(super) fn with(mut self, kind: u16, data: &[u8]) -> Self {
        let length = u16::try_from(data.len().saturating_add(4)).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(data);
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
        self
    }

    /// As [`Message::with`], if there is something to add.
    pub(super) fn with_some(self, kind: u16, data: Option<Vec<u8>>) -> Self {
        match data {
            Some(data) => self.with(kind, &data),
            None => self,
        }
    }

    fn finish(mut self, more_flags: u16) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        if let Some(head) = self.bytes.first_chunk_mut::<8>() {
            let [l0, l1, l2, l3] = length.to_ne_bytes();
            let [_, _, _, _, k0, k1, f0, f1] = *head;
            let [f0, f1] = (u16::from_ne_bytes([f0, f1]) | more_flags).to_ne_bytes();
            *head = [l0, l1, l2, l3, k0, k1, f0, f1];
        }
        self.bytes
    }
}

/// A message of the kernel's: type and what follows the header.
pub(super) type Received = (u16, Vec<u8>);

/// A socket to the kernel.
pub(super) struct Socket(OwnedFd);

impl Socket {
    pub(super) fn open() -> rustix::io::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // NETLINK_ROUTE is number 0, which is what no protocol at all asks for.
            None,
        )?;
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self(socket))
    }

    /// Asks for a change; the kernel's answer is the result.
    pub(super) fn change(&self, message: Message) -> rustix::io::Result<()> {
        self.ask(&message.finish(ACK)).map(drop)
    }

    /// Asks for a list.
    pub(super) fn list(&self, message: Message) -> rustix::io::Result<Vec<Received>> {
        self.ask(&message.finish(DUMP))
    }

    fn ask(&self, bytes: &[u8]) -> rustix::io::Result<Vec<Received>> {
        rustix::net::send(&self.0, bytes, SendFlags::empty())?;
        let mut all = Vec::new();
        let mut packet = vec![0; PACKET];
        loop {
            let (length, _) = match rustix::net::recv(&self.0, &mut packet[..], RecvFlags::empty())
            {
                Err(Errno::INTR) => continue,
                received => received?,
            };
            for (kind, body) in messages(packet.get(..length).unwrap_or_default()) {
                match kind {
                    DONE => return Ok(all),
                    ERROR => {
                        let number = body.first_chunk().map_or(0, |b| i32::from_ne_bytes(*b));
                        return match number {
                            0 => Ok(all),
                            number => Err(Errno::from_raw_os_error(number.saturating_neg())),
                        };
                    }
                    _ => all.push((kind, body.to_vec())),
                }
            }
        }
    }
}

fn messages(mut packet: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while let Some([l0, l1, l2, l3, k0, k1, ..]) = packet.first_chunk::<HEADER>() {
        let length = u32::from_ne_bytes([*l0, *l1, *l2, *l3]);
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let Some(body) = packet.get(HEADER..length) else {
            break;
        };
        found.push((u16::from_ne_bytes([*k0, *k1]), body));
        packet = packet.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// The attributes behind a fixed part of that size.
pub(super) fn attributes(body: &[u8], fixed: usize) -> Vec<(u16, &[u8])> {
    let mut rest = body.get(fixed..).unwrap_or_default();
    let mut found = Vec::new();
    while let Some([l0, l1, k0, k1]) = rest.first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([*l0, *l1]));
        let Some(data) = rest.get(4..length) else {
            break;
        };
        // The top bits say how to read it, not what it is.
        found.push((u16::from_ne_bytes([*k0, *k1]) & 0x3fff, data));
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn attributes_come_back() {
        let message = Message::new(16, 0, &[7; 16])
            .with(3, b"eth0\0")
            .with(4, &1500_u32.to_ne_bytes());
        let bytes = message.finish(ACK);
        let all = messages(&bytes);
        assert_eq!(all.len(), 1);
        let found = attributes(all[0].1, 16);
        assert_eq!(found, [(3, &b"eth0\0"[..]), (4, &1500_u32.to_ne_bytes())]);
    }

    proptest! {
        #[test]
        fn nothing_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for (_, body) in messages(&bytes) {
                let _ = attributes(body, 16);
            }
        }
    }
}
