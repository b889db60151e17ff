//! Host memory behind guest RAM.
//!
//! The address space of a mapping is kept for the life of the process: a [`RamView`] taken before
//! a range was removed may still be in use by a device worker, and what it then touches is memory
//! that no longer belongs to the guest, never memory that belongs to somebody else. Removal gives
//! the pages back, which is what costs.
//!
//! [`RamView`]: crate::RamView
#![expect(unsafe_code, reason = "mmap, madvise and memfd_create")]

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::{io, ptr, thread};

use crate::ram::RamError;

/// Who may see the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Share {
    /// Anonymous private memory: this process only.
    #[default]
    Private,
    /// A memfd: can be mapped by vhost-user peers.
    Shared,
}

/// Page size behind the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HugePages {
    /// No transparent huge pages, whatever the host's default (`MADV_NOHUGEPAGE`).
    Never,
    /// Transparent huge pages are asked for (`MADV_HUGEPAGE`).
    #[default]
    Transparent,
    /// hugetlb pages of 2 MiB; they must have been reserved on the host.
    Huge2M,
    /// hugetlb pages of 1 GiB; they must have been reserved on the host.
    Huge1G,
}

impl HugePages {
    /// Page size in bytes for hugetlb kinds.
    fn hugetlb(self) -> Option<u64> {
        match self {
            Self::Never | Self::Transparent => None,
            Self::Huge2M => Some(2 << 20),
            Self::Huge1G => Some(1 << 30),
        }
    }

    fn log2(self) -> Option<i32> {
        match self {
            Self::Never | Self::Transparent => None,
            Self::Huge2M => Some(21),
            Self::Huge1G => Some(30),
        }
    }
}

/// Fault all pages in before the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefault {
    /// Threads that share the work.
    pub threads: NonZeroUsize,
}

/// How guest RAM is backed on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Backing {
    /// Private or shared.
    pub share: Share,
    /// Page size.
    pub huge: HugePages,
    /// Let KSM merge equal pages (`MADV_MERGEABLE`).
    pub mergeable: bool,
    /// Account the memory at once (no `MAP_NORESERVE`), so that a host that cannot hold it says so
    /// at start.
    pub reserve: bool,
    /// Fault the pages in at start.
    pub prefault: Option<Prefault>,
}

/// Alignment that lets the host and KVM use 2-MiB pages.
const HUGE_ALIGN: usize = 2 << 20;

/// One host mapping, aligned to 2 MiB (1 GiB pages: to 1 GiB).
///
/// ```text
///   new ─▶ live ──retire──▶ retired ──revive──▶ live
/// ```
/// A retired mapping holds nothing of the host's; whoever still has its address touches memory that
/// nobody else sees.
#[derive(Debug)]
pub(crate) struct HostMapping {
    pub(crate) addr: usize,
    pub(crate) size: usize,
    pub(crate) file: Option<Arc<File>>,
}

impl HostMapping {
    /// Maps `size` bytes as `backing` says. Prefaulting is a step of its own: [`Self::prefault`].
    pub(crate) fn new(size: u64, backing: &Backing) -> Result<Self, RamError> {
        let host = |action| {
            move |source| RamError::Host {
                action,
                size,
                source,
            }
        };
        if let Some(page) = backing.huge.hugetlb()
            && !size.is_multiple_of(page)
        {
            return Err(RamError::PageSize { size, page });
        }
        let len = usize::try_from(size).map_err(|_| RamError::TooLarge { size })?;
        let file = match backing.share {
            Share::Private => None,
            Share::Shared => Some(Arc::new(
                memfd(size, backing.huge).map_err(host("create a memfd for"))?,
            )),
        };
        let addr = match (backing.huge.log2(), backing.huge.hugetlb()) {
            (Some(log2), Some(page)) => map_hugetlb(len, log2, file.as_deref())
                .map_err(|source| RamError::HugePages { size, page, source })?,
            _ => map_aligned(len, file.as_deref(), backing.reserve).map_err(host("map"))?,
        };
        let mapping = Self {
            addr,
            size: len,
            file,
        };
        mapping.advise(backing).map_err(host("advise"))?;
        Ok(mapping)
    }

