//! Paths a container shall not see, or not write.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::mounts::{detached, make, onto};
use super::options::Options;
use super::tree::{self, Kind};
use crate::failure::{During, Failure};
use crate::sys::mount_attr::{self, MountAttr, RDONLY};

/// What is mounted over masked files: the guest's own null device. One found in the container could be
/// anything by now.
pub(super) fn null() -> Result<OwnedFd, Failure> {
    rustix::fs::open(
        "/dev/null",
        OFlags::PATH | OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .during(|| "open /dev/null".into())
}

/// Hides a file behind the null device and a folder behind an empty one.
pub(super) fn mask(root: BorrowedFd<'_>, path: &str, null: &OwnedFd) -> Result<(), Failure> {
    let about = || format!("mask {path}");
    let at = match tree::open(root, Path::new(path), OFlags::PATH) {
        Ok(at) => at,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        Err(e) => return Err(e).during(about),
    };
    let cover = match tree::kind_of(&at)? {
        Kind::File => detached(null, false).during(about)?,
        Kind::Folder => {
            let cover = make("tmpfs", "tmpfs", &Options::read(&["size=0", "nr_inodes=1"]))?;
            let attr = MountAttr {
                set: RDONLY,
                ..MountAttr::default()
            };
            mount_attr::set(&cover, attr, false, None).during(about)?;
            cover
        }
    };
    onto(cover, at).during(about)
}

/// Makes a path, with all mounted below it, read-only.
pub(super) fn readonly(root: BorrowedFd<'_>, path: &str) -> Result<(), Failure> {
    let about = || format!("make {path} read-only");
    let at = match tree::open(root, Path::new(path), OFlags::PATH) {
        Ok(at) => at,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        Err(e) => return Err(e).during(about),
    };
    let cover = detached(at.as_fd(), true).during(about)?;
    let attr = MountAttr {
        set: RDONLY,
        ..MountAttr::default()
    };
    mount_attr::set(&cover, attr, true, None).during(about)?;
    onto(cover, at).during(about)
}
