//! A file mapped for reading while nobody can change it.
//!
//! Touching a mapped page behind the end of its file is a SIGBUS, which would let whoever can
//! truncate a kernel image kill the VMM that is starting from it. So a file is mapped only under
//! a guard that rules this out for as long as the mapping lives:
//!
//! * a read lease (`F_SETLEASE`, fcntl(2)): granted when no process has the file open for writing
//!   and the caller owns it or has CAP_LEASE. Whoever then opens it for writing or truncates it
//!   waits until the lease is given back (or `/proc/sys/fs/lease-break-time`, 45 s, has passed: a
//!   thousand times what a load takes); or
//! * a memfd sealed against shrinking and writing.
//!
//! Everything else is read with pread(2), which answers a vanished page with an error.
#![expect(unsafe_code, reason = "mmap, madvise and fcntl")]

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::{io, ptr, slice};

const PAGE: usize = 4096;

/// The signal that announces a broken lease, fcntl(2); the libc crate does not have it for glibc.
const F_SETSIG: i32 = 10;

/// The same on every architecture; the libc crate does not have it for glibc.
const SYS_CACHESTAT: libc::c_long = 451;

/// The lease on a file, or proof that it needs none.
#[derive(Debug)]
struct Guard<'f> {
    leased: Option<BorrowedFd<'f>>,
}

impl<'f> Guard<'f> {
    /// `None` if the file cannot be kept from changing.
    fn new(file: &'f File) -> Option<Self> {
        const SEALS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_WRITE;
        let fd = file.as_fd();
        if fcntl(fd, libc::F_GET_SEALS, 0).is_ok_and(|seals| seals & SEALS == SEALS) {
            return Some(Self { leased: None });
        }
        // A lease that is broken is announced by SIGIO, whose default is to kill; SIGURG's is
        // nothing. The lease ends in a moment anyway.
        fcntl(fd, F_SETSIG, libc::SIGURG).ok()?;
        fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK).ok()?;
        Some(Self { leased: Some(fd) })
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if let Some(fd) = self.leased
            && let Err(error) = fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK)
        {
            log::warn!("a file lease could not be given back: {error}");
        }
    }
}

fn fcntl(fd: BorrowedFd<'_>, command: i32, argument: i32) -> io::Result<i32> {
    // SAFETY: the descriptor is open for the borrow, and the commands used here take an int or
    // nothing, so the kernel reads and writes no memory of ours.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, argument) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// The whole of a file, mapped read-only. Fields are dropped in order: the pages go before the
/// guard that keeps them valid.
#[derive(Debug)]
pub(crate) struct Mapping<'f> {
    pages: Pages,
    file: &'f File,
    _guard: Guard<'f>,
}

/// The mapped pages. Without the guard they are good for nothing but being unmapped.
#[derive(Debug)]
pub(crate) struct Pages {
    addr: *mut libc::c_void,
    size: usize,
}

impl<'f> Mapping<'f> {
    /// Maps `file`, or `None` if it cannot be mapped or cannot be kept from changing: read it then.
    pub(crate) fn new(file: &'f File) -> Option<Self> {
        let guard = Guard::new(file)?;
        let size = usize::try_from(file.metadata().ok()?.len()).ok()?;
        // SAFETY: no address is asked for, so no mapping of ours is replaced.
        let addr = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        (addr != libc::MAP_FAILED).then_some(Self {
            pages: Pages { addr, size },
            file,
            _guard: guard,
        })
    }

    /// Gives the guard up. What is left is not looked at again, so the file may change.
    pub(crate) fn into_pages(self) -> Pages {
        self.pages
    }

    /// The bytes in `range` of the file, brought into the page cache, or an error if the file has no such bytes or they cannot be read from the disk.
    pub(crate) fn bytes(&self, range: &Range<usize>) -> io::Result<&[u8]> {
        let all = self.pages.as_slice();
        let bytes = all.get(range.clone()).ok_or(io::ErrorKind::UnexpectedEof)?;
        let start = range.start.saturating_sub(range.start % PAGE);
        let len = range.end.saturating_sub(start);
        if !self.is_resident(start, len) {
            self.populate(start, len)?;
        }
        Ok(bytes)
    }

    /// Whether all pages are in the page cache, so that touching them reads nothing. Linux from 6.5
    /// on can tell, by cachestat(2); an older one is taken to say no.
    fn is_resident(&self, start: usize, len: usize) -> bool {
        let (Ok(offset), Ok(length)) = (u64::try_from(start), u64::try_from(len)) else {
            return false;
        };
        let range = [offset, length];
        let mut counts = [0u64; 5];
        // SAFETY: cachestat reads the two numbers of a `cachestat_range`, writes the five of a
        // `cachestat`, and takes no flags.
        let result = unsafe {
            libc::syscall(
                SYS_CACHESTAT,
                self.file.as_raw_fd(),
                range.as_ptr(),
                counts.as_mut_ptr(),
                0,
            )
        };
        let [cached, ..] = counts;
        result == 0 && usize::try_from(cached).is_ok_and(|cached| cached >= len.div_ceil(PAGE))
    }

    /// Reads pages from the disk and maps them, or says why that failed.
    fn populate(&self, start: usize, len: usize) -> io::Result<()> {
        // SAFETY: the caller's page-aligned range lies inside the mapping, and MADV_POPULATE_READ
        // changes residency only.
        let result = unsafe {
            libc::madvise(
                self.pages.addr.wrapping_byte_add(start),
                len,
                libc::MADV_POPULATE_READ,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

// SAFETY: an address and a length; unmapping may happen on any thread.
unsafe impl Send for Pages {}

impl Pages {
    fn as_slice(&self) -> &[u8] {
        // SAFETY: the mapping is readable, `size` bytes long, lives as long as `self`, and by the
        // guard beside it neither shrinks nor changes.
        unsafe { slice::from_raw_parts(self.addr.cast::<u8>(), self.size) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: made by `Mapping::new`, and every slice of it borrowed from the mapping.
        let result = unsafe { libc::munmap(self.addr, self.size) };
        debug_assert_eq!(result, 0, "unmapping a whole mapping cannot fail");
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    #[test]
    fn a_mapped_file_cannot_be_truncated() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, [5; 10_000]).unwrap();
        let file = File::open(&path).unwrap();
        let mapping = Mapping::new(&file).unwrap();
        assert_eq!(mapping.bytes(&(4090..8200)).unwrap(), [5; 4110]);
        assert!(mapping.bytes(&(9_999..10_001)).is_err());
        let opened = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path);
        assert_eq!(opened.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(mapping);
        OpenOptions::new()
            .write(true)
            .truncate(true)
            .open(&path)
            .unwrap();
    }

    #[test]
    fn a_file_somebody_writes_is_not_mapped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let mut writer = File::create(&path).unwrap();
        writer.write_all(b"growing").unwrap();
        assert!(Mapping::new(&File::open(&path).unwrap()).is_none());
    }
}
