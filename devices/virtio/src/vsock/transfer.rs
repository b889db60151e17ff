//! Bytes between guest RAM and sockets, without a copy in between. Sockets never block here.
#![expect(unsafe_code, reason = "vectored I/O on guest RAM")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

/// The most pieces one call takes (`IOV_MAX`).
const MOST: usize = 1024;

/// Pieces of guest RAM, in order.
#[derive(Default)]
pub(super) struct Pieces<'a> {
    slices: Vec<VolatileSlice<'a>>,
}

impl<'a> Pieces<'a> {
    /// Adds `take` bytes of `slices` after the first `skip`; what goes beyond the pieces one call
    /// takes is left out. Returns how many bytes were added.
    pub(super) fn add(
        &mut self,
        slices: &[VolatileSlice<'a>],
        mut skip: usize,
        take: usize,
    ) -> usize {
        let mut left = take;
        for slice in slices {
            let start = skip.min(slice.len());
            skip = skip.saturating_sub(start);
            let bytes = slice.len().saturating_sub(start).min(left);
            if bytes == 0 {
                continue;
            }
            let Ok(piece) = slice.subslice(start, bytes) else {
                break;
            };
            if self.slices.len() >= MOST {
                break;
            }
            self.slices.push(piece);
            left = left.saturating_sub(bytes);
        }
        take.saturating_sub(left)
    }

    fn iovecs(&self) -> Vec<libc::iovec> {
        let iovec = |slice: &VolatileSlice<'_>| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        };
        self.slices.iter().map(iovec).collect()
    }

    /// Fills the pieces from `socket`; returns how many bytes there were, 0 at the end of the stream, and
    /// whether fewer than there is room for mean that no more are there.
    pub(super) fn receive(&self, socket: BorrowedFd<'_>) -> io::Result<(usize, bool)> {
        let mut iovecs = self.iovecs();
        let mut message = message(&mut iovecs);
        // SAFETY: the header names `iovecs`, which outlive the call and describe guest RAM, mapped for
        // the life of the process; the guest may see it change at any time.
        let got =
            unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        // A read also ends behind bytes that descriptors came with, which we do not take.
        Ok((got, message.msg_flags & libc::MSG_CTRUNC == 0))
    }

    /// Sends the pieces to `socket`; returns how many bytes it took.
    pub(super) fn send(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut iovecs = self.iovecs();
        let message = message(&mut iovecs);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: as above; the kernel only reads.
        let took = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
        usize::try_from(took).map_err(|_| io::Error::last_os_error())
    }
}

fn message(iovecs: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeros is a message header without a name, data or control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_mut_ptr();
    message.msg_iovlen = iovecs.len() as _;
    message
}
