//! Device nodes and the links of /dev.

use std::os::fd::BorrowedFd;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Gid, Mode, Uid, chmodat, chownat, makedev, mknodat};
use rustix::io::Errno;
use testudo_agent_protocol::{ContainerSpec, Device};

use super::mounts::{detached, onto};
use super::tree::{self, Kind};
use crate::failure::{During, Failure};

/// The devices every container has (OCI runtime specification, config-linux, default devices).
const DEFAULT: &[(&str, u32, u32)] = &[
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

const LINKS: &[(&str, &str)] = &[
    ("core", "/proc/kcore"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

struct Node<'a> {
    path: &'a str,
    kind: FileType,
    mode: u32,
    owner: (u32, u32),
    number: (u32, u32),
}

/// Makes them all. With `bind` (in a user namespace) the guest's own nodes are mounted instead.
pub(super) fn make(root: BorrowedFd<'_>, spec: &ContainerSpec, bind: bool) -> Result<(), Failure> {
    let given = spec.linux.as_ref().map_or(&[][..], |linux| &linux.devices);
    for (path, major, minor) in DEFAULT {
        // A device of the specification by that name comes instead.
        if given.iter().all(|device| device.path != *path) {
            let node = Node {
                path,
                kind: FileType::CharacterDevice,
                mode: 0o666,
                owner: (0, 0),
                number: (*major, *minor),
            };
            node.put(root, bind)?;
        }
    }
    for device in given {
        Node::of(device)?.put(root, bind)?;
    }
    links(root)
}

impl<'a> Node<'a> {
    fn of(device: &'a Device) -> Result<Self, Failure> {
        let kind = match device.kind.as_str() {
            "c" | "u" => FileType::CharacterDevice,
            "b" => FileType::BlockDevice,
            "p" => FileType::Fifo,
            other => {
                return Err(Failure::invalid(format!(
                    "device {} is of kind {other:?}; known are c, u, b and p",
                    device.path
                )));
            }
        };
        let number = |n: i64| {
            u32::try_from(n)
                .map_err(|_| Failure::invalid(format!("device {} has number {n}", device.path)))
        };
        let number = match kind {
            FileType::Fifo => (0, 0),
            _ => (number(device.major)?, number(device.minor)?),
        };
        Ok(Self {
            path: &device.path,
            kind,
            mode: device.mode.unwrap_or(0o666) & 0o7777,
            owner: (device.uid, device.gid),
            number,
        })
    }

    fn put(&self, root: BorrowedFd<'_>, bind: bool) -> Result<(), Failure> {
        let about = || format!("make device {}", self.path);
        if bind && self.kind != FileType::Fifo {
            return self.bind(root);
        }
        let path = Path::new(self.path);
        let (parent, name) = tree::split(path)?;
        let folder = tree::folders(root, parent)?;
        let device = makedev(self.number.0, self.number.1);
        let mode = Mode::from_raw_mode(self.mode);
        match mknodat(&folder, name, self.kind, mode, device) {
            Ok(()) => {}
            Err(Errno::EXIST) => return self.accept(&folder, name),
            Err(e) => return Err(e).during(about),
        }
        let (uid, gid) = (Uid::from_raw(self.owner.0), Gid::from_raw(self.owner.1));
        chownat(
            &folder,
            name,
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .during(about)?;
        // The umask has had its way with the mode.
        chmodat(&folder, name, mode, AtFlags::empty()).during(about)
    }

    /// What an image or a volume brought along serves if it is that device.
    fn accept(&self, folder: &std::os::fd::OwnedFd, name: &std::ffi::OsStr) -> Result<(), Failure> {
        let about = || format!("look at {}", self.path);
        let stat = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).during(about)?;
        let same = FileType::from_raw_mode(stat.st_mode) == self.kind
            && (self.kind == FileType::Fifo
                || stat.st_rdev == makedev(self.number.0, self.number.1));
        if same {
            return Ok(());
        }
        Err(Failure::invalid(format!(
            "{} exists in the root and is something else",
            self.path
        )))
    }

    fn bind(&self, root: BorrowedFd<'_>) -> Result<(), Failure> {
        let about = || format!("mount the guest's {}", self.path);
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        let of = rustix::fs::open(self.path, flags, Mode::empty()).during(about)?;
        let at = tree::ensure(root, Path::new(self.path), Kind::File)?;
        onto(detached(of, false).during(about)?, at).during(about)
    }
}

fn links(root: BorrowedFd<'_>) -> Result<(), Failure> {
    let dev = tree::folders(root, Path::new("/dev"))?;
    for (name, target) in LINKS {
        match rustix::fs::symlinkat(*target, &dev, *name) {
            // As an image or a volume brought it.
            Ok(()) | Err(Errno::EXIST | Errno::ROFS) => {}
            Err(e) => return Err(e).during(|| format!("link /dev/{name}")),
        }
    }
    Ok(())
}
