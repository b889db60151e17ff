//! Attributes, extended attributes, and what the file system as a whole has left.

use std::ffi::CStr;

use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid, XattrFlags,
};
use rustix::io::Errno;
use std::os::fd::AsFd;

use super::host::{self, FdName, xattr};
use super::node::Node;
use super::server::{Answer, Answered, Call, Server};
use super::wire::{
    self, AttrOut, GetattrIn, GetxattrIn, GetxattrOut, SetattrIn, SetxattrIn, StatfsOut, fattr,
    init,
};

/// `PATH_MAX`: no link is longer.
const LINK_MAX: usize = 4096;
/// `XATTR_SIZE_MAX` and `XATTR_LIST_MAX`.
const XATTR_MAX: u32 = 64 << 10;
/// `XATTR_NAME_MAX`.
const XATTR_NAME_MAX: usize = 255;

impl Server {
    fn put_attr(&self, call: &mut Call<'_>, node: &Node) -> Answered {
        let attr = self.attr(&host::stat(node)?);
        Ok(call.put(&AttrOut {
            attr_valid: self.validity(),
            attr_valid_nsec: 0,
            dummy: 0,
            attr,
        }))
    }

    pub(super) fn getattr(&self, call: &mut Call<'_>) -> Answered {
        // A handle would tell the same: its node outlives it.
        let GetattrIn { .. } = call.args.take()?;
        let node = self.node(call.header.nodeid)?;
        self.put_attr(call, &node)
    }

    pub(super) fn setattr(&self, call: &mut Call<'_>) -> Answered {
        let set: SetattrIn = call.args.take()?;
        let node = self.node(call.header.nodeid)?;
        let has = |bit| set.valid & bit != 0;
        // The owner first: changing it clears bits of the mode.
        if has(fattr::UID) || has(fattr::GID) {
            let uid = has(fattr::UID).then(|| Uid::from_raw(set.uid));
            let gid = has(fattr::GID).then(|| Gid::from_raw(set.gid));
            rustix::fs::chownat(&node, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        let name = FdName::of(&*node);
        let (dir, name) = (self.export.descriptors(), name.as_c_str());
        if has(fattr::MODE) {
            let mode = Mode::from_raw_mode(set.mode & 0o7777);
            rustix::fs::chmodat(dir, name, mode, AtFlags::empty())?;
        }
        if has(fattr::SIZE) {
            let kill = has(fattr::KILL_SUIDGID);
            if has(fattr::FH) {
                truncate(&*self.handle(set.fh)?, set.size, kill)?;
            } else {
                truncate(self.export.open(&node, OFlags::WRONLY)?, set.size, kill)?;
            }
        }
        let time = |bit, now, sec: i64, nsec: u32| Timespec {
            tv_sec: sec,
            tv_nsec: match (has(bit), has(now)) {
                (_, true) => UTIME_NOW,
                (true, false) => nsec.into(),
                (false, false) => UTIME_OMIT,
            },
        };
        let times = Timestamps {
            last_access: time(fattr::ATIME, fattr::ATIME_NOW, set.atime, set.atimensec),
            last_modification: time(fattr::MTIME, fattr::MTIME_NOW, set.mtime, set.mtimensec),
        };
        let timed = fattr::ATIME | fattr::MTIME | fattr::ATIME_NOW | fattr::MTIME_NOW;
        if has(timed) {
            rustix::fs::utimensat(dir, name, &times, AtFlags::empty())?;
        }
        self.put_attr(call, &node)
    }

    pub(super) fn readlink(&self, call: &mut Call<'_>) -> Answered {
        let node = self.node(call.header.nodeid)?;
        let mut target = [0; LINK_MAX];
        let len = rustix::fs::readlinkat_raw(&node, c"", &mut target[..])?;
        call.answer
            .extend_from_slice(target.get(..len).unwrap_or_default());
        Ok(Answer::Built)
    }

    pub(super) fn statfs(&self, call: &mut Call<'_>) -> Answered {
        let node = self.node(call.header.nodeid)?;
        let found = rustix::fs::fstatvfs(&node)?;
        let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        Ok(call.put(&StatfsOut {
            blocks: found.f_blocks,
            bfree: found.f_bfree,
            bavail: found.f_bavail,
            files: found.f_files,
            ffree: found.f_ffree,
            bsize: small(found.f_bsize),
            namelen: small(found.f_namemax),
            frsize: small(found.f_frsize),
            ..StatfsOut::default()
        }))
    }

    pub(super) fn getxattr(&self, call: &mut Call<'_>) -> Answered {
        let GetxattrIn { size, .. } = call.args.take()?;
        let name = self.xattr_name(call)?;
        let node = self.node(call.header.nodeid)?;
        attribute(call, size, |into| xattr::get(&node, name, into))
    }

    pub(super) fn listxattr(&self, call: &mut Call<'_>) -> Answered {
        let GetxattrIn { size, .. } = call.args.take()?;
        self.xattrs()?;
        let node = self.node(call.header.nodeid)?;
        attribute(call, size, |into| xattr::list(&node, into))
    }

    pub(super) fn setxattr(&self, call: &mut Call<'_>) -> Answered {
        let SetxattrIn { size, flags } = call.args.take()?;
        let name = self.xattr_name(call)?;
        if size > XATTR_MAX {
            return Err(Errno::TOOBIG);
        }
        let value = call
            .args
            .bytes(usize::try_from(size).map_err(|_| Errno::TOOBIG)?)?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let node = self.node(call.header.nodeid)?;
        xattr::set(&node, name, value, flags)?;
        Ok(Answer::Built)
    }

    pub(super) fn removexattr(&self, call: &mut Call<'_>) -> Answered {
        let name = self.xattr_name(call)?;
        let node = self.node(call.header.nodeid)?;
        xattr::remove(&node, name)?;
        Ok(Answer::Built)
    }

    /// The client asks no more once it has heard that there are none.
    fn xattrs(&self) -> Result<(), Errno> {
        self.options.xattr.then_some(()).ok_or(Errno::NOSYS)
    }

    fn xattr_name<'a>(&self, call: &mut Call<'a>) -> Result<&'a CStr, Errno> {
        self.xattrs()?;
        let name = call.args.string()?;
        let bytes = name.to_bytes();
        if bytes.is_empty() || bytes.len() > XATTR_NAME_MAX {
            return Err(Errno::RANGE);
        }
        // The guest's kernel heeds them only where that was agreed.
        if bytes.starts_with(b"system.posix_acl_") && !self.agreed(init::POSIX_ACL) {
            return Err(Errno::OPNOTSUPP);
        }
        Ok(name)
    }
}

