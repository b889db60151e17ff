//! Memory that the kernel reads and writes: pieces of guest RAM, and a buffer of one's own.
#![expect(unsafe_code, reason = "iovecs cross threads and the border to C")]

use testudo_memory::RamView;
use vm_memory::{GuestMemory, GuestMemoryError, Permissions};

use crate::queue::Buffer;

/// Bytes that any O_DIRECT is content with as an alignment.
const PAGE: usize = 4096;

/// One piece of memory for vectored I/O: guest RAM, which stays mapped for the life of the process,
/// or a buffer that its owner keeps while the kernel uses it. Rust never makes a reference of it.
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct IoVec(libc::iovec);

// SAFETY: an address and a length. What it points to may be used from any thread: guest RAM is
// accessed by its vCPUs all the time, and only the kernel goes through this pointer.
unsafe impl Send for IoVec {}

impl IoVec {
    pub(crate) fn new(base: *mut u8, len: usize) -> Self {
        Self(libc::iovec {
            iov_base: base.cast(),
            iov_len: len,
        })
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.iov_len
    }

    fn is_aligned(&self, to: usize) -> bool {
        self.base().addr().is_multiple_of(to) && self.len().is_multiple_of(to)
    }
}

/// Whether every piece begins and ends at a multiple of `to`.
pub(crate) fn are_aligned(pieces: &[IoVec], to: u32) -> bool {
    usize::try_from(to).is_ok_and(|to| pieces.iter().all(|piece| piece.is_aligned(to)))
}

/// The slice as C has it.
pub(crate) fn as_raw(pieces: &[IoVec]) -> (*const libc::iovec, usize) {
    (pieces.as_ptr().cast(), pieces.len())
}

/// What is left of `pieces` behind the first `bytes`.
pub(crate) fn advance(pieces: &mut [IoVec], bytes: usize) -> &mut [IoVec] {
    let mut left = bytes;
    let mut done = 0_usize;
    for piece in pieces.iter_mut() {
        if left < piece.len() {
            piece.0.iov_base = piece.base().wrapping_add(left).cast();
            piece.0.iov_len = piece.len().saturating_sub(left);
            break;
        }
        left = left.saturating_sub(piece.len());
        done = done.saturating_add(1);
    }
    pieces.get_mut(done..).unwrap_or_default()
}

/// Adds the `len` bytes that follow the first `skip` of `buffers`, which are checked against `ram`
/// again, to `pieces`.
pub(crate) fn gather(
    pieces: &mut Vec<IoVec>,
    buffers: &[Buffer],
    ram: &RamView,
    skip: u32,
    len: u64,
    access: Permissions,
) -> Result<(), GuestMemoryError> {
    let (mut skip, mut len) = (skip, len);
    for buffer in buffers {
        let start = skip.min(buffer.len);
        skip = skip.saturating_sub(start);
        let here = u64::from(buffer.len.saturating_sub(start)).min(len);
        len = len.saturating_sub(here);
        if here == 0 {
            continue;
        }
        let bytes = usize::try_from(here).unwrap_or(usize::MAX);
        let at = vm_memory::GuestAddress(buffer.address.0.saturating_add(start.into()));
        for slice in ram.get_slices(at, bytes, access)? {
            let slice = slice?;
            pieces.push(IoVec::new(slice.ptr_guard_mut().as_ptr(), slice.len()));
        }
    }
    Ok(())
}

/// A buffer aligned for O_DIRECT.
pub(crate) struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    pub(crate) fn new(len: usize) -> Self {
        let bytes = vec![0; len.saturating_add(PAGE)];
        let start = bytes.as_ptr().align_offset(PAGE);
        Self { bytes, start, len }
    }

    pub(crate) fn slice_mut(&mut self) -> &mut [u8] {
        let end = self.start.saturating_add(self.len);
        self.bytes.get_mut(self.start..end).unwrap_or_default()
    }

    /// Its first `len` bytes, at most all, to be used before anything else is done with it.
    pub(crate) fn iovec(&mut self, len: usize) -> IoVec {
        let all = self.slice_mut();
        IoVec::new(all.as_mut_ptr(), len.min(all.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advancing_drops_what_is_done() {
        let mut memory = Aligned::new(100);
        let base = memory.slice_mut().as_mut_ptr();
        let mut pieces = [
            IoVec::new(base, 10),
            IoVec::new(base.wrapping_add(50), 20),
            IoVec::new(base.wrapping_add(90), 5),
        ];
        let rest = advance(&mut pieces, 14);
        assert_eq!(rest.len(), 2);
        assert_eq!((rest[0].base(), rest[0].len()), (base.wrapping_add(54), 16));
        let rest = advance(rest, 16);
        assert_eq!((rest[0].base(), rest[0].len()), (base.wrapping_add(90), 5));
        assert!(advance(rest, 5).is_empty());
        assert!(advance(&mut [], 5).is_empty());
    }

    #[test]
    fn buffers_are_aligned() {
        let mut buffer = Aligned::new(8192);
        assert!(are_aligned(&[buffer.iovec(8192)], 4096));
        assert!(!are_aligned(&[buffer.iovec(8191)], 512));
        assert_eq!(buffer.slice_mut().len(), 8192);
    }
}
