//! The file or block device behind a disk: opened by somebody else, made ready and used here.
//!
//! Every call blocks until the kernel has done it. Workers call them for what is not worth, or not
//! possible, to be done by io_uring; the control thread calls [`Backing::resize`].
#![expect(
    unsafe_code,
    reason = "vectored I/O on guest memory, and calls without a safe wrapper"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;

use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use thiserror::Error;

use crate::iovec::{self, IoVec};

/// `BLKDISCARD` and `BLKZEROOUT`: `_IO(0x12, 119)` and `_IO(0x12, 127)`, which take a range of two
/// `u64`.
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;

/// `TMPFS_MAGIC`, `RAMFS_MAGIC`, `HUGETLBFS_MAGIC`.
const MEMORY_SYSTEMS: [i128; 3] = [0x0102_1994, 0x8584_58f6, 0x9584_58f6];

/// Zeroes written at once where the file system has no call for it.
const ZEROES: usize = 64 << 10;

/// What is behind a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Regular,
    BlockDevice,
}

/// A file cannot be a disk. The message goes on where "disk /path" ended.
#[derive(Debug, Error)]
pub enum BackingError {
    /// Neither a regular file nor a block device.
    #[error("is {what}; a disk is a regular file or a block device")]
    Kind {
        /// What it is.
        what: &'static str,
    },
    /// Not open for what the disk is to do.
    #[error("is not open for {what}; {advice}")]
    Access {
        /// Reading or writing.
        what: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// Somebody else has a lock on it.
    #[error(
        "is in use: another process, or another disk of this VM, has locked it; stop that one first, or use ro on both (lock=off takes the risk)"
    )]
    Busy,
    /// Locks do not work there.
    #[error("cannot be locked; lock=off does without")]
    Lock {
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// O_DIRECT does not work there.
    #[error("cannot be used with `direct`: its file system does not do that; leave direct out")]
    Direct {
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The host does not tell about it.
    #[error("cannot be examined")]
    Examine {
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// How a file is made ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Access {
    pub(super) readonly: bool,
    pub(super) direct: bool,
    pub(super) lock: bool,
}

pub(super) struct Backing {
    file: File,
    kind: Kind,
    readonly: bool,
    /// With O_DIRECT: what memory, offsets and lengths must be multiples of.
    alignment: Option<u32>,
    /// Holes can be punched, or sectors discarded.
    sparse: bool,
    /// Its file system is memory: nothing ever waits for a device.
    in_memory: bool,
}

impl Backing {
    pub(super) fn new(file: File, access: Access) -> Result<Self, BackingError> {
        let examine = |source| BackingError::Examine { source };
        let kind = kind(&file.metadata().map_err(examine)?.file_type())?;
        let flags = rustix::fs::fcntl_getfl(&file).map_err(|e| examine(e.into()))?;
        check_access(flags, access.readonly)?;
        if access.lock {
            lock_file(&file, access.readonly)?;
        }
        // A descriptor that was handed over may have been opened in ways that do not do here:
        // O_APPEND moves every write, O_NONBLOCK makes io_uring give up where it should wait.
        let mut wanted = flags & !(OFlags::APPEND | OFlags::NONBLOCK | OFlags::DIRECT);
        wanted.set(OFlags::DIRECT, access.direct);
        if wanted != flags {
            rustix::fs::fcntl_setfl(&file, wanted)
                .map_err(|e| BackingError::Direct { source: e.into() })?;
        }
        let alignment = match access.direct {
            true => Some(probe_alignment(&file).map_err(|e| BackingError::Direct { source: e })?),
            false => None,
        };
        let mut backing = Self {
            file,
            kind,
            readonly: access.readonly,
            alignment,
            sparse: false,
            in_memory: false,
        };
        let system = rustix::fs::fstatfs(&backing.file).map_err(|e| examine(e.into()))?;
        backing.in_memory =
            backing.is_regular() && MEMORY_SYSTEMS.contains(&i128::from(system.f_type));
        backing.sparse = !access.readonly && backing.probe_sparse().map_err(examine)?;
        Ok(backing)
    }

    pub(super) fn readonly(&self) -> bool {
        self.readonly
    }

    /// With O_DIRECT: what memory, offsets and lengths must be multiples of.
    pub(super) fn alignment(&self) -> Option<u32> {
        self.alignment
    }

    pub(super) fn sparse(&self) -> bool {
        self.sparse
    }

    /// Whether discards and zeroes are `fallocate`, which io_uring does as well.
    pub(super) fn is_regular(&self) -> bool {
        self.kind == Kind::Regular
    }

    /// Whether nothing ever waits for a device.
    pub(super) fn in_memory(&self) -> bool {
        self.in_memory
    }

    /// Bytes in it.
    pub(super) fn size(&self) -> io::Result<u64> {
        match self.kind {
            Kind::Regular => Ok(self.file.metadata()?.len()),
            // Reads and writes name their offset, so moving this one disturbs nobody.
            Kind::BlockDevice => Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?),
        }
    }

    /// Bytes in the logical and the physical block that suit it.
    pub(super) fn block_sizes(&self) -> (u32, u32) {
        let (logical, physical) = match self.kind {
            Kind::BlockDevice => (
                rustix::fs::ioctl_blksszget(&self.file).unwrap_or(512),
                rustix::fs::ioctl_blkpbszget(&self.file).unwrap_or(512),
            ),
            // File systems keep blocks of 4 KiB: smaller writes are read, changed and written.
            Kind::Regular => (512, 4096),
        };
        let logical = logical.max(self.alignment.unwrap_or(512));
        (logical, physical.max(logical))
    }

    /// Makes a regular file `size` bytes long; a block device has the size it has. Returns the
    /// size it then has.
    pub(super) fn resize(&self, size: u64) -> io::Result<u64> {
        if self.is_regular() && !self.readonly && self.size()? != size {
            self.file.set_len(size)?;
        }
        self.size()
    }

    /// Reads into `buffers` from `offset` if all of it is in the page cache; whether it was.
    pub(super) fn read_cached(&self, buffers: &[IoVec], offset: u64, len: u64) -> bool {
        let (iov, count) = iovec::as_raw(buffers);
        let (Ok(count), Ok(at)) = (count.try_into(), offset.try_into()) else {
            return false;
        };
        // SAFETY: as in `read`.
        let read =
            unsafe { libc::preadv2(self.file.as_raw_fd(), iov, count, at, libc::RWF_NOWAIT) };
        u64::try_from(read).is_ok_and(|read| read == len)
    }

    /// Reads into `buffers`, all of them, from `offset`.
    pub(super) fn read(&self, buffers: &mut [IoVec], offset: u64) -> io::Result<()> {
        self.transfer(buffers, offset, |fd, iov, count, at| {
            // SAFETY: `iov` and `count` describe a slice of iovecs that outlives the call, each of
            // which is writable memory (see `IoVec`).
            unsafe { libc::preadv2(fd, iov, count, at, 0) }
        })
    }

    /// Writes `buffers`, all of them, to `offset`; with `durable` they are on stable storage
    /// afterwards.
    pub(super) fn write(
        &self,
        buffers: &mut [IoVec],
        offset: u64,
        durable: bool,
    ) -> io::Result<()> {
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        self.transfer(buffers, offset, |fd, iov, count, at| {
            // SAFETY: as in `read`; the memory is readable.
            unsafe { libc::pwritev2(fd, iov, count, at, flags) }
        })
    }

    fn transfer(
        &self,
        buffers: &mut [IoVec],
        offset: u64,
        call: impl Fn(libc::c_int, *const libc::iovec, libc::c_int, libc::off_t) -> libc::ssize_t,
    ) -> io::Result<()> {
        let (mut rest, mut at) = (buffers, offset);
        while !rest.is_empty() {
            let (iov, count) = iovec::as_raw(rest);
            let count = libc::c_int::try_from(count).map_err(|_| io::ErrorKind::InvalidInput)?;
            let position = libc::off_t::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
            let moved = call(self.file.as_raw_fd(), iov, count, position);
            match usize::try_from(moved) {
                // The file ends before the disk does: somebody cut it.
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(moved) => {
                    rest = iovec::advance(rest, moved);
                    at = at.saturating_add(moved as u64);
                }
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Makes everything that was written durable.
    pub(super) fn flush(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.file)?)
    }

    /// Gives up what is behind a range; what it then reads is undefined.
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.kind {
            Kind::Regular => self.allocate(Self::PUNCH, offset, len),
            Kind::BlockDevice => self.range_call(BLKDISCARD, offset, len),
        }
    }

    /// Makes a range read as zeroes; with `unmap` the blocks behind it may go.
    pub(super) fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let done = match self.kind {
            Kind::Regular => self.allocate(Self::zero_mode(unmap), offset, len),
            Kind::BlockDevice => self.range_call(BLKZEROOUT, offset, len),
        };
        match done {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => self.write_zeroes(offset, len),
            done => done,
        }
    }

    /// `fallocate` that makes a hole.
    pub(super) const PUNCH: FallocateFlags =
        FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

    /// `fallocate` that makes zeroes.
    pub(super) fn zero_mode(unmap: bool) -> FallocateFlags {
        if unmap {
            Self::PUNCH
        } else {
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE
        }
    }

    fn allocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(&self.file, mode, offset, len)?)
    }

    fn range_call(&self, request: libc::c_ulong, offset: u64, len: u64) -> io::Result<()> {
        let range = [offset, len];
        // SAFETY: both requests read two u64 from the pointer, which outlive the call.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), request, range.as_ptr()) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut zeroes = iovec::Aligned::new(ZEROES);
        let (mut at, mut left) = (offset, len);
        while left > 0 {
            let now = usize::try_from(left).unwrap_or(ZEROES).min(ZEROES);
            self.write(&mut [zeroes.iovec(now)], at, false)?;
            at = at.saturating_add(now as u64);
            left = left.saturating_sub(now as u64);
        }
        Ok(())
    }

    /// Whether ranges can be given up. A hole punched behind the end of a file changes nothing in
    /// it; what a block device says is found out by its first discard.
    fn probe_sparse(&self) -> io::Result<bool> {
        match self.kind {
            Kind::BlockDevice => Ok(true),
            Kind::Regular => {
                let end = self.size()?.next_multiple_of(4096);
                Ok(self.allocate(Self::PUNCH, end, 4096).is_ok())
            }
        }
    }
}

