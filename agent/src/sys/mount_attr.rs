//! `mount_setattr(2)`, Linux 5.12.
#![expect(unsafe_code, reason = "no safe wrapper offers mount_setattr")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// Attributes to set and to clear: `MOUNT_ATTR_*`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct MountAttr {
    pub(crate) set: u64,
    pub(crate) clear: u64,
    /// `MS_SHARED`, `MS_PRIVATE`, `MS_SLAVE`, `MS_UNBINDABLE` or 0.
    pub(crate) propagation: u64,
}

pub(crate) const RDONLY: u64 = 0x1;
pub(crate) const NOSUID: u64 = 0x2;
pub(crate) const NODEV: u64 = 0x4;
pub(crate) const NOEXEC: u64 = 0x8;
pub(crate) const NOATIME: u64 = 0x10;
pub(crate) const STRICTATIME: u64 = 0x20;
pub(crate) const ATIME: u64 = 0x70;
pub(crate) const NODIRATIME: u64 = 0x80;
pub(crate) const NOSYMFOLLOW: u64 = 0x20_0000;
const IDMAP: u64 = 0x10_0000;

/// `struct mount_attr`, `include/uapi/linux/mount.h`.
#[repr(C)]
struct Raw {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Applies to the mount that `mount` is the root of, and with `recursive` to all below it. With a user
/// namespace the mount's ids are mapped by it; the mount must not have been attached yet.
pub(crate) fn set(
    mount: impl AsFd,
    attr: MountAttr,
    recursive: bool,
    user_namespace: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut raw = Raw {
        set: attr.set,
        clear: attr.clear,
        propagation: attr.propagation,
        userns_fd: 0,
    };
    if let Some(namespace) = user_namespace {
        raw.set |= IDMAP;
        raw.userns_fd = u64::try_from(namespace.as_raw_fd()).unwrap_or_default();
    }
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the descriptor is open, the path an empty C string, pointer and size those of one live struct
    // of the kernel's layout, which is only read.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const raw,
            size_of::<Raw>(),
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