/// Answers with the length of an attribute, if `size` is 0, or with the attribute.
fn attribute(
    call: &mut Call<'_>,
    size: u32,
    read: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
) -> Answered {
    if size == 0 {
        let len = read(&mut [])?;
        return Ok(call.put(&GetxattrOut {
            size: u32::try_from(len).map_err(|_| Errno::TOOBIG)?,
            padding: 0,
        }));
    }
    let size = size.min(XATTR_MAX).min(call.room());
    let header = wire::OUT_HEADER as usize;
    let end = header.saturating_add(usize::try_from(size).map_err(|_| Errno::RANGE)?);
    call.answer.resize(end, 0);
    let len = read(call.answer.get_mut(header..).ok_or(Errno::RANGE)?)?;
    call.answer.truncate(header.saturating_add(len));
    Ok(Answer::Built)
}

fn truncate(file: impl AsFd, size: u64, kill: bool) -> Result<(), Errno> {
    rustix::fs::ftruncate(&file, size)?;
    if kill { drop_privileges(&file) } else { Ok(()) }
}

/// Takes set-user-id and set-group-id away from a file whose contents somebody without the right
/// to keep them has changed. File capabilities the host's kernel takes away itself.
pub(super) fn drop_privileges(file: impl AsFd) -> Result<(), Errno> {
    let mode = Mode::from_raw_mode(u32::from(host::stat(&file)?.stx_mode) & 0o7777);
    let mut kept = mode.difference(Mode::SUID);
    // Without execution for the group the bit means mandatory locking.
    if mode.contains(Mode::XGRP) {
        kept.remove(Mode::SGID);
    }
    if kept != mode {
        rustix::fs::fchmod(&file, kept)?;
    }
    Ok(())
}