impl AsFd for Backing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn kind(of: &std::fs::FileType) -> Result<Kind, BackingError> {
    let what = if of.is_file() {
        return Ok(Kind::Regular);
    } else if of.is_block_device() {
        return Ok(Kind::BlockDevice);
    } else if of.is_dir() {
        "a directory"
    } else if of.is_char_device() {
        "a character device"
    } else if of.is_fifo() {
        "a pipe"
    } else if of.is_socket() {
        "a socket"
    } else {
        "something else"
    };
    Err(BackingError::Kind { what })
}

/// Refuses what cannot be a disk before it is opened: opening a pipe or a character device may
/// block, or do something.
pub fn check_disk_kind(metadata: &std::fs::Metadata) -> Result<(), BackingError> {
    kind(&metadata.file_type()).map(|_| ())
}

fn check_access(flags: OFlags, readonly: bool) -> Result<(), BackingError> {
    let mode = flags & OFlags::ACCMODE;
    if mode == OFlags::WRONLY || flags.contains(OFlags::PATH) {
        return Err(BackingError::Access {
            what: "reading",
            advice: "open it for reading and writing",
        });
    }
    if !readonly && mode != OFlags::RDWR {
        return Err(BackingError::Access {
            what: "writing",
            advice: "open it for reading and writing, or add ro",
        });
    }
    Ok(())
}