    fn advise(&self, backing: &Backing) -> io::Result<()> {
        // Guest RAM in a core dump of the VMM is a leak of the guest's secrets.
        madvise(self.addr, self.size, libc::MADV_DONTDUMP)?;
        let advice = match backing.huge {
            HugePages::Never => Some(libc::MADV_NOHUGEPAGE),
            HugePages::Transparent => Some(libc::MADV_HUGEPAGE),
            HugePages::Huge2M | HugePages::Huge1G => None,
        };
        if let Some(advice) = advice
            // A host built without THP answers EINVAL; there the answer is always never.
            && let Err(error) = madvise(self.addr, self.size, advice)
        {
            log::debug!("this host has no transparent huge pages: {error}");
        }
        if backing.mergeable {
            madvise(self.addr, self.size, libc::MADV_MERGEABLE)?;
        }
        Ok(())
    }

    /// Faults every page in, `threads` at a time in contiguous shares.
    pub(crate) fn prefault(&self, prefault: Prefault) -> io::Result<()> {
        self.prefault_part(0, self.size, prefault)
    }

    /// Faults in `size` bytes at `offset`, which must lie within the mapping.
    pub(crate) fn prefault_part(
        &self,
        offset: usize,
        size: usize,
        prefault: Prefault,
    ) -> io::Result<()> {
        let start = self.addr.saturating_add(offset);
        let share = size
            .div_ceil(prefault.threads.get())
            .next_multiple_of(HUGE_ALIGN);
        thread::scope(|scope| {
            let workers: Vec<_> = (0..size)
                .step_by(share)
                .map(|offset| {
                    let len = share.min(size.saturating_sub(offset));
                    let addr = start.saturating_add(offset);
                    scope.spawn(move || madvise(addr, len, libc::MADV_POPULATE_WRITE))
                })
                .collect();
            workers.into_iter().try_for_each(|w| {
                w.join()
                    .unwrap_or_else(|_| Err(io::Error::other("a prefault thread panicked")))
            })
        })
    }

    /// Gives all pages back to the host; the addresses stay mapped and read as zeroes.
    pub(crate) fn discard(&self) -> io::Result<()> {
        discard(self.addr, self.size, self.file.is_some())
    }

    /// Gives everything back to the host: pages, the memfd, reserved huge pages. The addresses stay
    /// mapped.
    pub(crate) fn retire(&mut self) -> io::Result<()> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        map(self.addr, self.size, access, flags, -1)?;
        self.file = None;
        Ok(())
    }

    /// Makes a retired mapping guest RAM again, empty.
    pub(crate) fn revive(&mut self, backing: &Backing) -> Result<(), RamError> {
        let size = self.size as u64;
        let host = |action| {
            move |source| RamError::Host {
                action,
                size,
                source,
            }
        };
        let file = match backing.share {
            Share::Private => None,
            Share::Shared => Some(Arc::new(
                memfd(size, backing.huge).map_err(host("create a memfd for"))?,
            )),
        };
        let mut flags = libc::MAP_FIXED;
        let fd = match &file {
            Some(file) => {
                flags |= libc::MAP_SHARED;
                file.as_raw_fd()
            }
            None => {
                flags |= libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                -1
            }
        };
        match (backing.huge.log2(), &file) {
            (Some(log2), None) => flags |= libc::MAP_HUGETLB | (log2 << libc::MAP_HUGE_SHIFT),
            (None, _) if !backing.reserve => flags |= libc::MAP_NORESERVE,
            _ => {}
        }
        let access = libc::PROT_READ | libc::PROT_WRITE;
        if let Err(source) = map(self.addr, self.size, access, flags, fd) {
            // The kernel may have taken away what was there before it failed.
            self.retire().map_err(host("map"))?;
            return Err(match backing.huge.hugetlb() {
                Some(page) => RamError::HugePages { size, page, source },
                None => host("map")(source),
            });
        }
        self.file = file;
        self.advise(backing).map_err(host("advise"))
    }
}

