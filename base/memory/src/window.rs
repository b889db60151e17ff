//! Host memory that a guest sees beside its RAM: files mapped into it for DAX.
//!
//! A [`HostWindow`] is a stretch of this process's address space. Where the guest sees it is up to
//! a [`GuestWindows`] (KVM's memslots), whose guard keeps the window alive. What is behind parts of
//! a window may change while the guest looks at it; its addresses never go away before the guard.
#![expect(unsafe_code, reason = "mmap at addresses this window owns")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// Windows begin where a 2-MiB page may: the host and KVM then map them with large pages.
const ALIGN: usize = 2 << 20;

/// A stretch of address space, a multiple of 4 KiB, whose parts show files or zeroes.
///
/// Nothing in this process reads or writes it; only the guest does.
#[derive(Debug)]
pub struct HostWindow {
    address: usize,
    len: usize,
    /// What was reserved around it for the sake of alignment.
    reserved: (usize, usize),
}

/// Where a guest sees windows. The guard takes the window away when it is dropped.
pub trait GuestWindows: Send + Sync {
    /// Shows `window` at guest-physical address `gpa`. With `readonly`, a guest's write is not
    /// carried out.
    fn show(
        &self,
        gpa: u64,
        window: &Arc<HostWindow>,
        readonly: bool,
    ) -> io::Result<Box<dyn WindowGuard>>;
}

/// A window in place.
pub trait WindowGuard: Send + Sync {}

