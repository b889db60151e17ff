//! The host's half: the exported directory, and the system calls made below it.
//!
//! Nothing here resolves more than one component, follows a symbolic link, or opens what is not a
//! regular file or a directory. A node's own descriptor is opened again through `/proc/self/fd`,
//! whose descriptor was opened before the guest ran.
#![expect(
    unsafe_code,
    reason = "getdents64, preadv and pwritev, setfsuid and setfsgid"
)]

use std::cell::Cell;
use std::ffi::CStr;
use std::fmt;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;
use rustix::thread::{CapabilitiesSecureBits, UnshareFlags};
use thiserror::Error;

use super::node::Node;
use super::request::Name;

/// A directory that cannot be exported.
#[derive(Debug, Error)]
pub enum ExportError {
    /// It is something else.
    #[error("it is not a directory")]
    NotADirectory,
    /// The host kernel lacks something.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// The exported directory.
#[derive(Debug)]
pub struct Export {
    /// `/proc/self/fd`.
    descriptors: OwnedFd,
    root: OwnedFd,
}

/// A descriptor's number as a path below `/proc/self/fd`.
pub(super) struct FdName([u8; 12]);

impl FdName {
    pub(super) fn of(fd: impl AsFd) -> Self {
        let mut name = [0; 12];
        // A descriptor has ten digits at most.
        let _ = write!(name.as_mut_slice(), "{}", fd.as_fd().as_raw_fd());
        Self(name)
    }

    pub(super) fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or_default()
    }
}

impl fmt::Display for FdName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.as_c_str().to_string_lossy())
    }
}

const STAT: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::MNT_ID);

pub(super) fn stat(of: impl AsFd) -> Result<Statx, Errno> {
    rustix::fs::statx(of, c"", AtFlags::EMPTY_PATH, STAT)
}

impl Export {
    /// To export `directory`. It is opened again; nothing else is opened by path later.
    pub fn new(directory: &OwnedFd) -> Result<Self, ExportError> {
        let error = |what| {
            move |e: Errno| ExportError::Host {
                what,
                source: e.into(),
            }
        };
        let what = "cannot look at it";
        let found = stat(directory).map_err(error(what))?;
        if FileType::from_raw_mode(found.stx_mode.into()) != FileType::Directory {
            return Err(ExportError::NotADirectory);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let descriptors =
            open_descriptors().map_err(error("cannot open /proc/self/fd; is /proc mounted?"))?;
        let name = FdName::of(directory);
        let root = rustix::fs::openat(&descriptors, name.as_c_str(), flags, Mode::empty())
            .map_err(error("cannot open it again"))?;
        Ok(Self { descriptors, root })
    }

    /// The node of the directory itself.
    pub(super) fn root(&self) -> io::Result<Node> {
        let root = self.root.try_clone()?;
        let found = stat(&root)?;
        Ok(Node::new(root, &found))
    }

    /// What is called `name` in `parent`, without opening it.
    pub(super) fn stat_at(&self, parent: &Node, name: Name<'_>) -> Result<Statx, Errno> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        rustix::fs::statx(parent, name.as_c_str(), flags, STAT)
    }

    /// A descriptor that names what is called `name` in `parent`.
    pub(super) fn find(&self, parent: &Node, name: Name<'_>) -> Result<(Node, Statx), Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let path = below(parent, name, flags, Mode::empty())?;
        let found = stat(&path)?;
        Ok((Node::new(path, &found), found))
    }

    /// Makes a regular file that was not there.
    pub(super) fn create(
        &self,
        parent: &Node,
        name: Name<'_>,
        flags: OFlags,
        mode: Mode,
    ) -> Result<OwnedFd, Errno> {
        let always = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        below(parent, name, flags | always, mode)
    }

    /// A descriptor that names the file behind `open`.
    pub(super) fn name_again(&self, open: impl AsFd) -> Result<(Node, Statx), Errno> {
        let name = FdName::of(open);
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let path = rustix::fs::openat(&self.descriptors, name.as_c_str(), flags, Mode::empty())?;
        let found = stat(&path)?;
        Ok((Node::new(path, &found), found))
    }

    /// Opens a node to be read or written. Only regular files and directories have an inside that
    /// is the export's: opening a device would be an access to it, a FIFO would keep the thread.
    pub(super) fn open(&self, node: &Node, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = match node.kind {
            FileType::RegularFile => flags,
            FileType::Directory => flags | OFlags::DIRECTORY,
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::NXIO),
        };
        let name = FdName::of(node);
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        rustix::fs::openat(&self.descriptors, name.as_c_str(), flags, Mode::empty())
    }