/// Gives the pages of a mapping's part back to the host; they read as zeroes afterwards.
pub(crate) fn discard(addr: usize, len: usize, shared: bool) -> io::Result<()> {
    let advice = if shared {
        libc::MADV_REMOVE
    } else {
        libc::MADV_DONTNEED
    };
    madvise(addr, len, advice)
}

fn memfd(size: u64, huge: HugePages) -> io::Result<File> {
    let mut flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    match huge {
        HugePages::Never | HugePages::Transparent => {}
        HugePages::Huge2M => flags |= libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
        HugePages::Huge1G => flags |= libc::MFD_HUGETLB | libc::MFD_HUGE_1GB,
    }
    // SAFETY: the name is a NUL-terminated literal.
    let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: memfd_create returned a new descriptor that nobody else owns.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size)?;
    // A peer that shares the memory must not be able to shrink it under the VMM (SIGBUS).
    // SAFETY: F_ADD_SEALS takes an int.
    let sealed = unsafe {
        libc::fcntl(
            file.as_raw_fd(),
            libc::F_ADD_SEALS,
            libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL,
        )
    };
    if sealed < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

fn map_hugetlb(len: usize, log2: i32, file: Option<&File>) -> io::Result<usize> {
    let huge = libc::MAP_HUGETLB | (log2 << libc::MAP_HUGE_SHIFT);
    match file {
        Some(file) => map(
            0,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
        ),
        None => map(
            0,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | huge,
            -1,
        ),
    }
}

/// Reserves address space with slack, maps at the first aligned address, returns the slack.
fn map_aligned(len: usize, file: Option<&File>, reserve: bool) -> io::Result<usize> {
    let too_large = || io::Error::from(io::ErrorKind::OutOfMemory);
    let span = len.checked_add(HUGE_ALIGN).ok_or_else(too_large)?;
    let start = map(
        0,
        span,
        libc::PROT_NONE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        -1,
    )?;
    let aligned = start.next_multiple_of(HUGE_ALIGN);
    let mut flags = libc::MAP_FIXED | if reserve { 0 } else { libc::MAP_NORESERVE };
    let fd = match file {
        Some(file) => {
            flags |= libc::MAP_SHARED;
            file.as_raw_fd()
        }
        None => {
            flags |= libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            -1
        }
    };
    let mapped = map(aligned, len, libc::PROT_READ | libc::PROT_WRITE, flags, fd);
    let end = aligned.saturating_add(len);
    match mapped {
        Ok(_) => {
            unmap(start, aligned.saturating_sub(start));
            unmap(end, start.saturating_add(span).saturating_sub(end));
            Ok(aligned)
        }
        Err(error) => {
            unmap(start, span);
            Err(error)
        }
    }
}

fn map(addr: usize, len: usize, prot: i32, flags: i32, fd: i32) -> io::Result<usize> {
    // SAFETY: without MAP_FIXED the kernel chooses unused addresses; with it, the caller passes
    // addresses inside a reservation it made for this purpose.
    let got = unsafe { libc::mmap(ptr::without_provenance_mut(addr), len, prot, flags, fd, 0) };
    if got == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(got.expose_provenance())
}

fn unmap(addr: usize, len: usize) {
    if len == 0 {
        return;
    }
    // SAFETY: only slack of a reservation made by `map_aligned` comes here; nothing points to it.
    let result = unsafe { libc::munmap(ptr::without_provenance_mut(addr), len) };
    debug_assert_eq!(result, 0, "unmapping slack cannot fail");
}

fn madvise(addr: usize, len: usize, advice: i32) -> io::Result<()> {
    // SAFETY: the range is a mapping of guest RAM, which Rust references never point into; the
    // advices used here change residency and accounting, not validity.
    let result = unsafe { libc::madvise(ptr::with_exposed_provenance_mut(addr), len, advice) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