/// Takes an open file description lock on the whole file: shared to read, exclusive to write. It
/// goes when the last descriptor of that description is closed.
pub fn lock_file(file: &File, readonly: bool) -> Result<(), BackingError> {
    let kind = if readonly {
        libc::F_RDLCK
    } else {
        libc::F_WRLCK
    };
    let whole = libc::flock {
        l_type: libc::c_short::try_from(kind).unwrap_or_default(),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the call reads a flock from the pointer, which outlives it.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const whole) };
    if result >= 0 {
        return Ok(());
    }
    let source = io::Error::last_os_error();
    match source.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Err(BackingError::Busy),
        _ => Err(BackingError::Lock { source }),
    }
}

/// What O_DIRECT needs, found out by trying: the answer of `statx` is younger than many hosts.
fn probe_alignment(file: &File) -> io::Result<u32> {
    let mut buffer = iovec::Aligned::new(8192);
    let mut last = io::Error::from(io::ErrorKind::InvalidInput);
    for alignment in [512_u32, 1024, 2048, 4096] {
        let size = usize::try_from(alignment).unwrap_or(4096);
        // At an address that is a multiple of this size and not of twice as much.
        let Some(room) = buffer.slice_mut().get_mut(size..size.saturating_mul(2)) else {
            continue;
        };
        match rustix::io::pread(file, room, 0) {
            Ok(_) => return Ok(alignment),
            Err(e) => last = e.into(),
        }
    }
    Err(last)
}