    /// The folder in which a node has the name [`FdName`] has.
    pub(super) fn descriptors(&self) -> BorrowedFd<'_> {
        self.descriptors.as_fd()
    }
}

/// `/proc/self/fd`.
fn open_descriptors() -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(c"/proc/self/fd", flags, Mode::empty())
}

/// Makes the calling thread one that can serve exports, if it is not one yet; who it is.
///
/// It gets a working directory of its own, `/proc/self/fd` (where extended attributes of nodes
/// are reached by name), a file mode mask of its own (none: the guest applies its own), and,
/// if it may change its identity, keeps its capabilities when it does.
pub(super) fn prepare_thread() -> io::Result<Identity> {
    thread_local! {
        static PREPARED: Cell<Option<Identity>> = const { Cell::new(None) };
    }
    if let Some(identity) = PREPARED.get() {
        return Ok(identity);
    }
    let descriptors = open_descriptors()?;
    // SAFETY: CLONE_FS parts the working directory, root and mask of this thread from those
    // of others, which no code of this process takes to be shared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS)? };
    rustix::process::fchdir(descriptors)?;
    rustix::process::umask(Mode::empty());
    let identity = Identity::of_thread();
    PREPARED.set(Some(identity));
    Ok(identity)
}

/// Opens one component below `parent`.
fn below(parent: &Node, name: Name<'_>, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(parent, name.as_c_str(), flags, mode, resolve)
}

/// Who the calling thread is to the file system.
#[derive(Debug, Clone, Copy)]
pub(super) struct Identity {
    uid: u32,
    gid: u32,
    /// It may take those of others.
    changes: bool,
    /// Neither `Send` nor `Sync`: it is about one thread.
    thread: std::marker::PhantomData<*const ()>,
}

/// While it lives, the thread's files belong to somebody else.
#[must_use]
pub(super) struct Assumed<'a> {
    identity: &'a Identity,
    uid: bool,
    gid: bool,
}

const NOBODY: u32 = u32::MAX;

fn set_fs_uid(uid: u32) -> u32 {
    // SAFETY: takes an integer; changes the calling thread alone. It returns the former id.
    let former = unsafe { libc::setfsuid(uid) };
    former.cast_unsigned()
}

fn set_fs_gid(gid: u32) -> u32 {
    // SAFETY: as setfsuid.
    let former = unsafe { libc::setfsgid(gid) };
    former.cast_unsigned()
}

impl Identity {
    fn of_thread() -> Self {
        let (uid, gid) = (set_fs_uid(NOBODY), set_fs_gid(NOBODY));
        // Another user's id can be taken only with the capability to do so.
        let other = if uid == 1 { 2 } else { 1 };
        set_fs_uid(other);
        let changes = set_fs_uid(uid) == other;
        if changes {
            // The guest has checked what its users may do; the host's check would be of the wrong
            // groups. So the capabilities stay when the user changes. Without this bit they go,
            // and the host checks as well.
            let bits = rustix::thread::capabilities_secure_bits();
            let kept = bits.and_then(|bits| {
                let kept = bits | CapabilitiesSecureBits::NO_SETUID_FIXUP;
                rustix::thread::set_capabilities_secure_bits(kept)
            });
            if let Err(e) = kept {
                log::debug!("virtio-fs: capabilities do not stay with other users: {e}");
            }
        }
        Self {
            uid,
            gid,
            changes,
            thread: std::marker::PhantomData,
        }
    }

    /// What the thread creates belongs to `uid` and `gid`, if it may do that at all.
    pub(super) fn assume(&self, uid: u32, gid: u32) -> Result<Assumed<'_>, Errno> {
        let mut assumed = Assumed {
            identity: self,
            uid: false,
            gid: false,
        };
        if !self.changes {
            return Ok(assumed);
        }
        if gid != self.gid {
            assumed.gid = true;
            set_fs_gid(gid);
            if set_fs_gid(NOBODY) != gid {
                return Err(Errno::PERM);
            }
        }
        if uid != self.uid {
            assumed.uid = true;
            set_fs_uid(uid);
            if set_fs_uid(NOBODY) != uid {
                return Err(Errno::PERM);
            }
        }
        Ok(assumed)
    }
}

