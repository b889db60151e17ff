//! A container's mounts. File systems and bind mounts are made detached, get their attributes, and are
//! attached to a descriptor of their destination, so that nothing can be exchanged in between.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};
use testudo_agent_protocol::Mount;

use super::options::Options;
use super::tree::{self, Kind};
use crate::failure::{During, Failure};
use crate::sys::mount_attr::{self, MountAttr, RDONLY};

/// Attaches one mount of a specification. `source` is that of a bind mount.
pub(super) fn attach(
    root: BorrowedFd<'_>,
    mount: &Mount,
    source: Option<OwnedFd>,
) -> Result<(), Failure> {
    let options = Options::of(mount);
    let destination = Path::new(&mount.destination);
    let about = || format!("mount {} on {}", mount.kind, mount.destination);
    let (detached, kind) = match source {
        Some(source) => {
            let kind = tree::kind_of(&source)?;
            (source, kind)
        }
        None => (filesystem(mount, &options)?, Kind::Folder),
    };
    set_attributes(&detached, &options, mount)?;
    let at = match mount.kind.as_str() {
        "proc" | "sysfs" => pseudo_destination(root, destination)?,
        _ => tree::ensure(root, destination, kind)?,
    };
    onto(&detached, &at).during(about)
}

/// /proc and /sys are where they seem to be: what is masked below them later is masked by path.
fn pseudo_destination(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Failure> {
    tree::ensure(root, path, Kind::Folder)?;
    rustix::fs::openat2(
        root,
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS,
    )
    .during(|| {
        format!(
            "use {} of the root, which must be a folder and no link,",
            path.display()
        )
    })
}

/// Attaches a detached mount.
pub(super) fn onto(detached: impl AsFd, at: impl AsFd) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(detached, "", at, "", flags)
}

/// A mount of what a descriptor is of, attached nowhere.
pub(crate) fn detached(of: impl AsFd, recursive: bool) -> rustix::io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(of, "", flags)
}

fn filesystem(mount: &Mount, options: &Options) -> Result<OwnedFd, Failure> {
    let kind = match mount.kind.as_str() {
        // Version 1 is not in this guest.
        "cgroup" => "cgroup2",
        kind => kind,
    };
    make(kind, &mount.source, options)
}

/// A new file system, attached nowhere.
pub(crate) fn make(kind: &str, source: &str, options: &Options) -> Result<OwnedFd, Failure> {
    let about = || format!("make a file system {kind}");
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).during(about)?;
    if !source.is_empty() {
        fsconfig_set_string(&context, "source", source).during(about)?;
    }
    if options.readonly && kind != "cgroup2" && kind != "sysfs" && kind != "proc" {
        fsconfig_set_flag(&context, "ro").during(about)?;
    }
    if options.synchronous {
        fsconfig_set_flag(&context, "sync").during(about)?;
    }
    for (key, value) in &options.data {
        let set = match value {
            Some(value) => fsconfig_set_string(&context, key.as_str(), value.as_str()),
            None => fsconfig_set_flag(&context, key.as_str()),
        };
        set.during(|| format!("give option {key} to a file system {kind}"))?;
    }
    fsconfig_create(&context).during(about)?;
    fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )
    .during(about)
}

fn set_attributes(detached: &OwnedFd, options: &Options, mount: &Mount) -> Result<(), Failure> {
    let about = || {
        format!(
            "set options {} of the mount on {}",
            mount.options.join(","),
            mount.destination
        )
    };
    let mut attr = options.attr;
    if options.readonly {
        attr.set |= RDONLY;
    }
    let propagation = MountAttr {
        propagation: std::mem::take(&mut attr.propagation),
        ..MountAttr::default()
    };
    for (attr, recursive) in [
        (attr, false),
        (options.attr_recursive, true),
        (propagation, options.propagation_recursive),
    ] {
        if attr != MountAttr::default() {
            mount_attr::set(detached, attr, recursive, None).during(about)?;
        }
    }
    Ok(())
}
