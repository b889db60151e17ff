//! Storages: what is mounted in the guest for containers to use, by the ids the host gave.
//!
//! ```text
//!  <state>/storage/<id>     where each is attached
//! ```
//! A driver makes a mount that is attached nowhere; attaching, looking up and unmounting are the same for
//! all. Containers refer to a [`Place`]: a storage and a path in it, resolved beneath the storage's root.

mod drivers;

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::mount::{MoveMountFlags, UnmountFlags, move_mount, unmount};
use testudo_agent_protocol::{Place, Storage, code};

pub(crate) use drivers::names;

use crate::devices::Devices;
use crate::failure::{During, Failure};
use crate::stage::options::Options;
use crate::sys::mount_attr::{self, MountAttr, RDONLY};

/// A storage that is mounted; dropping it unmounts.
#[derive(Debug)]
pub(crate) struct Mounted {
    root: OwnedFd,
    at: PathBuf,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Containers that still use it keep it alive, unseen.
        if let Err(e) = unmount(&self.at, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            log::warn!("cannot unmount {}: {e}", self.at.display());
        }
        let _ = fs::remove_dir(&self.at).or_else(|_| fs::remove_file(&self.at));
    }
}

impl Mounted {
    pub(crate) fn root(&self) -> &OwnedFd {
        &self.root
    }

    /// Another descriptor of its root, for a job.
    pub(crate) fn view(&self) -> Result<OwnedFd, Failure> {
        rustix::io::fcntl_dupfd_cloexec(&self.root, 0).during(|| "take a descriptor".into())
    }
}

/// Roots of storages, for those who resolve places.
pub(crate) type Roots = BTreeMap<String, OwnedFd>;

/// What a place names, as `O_PATH`.
pub(crate) fn resolve(roots: &Roots, place: &Place) -> Result<OwnedFd, Failure> {
    let root = roots
        .get(&place.storage)
        .ok_or_else(|| Failure::not_found(format!("there is no storage {:?}", place.storage)))?;
    open_beneath(root, &place.path, OFlags::PATH)
        .during(|| format!("open {:?} of storage {}", place.path, place.storage))
}

/// Opens a path of a storage; links are resolved with the storage's root as the end of the world.
pub(crate) fn open_beneath(
    root: impl AsFd,
    path: &str,
    flags: OFlags,
) -> rustix::io::Result<OwnedFd> {
    let path = match path.trim_start_matches('/') {
        "" => ".",
        path => path,
    };
    rustix::fs::openat2(
        root,
        path,
        flags | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )
}

/// Mounts one. Called by jobs: a device may have to appear first.
pub(crate) fn mount(
    storage: &Storage,
    roots: &Roots,
    state: &Path,
    devices: &Devices,
) -> Result<Mounted, Failure> {
    let driver = storage
        .driver
        .as_ref()
        .ok_or_else(|| Failure::invalid(format!("storage {} has no driver", storage.id)))?;
    let detached = drivers::make(driver, storage, roots, state, devices)?;
    if storage.readonly {
        let attr = MountAttr {
            set: RDONLY,
            ..MountAttr::default()
        };
        mount_attr::set(&detached, attr, true, None)
            .during(|| format!("make storage {} read-only", storage.id))?;
    }
    let at = state.join("storage").join(&storage.id);
    let about = || format!("attach storage {} to {}", storage.id, at.display());
    let is_folder = crate::stage::kind_is_folder(&detached)?;
    if is_folder {
        fs::create_dir(&at).during(about)?;
    } else {
        fs::File::create_new(&at).during(about)?;
    }
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    if let Err(e) = move_mount(&detached, "", CWD, &at, flags) {
        let _ = fs::remove_dir(&at).or_else(|_| fs::remove_file(&at));
        return Err(e).during(about);
    }
    Ok(Mounted { root: detached, at })
}

/// An id the host chose names a file here.
pub(crate) fn check_id(what: &str, id: &str) -> Result<(), Failure> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    let begins = id.starts_with(|c: char| c.is_ascii_alphanumeric());
    if begins && id.len() <= 128 && id.chars().all(good) {
        return Ok(());
    }
    Err(Failure::of(
        code::INVALID,
        format!(
            "{id:?} is no id of a {what}: 1 to 128 of A-Za-z0-9_.- are, a letter or digit first"
        ),
    ))
}

/// A tmpfs of the sandbox.
pub(crate) fn tmpfs(words: &[String]) -> Result<OwnedFd, Failure> {
    crate::stage::make_filesystem("tmpfs", "tmpfs", &Options::read(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_name_one_file_each() {
        for good in ["a", "0", "pod-1_2.3", &"x".repeat(128)] {
            assert!(check_id("storage", good).is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "-a",
            "a b",
            "ä",
            "a\0",
            &"x".repeat(129),
        ] {
            assert!(check_id("storage", bad).is_err(), "{bad:?}");
        }
    }
}