impl Drop for Assumed<'_> {
    fn drop(&mut self) {
        if self.uid {
            set_fs_uid(self.identity.uid);
        }
        if self.gid {
            set_fs_gid(self.identity.gid);
        }
    }
}

/// A piece of guest RAM in an I/O vector.
pub(super) type Piece = libc::iovec;

/// The most pieces of one call (`IOV_MAX`).
const PIECES_MAX: usize = 1024;

fn call(done: isize) -> Result<usize, Errno> {
    usize::try_from(done)
        .map_err(|_| Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}

/// Reads from `offset` of `file` into `pieces`, as much as there is.
///
/// # Safety
/// Each piece is memory that stays mapped during the call and that no Rust reference points to.
pub(super) unsafe fn read(
    file: BorrowedFd<'_>,
    pieces: &[Piece],
    offset: u64,
) -> Result<usize, Errno> {
    // SAFETY: the caller vouches for the pieces.
    transfer(pieces, offset, |part, count, offset| unsafe {
        libc::preadv64(file.as_raw_fd(), part.as_ptr(), count, offset)
    })
}

/// Writes `pieces` to `file` at `offset`, or at its end if it was opened so.
///
/// # Safety
/// As [`read`].
pub(super) unsafe fn write(
    file: BorrowedFd<'_>,
    pieces: &[Piece],
    offset: u64,
) -> Result<usize, Errno> {
    // SAFETY: the caller vouches for the pieces.
    transfer(pieces, offset, |part, count, offset| unsafe {
        libc::pwritev64(file.as_raw_fd(), part.as_ptr(), count, offset)
    })
}

fn transfer(
    pieces: &[Piece],
    offset: u64,
    io: impl Fn(&[Piece], libc::c_int, i64) -> isize,
) -> Result<usize, Errno> {
    let mut done = 0_usize;
    for part in pieces.chunks(PIECES_MAX) {
        let at = u64::try_from(done).ok().and_then(|d| offset.checked_add(d));
        let at = at
            .and_then(|at| i64::try_from(at).ok())
            .ok_or(Errno::INVAL)?;
        let count = libc::c_int::try_from(part.len()).map_err(|_| Errno::INVAL)?;
        let moved = match call(io(part, count, at)) {
            Ok(moved) => moved,
            Err(_) if done != 0 => break,
            Err(e) => return Err(e),
        };
        done = done.saturating_add(moved);
        let whole = part
            .iter()
            .fold(0_usize, |sum, p| sum.saturating_add(p.iov_len));
        if moved < whole {
            break;
        }
    }
    Ok(done)
}

/// Reads entries of a directory; how many bytes of them, 0 at its end. They are laid out as
/// getdents64(2) says.
pub(super) fn read_entries(dir: impl AsFd, into: &mut [u8]) -> Result<usize, Errno> {
    let fd = dir.as_fd().as_raw_fd();
    // SAFETY: the kernel writes at most `into.len()` bytes to `into`, which is borrowed
    // exclusively.
    let done = unsafe { libc::syscall(libc::SYS_getdents64, fd, into.as_mut_ptr(), into.len()) };
    call(isize::try_from(done).map_err(|_| Errno::INVAL)?)
}

/// Extended attributes of a node, reached by its descriptor's name in the working directory that
/// [`Export::adopt_thread`] gave the thread. An `O_PATH` descriptor itself has none.
pub(super) mod xattr {
    use super::{CStr, Errno, FdName, Node};

    pub(in crate::fs) fn get(of: &Node, name: &CStr, into: &mut [u8]) -> Result<usize, Errno> {
        rustix::fs::getxattr(FdName::of(of).as_c_str(), name, into)
    }

    pub(in crate::fs) fn list(of: &Node, into: &mut [u8]) -> Result<usize, Errno> {
        rustix::fs::listxattr(FdName::of(of).as_c_str(), into)
    }

    pub(in crate::fs) fn set(
        of: &Node,
        name: &CStr,
        value: &[u8],
        flags: rustix::fs::XattrFlags,
    ) -> Result<(), Errno> {
        rustix::fs::setxattr(FdName::of(of).as_c_str(), name, value, flags)
    }

    pub(in crate::fs) fn remove(of: &Node, name: &CStr) -> Result<(), Errno> {
        rustix::fs::removexattr(FdName::of(of).as_c_str(), name)
    }
}
