//! Paths in a container's root. Every step is resolved by the kernel with the root as the end of the
//! world (`openat2`, RESOLVE_IN_ROOT), whatever links an image has; nothing is looked up twice by name.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::failure::{During, Failure};

const WITHIN: ResolveFlags = ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS);

/// Opens what is there.
pub(crate) fn open(
    root: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), WITHIN)
}

/// What a mount is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Folder,
    File,
}

/// Opens what is there, making it, and folders on the way, if it is not.
pub(crate) fn ensure(root: BorrowedFd<'_>, path: &Path, kind: Kind) -> Result<OwnedFd, Failure> {
    match open(root, path, OFlags::PATH) {
        Ok(fd) => return Ok(fd),
        Err(Errno::NOENT) => {}
        Err(e) => return Err(e).during(|| format!("open {} in the root", path.display())),
    }
    let (parent, name) = split(path)?;
    let folder = folders(root, parent)?;
    let made = match kind {
        Kind::Folder => rustix::fs::mkdirat(&folder, name, Mode::from_raw_mode(0o755)),
        Kind::File => rustix::fs::openat(
            &folder,
            name,
            OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::WRONLY,
            Mode::from_raw_mode(0o644),
        )
        .map(drop),
    };
    match made {
        // A link that leads nowhere is there: what it leads to is not made.
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(e).during(|| format!("make {} in the root", path.display())),
    }
    open(folder.as_fd(), Path::new(name), OFlags::PATH)
        .during(|| format!("open {} in the root", path.display()))
}

/// Opens a folder, making all that is missing.
pub(crate) fn folders(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Failure> {
    let mut so_far = std::path::PathBuf::from("/");
    let mut at =
        open(root, &so_far, OFlags::PATH | OFlags::DIRECTORY).during(|| "open the root".into())?;
    for part in path.components() {
        let name = match part {
            Component::Normal(name) => name,
            Component::RootDir | Component::CurDir => continue,
            Component::ParentDir | Component::Prefix(_) => return Err(parent_in(path)),
        };
        match rustix::fs::mkdirat(&at, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST | Errno::ROFS) => {}
            Err(e) => return Err(e).during(|| format!("make folder {}", path.display())),
        }
        // From the root each time, for the part may be a link.
        so_far.push(name);
        at = open(root, &so_far, OFlags::PATH | OFlags::DIRECTORY)
            .during(|| format!("open folder {} in the root", so_far.display()))?;
    }
    Ok(at)
}

/// A path's folder and its last part.
pub(crate) fn split(path: &Path) -> Result<(&Path, &OsStr), Failure> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) if !name.as_bytes().is_empty() => Ok((parent, name)),
        _ => Err(parent_in(path)),
    }
}

fn parent_in(path: &Path) -> Failure {
    Failure::invalid(format!(
        "{} does not name something in the root; use an absolute path without `..`",
        path.display()
    ))
}

/// What a descriptor is of.
pub(crate) fn kind_of(fd: impl AsFd) -> Result<Kind, Failure> {
    let stat = rustix::fs::statat(fd, "", AtFlags::EMPTY_PATH)
        .during(|| "see what a mount's source is".into())?;
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Kind::Folder,
        _ => Kind::File,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let folder = tempfile::tempdir().unwrap();
        let fd = rustix::fs::open(
            folder.path(),
            OFlags::PATH | OFlags::DIRECTORY,
            Mode::empty(),
        );
        (folder, fd.unwrap())
    }

    #[test]
    fn links_end_at_the_root() {
        let (folder, root) = root();
        fs::create_dir(folder.path().join("etc")).unwrap();
        symlink("/etc", folder.path().join("absolute")).unwrap();
        symlink("../../../../../../etc", folder.path().join("upward")).unwrap();
        for link in ["/absolute/new", "/upward/newer"] {
            ensure(root.as_fd(), Path::new(link), Kind::File).unwrap();
        }
        assert!(folder.path().join("etc/new").exists());
        assert!(folder.path().join("etc/newer").exists());
        assert!(!Path::new("/etc/newer").exists());
    }

    #[test]
    fn folders_on_the_way_are_made() {
        let (folder, root) = root();
        ensure(root.as_fd(), Path::new("/a/b/c/file"), Kind::File).unwrap();
        ensure(root.as_fd(), Path::new("/a/b/c/folder"), Kind::Folder).unwrap();
        assert!(folder.path().join("a/b/c/file").is_file());
        assert!(folder.path().join("a/b/c/folder").is_dir());
    }

    #[test]
    fn dangling_links_and_parents_are_refused() {
        let (folder, root) = root();
        symlink("/nowhere/at/all", folder.path().join("dangling")).unwrap();
        assert!(ensure(root.as_fd(), Path::new("/dangling"), Kind::File).is_err());
        assert!(ensure(root.as_fd(), Path::new("/x/../../y"), Kind::File).is_err());
        assert!(!folder.path().join("nowhere").exists());
    }

    #[test]
    fn magic_links_are_not_followed() {
        let (folder, root) = root();
        fs::create_dir(folder.path().join("proc")).unwrap();
        symlink("/proc/self/root", folder.path().join("out")).unwrap();
        // In this root /proc is an empty folder.
        assert!(open(root.as_fd(), Path::new("/out/etc"), OFlags::PATH).is_err());
    }
}