impl HostWindow {
    /// Reserves `len` bytes (a multiple of 4 KiB) that read as zeroes and cannot be written.
    pub fn reserve(len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        if len == 0 || !len.is_multiple_of(4096) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let around = len.checked_add(ALIGN).ok_or(io::ErrorKind::InvalidInput)?;
        let start = mmap(0, around, libc::PROT_READ, ANONYMOUS, -1, 0)?;
        Ok(Self {
            address: start.next_multiple_of(ALIGN),
            len,
            reserved: (start, around),
        })
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Never: a window has at least a page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it begins in this process.
    pub fn address(&self) -> usize {
        self.address
    }

    /// Shows `len` bytes of `file` from `file_offset` at `offset` of the window; all are multiples
    /// of 4 KiB. Writes reach the file if it is `writable`. A guest that touches what lies beyond
    /// the end of the file, or of a file that somebody shortens, does not get on until something else is
    /// mapped there.
    pub fn map_file(
        &self,
        offset: u64,
        len: u64,
        file: &File,
        file_offset: u64,
        writable: bool,
    ) -> io::Result<()> {
        let (at, len) = self.part(offset, len)?;
        let file_offset = i64::try_from(file_offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let protection = if writable {
            libc::PROT_READ | libc::PROT_WRITE
        } else {
            libc::PROT_READ
        };
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        mmap(at, len, protection, flags, file.as_raw_fd(), file_offset)?;
        Ok(())
    }

    /// Shows zeroes that a guest may write over in `len` bytes at `offset`; nobody else sees what
    /// it writes.
    pub fn map_scratch(&self, offset: u64, len: u64) -> io::Result<()> {
        let (at, len) = self.part(offset, len)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        mmap(at, len, protection, ANONYMOUS | libc::MAP_FIXED, -1, 0)?;
        Ok(())
    }

    /// Makes `len` bytes at `offset` read as zeroes again.
    pub fn clear(&self, offset: u64, len: u64) -> io::Result<()> {
        let (at, len) = self.part(offset, len)?;
        mmap(at, len, libc::PROT_READ, ANONYMOUS | libc::MAP_FIXED, -1, 0)?;
        Ok(())
    }

    /// The address and length of a part, if it is one.
    fn part(&self, offset: u64, len: u64) -> io::Result<(usize, usize)> {
        let within = offset
            .checked_add(len)
            .is_some_and(|end| len != 0 && end <= self.len());
        let offset = usize::try_from(offset).ok().filter(|_| within);
        let at = offset.and_then(|offset| self.address.checked_add(offset));
        let len = usize::try_from(len).ok();
        match (at, len) {
            (Some(at), Some(len)) if at.is_multiple_of(4096) && len.is_multiple_of(4096) => {
                Ok((at, len))
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

const ANONYMOUS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// `mmap` for callers that own the addresses they name, or name none.
fn mmap(
    at: usize,
    len: usize,
    protection: libc::c_int,
    flags: libc::c_int,
    fd: libc::c_int,
    offset: i64,
) -> io::Result<usize> {
    let at = std::ptr::with_exposed_provenance_mut(at);
    // SAFETY: with MAP_FIXED the range lies in a window's own reservation (`part` checked it),
    // into which no Rust reference points; without, the kernel chooses free addresses.
    let got = unsafe { libc::mmap(at, len, protection, flags, fd, offset) };
    if got == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(got.expose_provenance())
}

impl Drop for HostWindow {
    fn drop(&mut self) {
        let (start, len) = self.reserved;
        // SAFETY: the reservation is this window's own, and nobody shows it to a guest any more:
        // whoever does holds an `Arc` of it.
        unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(start), len) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, SeekFrom, Write};

    use super::*;

    fn byte(window: &HostWindow, offset: usize) -> u8 {
        let at: *const u8 = std::ptr::with_exposed_provenance(window.address + offset);
        // SAFETY: inside the window, which is mapped readable; nobody writes it meanwhile.
        unsafe { at.read_volatile() }
    }

    fn file(content: u8) -> File {
        let mut file = tempfile();
        file.write_all(&vec![content; 8192]).unwrap();
        file
    }

    fn tempfile() -> File {
        // SAFETY: a literal name.
        let fd = unsafe { libc::memfd_create(c"window".as_ptr(), 0) };
        // SAFETY: new, and nobody else's.
        unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(fd) }
    }

    #[test]
    fn parts_show_files_and_zeroes_again() {
        let window = HostWindow::reserve(16 << 12).unwrap();
        assert!(window.address().is_multiple_of(ALIGN));
        let mut seven = file(7);
        window.map_file(8192, 8192, &seven, 0, true).unwrap();
        assert_eq!((byte(&window, 8191), byte(&window, 8192)), (0, 7));
        let at: *mut u8 = std::ptr::with_exposed_provenance_mut(window.address + 8192);
        // SAFETY: mapped writable above; no reference points there.
        unsafe { at.write_volatile(9) };
        let mut first = [0];
        seven.seek(SeekFrom::Start(0)).unwrap();
        seven.read_exact(&mut first).unwrap();
        assert_eq!(first, [9]);
        window.clear(8192, 4096).unwrap();
        assert_eq!((byte(&window, 8192), byte(&window, 12288)), (0, 7));
        window.map_scratch(4096, 4096).unwrap();
        let at: *mut u8 = std::ptr::with_exposed_provenance_mut(window.address + 4096);
        // SAFETY: as above.
        unsafe { at.write_volatile(5) };
        assert_eq!((byte(&window, 4095), byte(&window, 4096)), (0, 5));
    }

    #[test]
    fn nothing_outside_the_window_is_touched() {
        let window = HostWindow::reserve(16 << 12).unwrap();
        let file = file(7);
        for (offset, len) in [
            (0, 0),
            (0, 17 << 12),
            (16 << 12, 4096),
            (u64::MAX - 4095, 4096),
            (4096, u64::MAX),
            (1, 4096),
            (0, 100),
        ] {
            assert!(window.map_file(offset, len, &file, 0, false).is_err());
            assert!(window.clear(offset, len).is_err());
            assert!(window.map_scratch(offset, len).is_err());
        }
        assert!(window.map_file(0, 4096, &file, 1, false).is_err());
        assert!(HostWindow::reserve(0).is_err());
        assert!(HostWindow::reserve(100).is_err());
        assert!(HostWindow::reserve(u64::MAX).is_err());
    }
}
