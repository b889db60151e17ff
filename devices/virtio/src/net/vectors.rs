//! Guest buffers as one frame of the wire: readv, writev and sendmsg without a copy in between.
#![expect(unsafe_code, reason = "vectored I/O on guest memory")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use testudo_memory::RamView;
use vm_memory::{GuestMemoryError, Permissions};

use crate::iovec::{self, IoVec};
use crate::queue::Buffer;

/// Most pieces one call takes (`IOV_MAX`).
pub(super) const MAX: usize = 1024;

/// Pieces of guest RAM, in order.
#[derive(Default)]
pub(super) struct Vectors(Vec<IoVec>);

impl Vectors {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Forgets the first `count`.
    pub(super) fn drop_front(&mut self, count: usize) {
        self.0.drain(..count.min(self.0.len()));
    }

    /// Forgets all but the first `count`.
    pub(super) fn truncate(&mut self, count: usize) {
        self.0.truncate(count);
    }

    /// Adds `buffers`, which are checked against `ram` again.
    pub(super) fn push(
        &mut self,
        ram: &RamView,
        buffers: &[Buffer],
        access: Permissions,
    ) -> Result<(), GuestMemoryError> {
        self.push_from(ram, buffers, 0, access)
    }

    /// The same without the first `skip` bytes.
    pub(super) fn push_from(
        &mut self,
        ram: &RamView,
        buffers: &[Buffer],
        skip: u32,
        access: Permissions,
    ) -> Result<(), GuestMemoryError> {
        iovec::gather(&mut self.0, buffers, ram, skip, u64::MAX, access)
    }

    /// Reads one frame into the first `count` pieces and what does not fit there into `rest`.
    pub(super) fn read(
        &mut self,
        fd: BorrowedFd<'_>,
        count: usize,
        rest: &mut [u8],
    ) -> io::Result<usize> {
        let last = IoVec::new(rest.as_mut_ptr(), rest.len());
        let at = count.min(self.0.len());
        // The place of a piece beyond those is lent to `rest` for the call.
        let lent = match self.0.get_mut(at) {
            Some(place) => Some(std::mem::replace(place, last)),
            None => {
                self.0.push(last);
                None
            }
        };
        let used = self.0.get(..at.saturating_add(1)).unwrap_or_default();
        let (pieces, count) = iovec::as_raw(used);
        let count = libc::c_int::try_from(count).unwrap_or(libc::c_int::MAX);
        let got = retry(|| {
            // SAFETY: `pieces` are `count` pieces, each guest RAM that stays mapped and writable, or
            // `rest`, which is borrowed for writing; Rust keeps no reference into guest RAM.
            unsafe { libc::readv(fd.as_raw_fd(), pieces, count) }
        });
        match (lent, self.0.get_mut(at)) {
            (Some(piece), Some(place)) => *place = piece,
            _ => self.0.truncate(at),
        }
        got
    }

    /// Writes all pieces as one frame.
    pub(super) fn write(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let (pieces, count) = iovec::as_raw(&self.0);
        let count = libc::c_int::try_from(count).unwrap_or(libc::c_int::MAX);
        retry(|| {
            // SAFETY: `pieces` are `count` pieces of guest RAM that stays mapped and readable; Rust
            // keeps no reference into it.
            unsafe { libc::writev(fd.as_raw_fd(), pieces, count) }
        })
    }

    /// Sends `prefix` and then all pieces over a stream socket, as much of them as it takes. A peer
    /// that is gone is an error and no signal.
    pub(super) fn send(&mut self, fd: BorrowedFd<'_>, prefix: &mut [u8]) -> io::Result<usize> {
        self.0
            .insert(0, IoVec::new(prefix.as_mut_ptr(), prefix.len()));
        let (pieces, count) = iovec::as_raw(&self.0);
        // SAFETY: all zeros is a message header without a name, data or control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = pieces.cast_mut();
        message.msg_iovlen = count as _;
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let sent = retry(|| {
            // SAFETY: the header names `count` pieces: `prefix`, which is borrowed, and guest RAM,
            // which stays mapped; the kernel only reads them and not the header's other fields.
            unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, flags) }
        });
        self.0.remove(0);
        sent
    }
}

fn retry(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        if let Ok(done) = usize::try_from(call()) {
            return Ok(done);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
