//! Guest buffers as the kernel takes them: readv and writev without a copy in between.
#![expect(unsafe_code, reason = "readv and writev on guest memory")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use testudo_memory::RamView;
use vm_memory::{GuestMemory, GuestMemoryError, Permissions};

use crate::queue::Buffer;

/// Most pieces one call takes (`IOV_MAX`).
pub(super) const MAX: usize = 1024;

/// Pieces of guest RAM, by host address. They stay valid: the address space of guest RAM is mapped
/// for the life of the process (`testudo_memory`), even if the guest loses the memory.
#[derive(Default)]
pub(super) struct Vectors(Vec<libc::iovec>);

// SAFETY: the pointers are plain addresses, which only the kernel follows.
unsafe impl Send for Vectors {}

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
        for buffer in buffers {
            let len = usize::try_from(buffer.len).unwrap_or(usize::MAX);
            for slice in ram.get_slices(buffer.address, len, access)? {
                let slice = slice?;
                self.0.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
        }
        Ok(())
    }

    /// Reads one frame into the first `count` pieces and what does not fit there into `rest`.
    pub(super) fn read(
        &mut self,
        fd: BorrowedFd<'_>,
        count: usize,
        rest: &mut [u8],
    ) -> io::Result<usize> {
        let last = libc::iovec {
            iov_base: rest.as_mut_ptr().cast(),
            iov_len: rest.len(),
        };
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
        let pieces = libc::c_int::try_from(used.len()).unwrap_or(libc::c_int::MAX);
        let got = retry(|| {
            // SAFETY: `used` is `pieces` pieces, each guest RAM that stays mapped and writable, or
            // `rest`, which is borrowed for writing; Rust keeps no reference into guest RAM.
            unsafe { libc::readv(fd.as_raw_fd(), used.as_ptr(), pieces) }
        });
        match (lent, self.0.get_mut(at)) {
            (Some(piece), Some(place)) => *place = piece,
            _ => self.0.truncate(at),
        }
        got
    }

    /// Writes all pieces as one frame.
    pub(super) fn write(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let pieces = libc::c_int::try_from(self.0.len()).unwrap_or(libc::c_int::MAX);
        retry(|| {
            // SAFETY: `self.0` is `pieces` pieces of guest RAM that stays mapped and readable; Rust
            // keeps no reference into it.
            unsafe { libc::writev(fd.as_raw_fd(), self.0.as_ptr(), pieces) }
        })
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
