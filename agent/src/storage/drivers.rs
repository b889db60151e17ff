//! One driver for each kind of storage; each gives a mount that is attached nowhere.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree, unmount,
};
use testudo_agent_protocol::storage::Driver;
use testudo_agent_protocol::{
    Bind, Block, DeviceAddress, HugeTlbFs, Overlay, Place, Pmem, Storage, Tmpfs, VirtioFs, bind,
    device_address,
};

use super::{Roots, resolve};
use crate::devices::Devices;
use crate::failure::{During, Failure};
use crate::stage::make_filesystem;
use crate::stage::options::Options;

/// How long a device may take if the host does not say.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a driver is given.
struct Ask<'a> {
    storage: &'a Storage,
    roots: &'a Roots,
    state: &'a Path,
    devices: &'a Devices,
}

/// The drivers there are.
pub(crate) fn names() -> Vec<String> {
    let names = [
        "virtio-fs",
        "block",
        "pmem",
        "overlay",
        "tmpfs",
        "bind",
        "hugetlbfs",
    ];
    names.map(str::to_owned).to_vec()
}

pub(super) fn make(
    driver: &Driver,
    storage: &Storage,
    roots: &Roots,
    state: &Path,
    devices: &Devices,
) -> Result<OwnedFd, Failure> {
    let ask = Ask {
        storage,
        roots,
        state,
        devices,
    };
    match driver {
        Driver::VirtioFs(of) => ask.virtio_fs(of),
        Driver::Block(of) => ask.block(of),
        Driver::Pmem(of) => ask.pmem(of),
        Driver::Overlay(of) => ask.overlay(of),
        Driver::Tmpfs(of) => tmpfs(of),
        Driver::Bind(of) => ask.bind(of),
        Driver::Hugetlbfs(of) => huge_pages(of),
    }
}

impl Ask<'_> {
    fn patience(&self) -> Duration {
        match self.storage.deadline_ms {
            0 => PATIENCE,
            ms => Duration::from_millis(u64::from(ms)),
        }
    }

    fn options(&self, words: &[String]) -> Options {
        let mut options = Options::read(words);
        options.readonly |= self.storage.readonly;
        options
    }

    fn virtio_fs(&self, of: &VirtioFs) -> Result<OwnedFd, Failure> {
        let address = DeviceAddress {
            at: Some(device_address::At::FsTag(of.tag.clone())),
        };
        self.devices.wait(&address, self.patience())?;
        // Its options are of the mount; it has no read-only of its own.
        let mut options = Options::read(&of.options);
        options.readonly = false;
        make_filesystem("virtiofs", &of.tag, &options)
    }

    fn disk(&self, device: Option<&DeviceAddress>, what: &str) -> Result<String, Failure> {
        let address = device.ok_or_else(|| {
            Failure::invalid(format!(
                "storage {} does not say which {what}",
                self.storage.id
            ))
        })?;
        self.devices.wait(address, self.patience())
    }

    fn block(&self, of: &Block) -> Result<OwnedFd, Failure> {
        let mut disk = self.disk(of.device.as_ref(), "disk")?;
        if of.partition != 0 {
            // nvme0n1p1, vda1
            let joint = if disk.ends_with(|c: char| c.is_ascii_digit()) {
                "p"
            } else {
                ""
            };
            disk = format!("{disk}{joint}{}", of.partition);
        }
        if of.raw {
            return clone(rustix::fs::CWD, &disk, false);
        }
        make_filesystem(&of.filesystem, &disk, &self.options(&of.options))
    }

    fn pmem(&self, of: &Pmem) -> Result<OwnedFd, Failure> {
        let disk = self.disk(of.device.as_ref(), "region")?;
        make_filesystem(&of.filesystem, &disk, &self.options(&of.options))
    }

    fn overlay(&self, of: &Overlay) -> Result<OwnedFd, Failure> {
        let about = || format!("make overlay {}", self.storage.id);
        let mut held = Vec::new();
        let mut path = |fd: OwnedFd| {
            let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
            held.push(fd);
            path
        };
        let lower = of
            .lower
            .iter()
            .map(|place| Ok(path(resolve(self.roots, place)?)))
            .collect::<Result<Vec<_>, Failure>>()?;
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).during(about)?;
        fsconfig_set_string(&context, "source", "overlay").during(about)?;
        fsconfig_set_string(&context, "lowerdir", lower.join(":").as_str()).during(about)?;
        let mut kept = None;
        match (&of.upper, &of.work, of.scratch) {
            (None, None, false) => {}
            (Some(upper), Some(work), false) => {
                for (key, place) in [("upperdir", upper), ("workdir", work)] {
                    let at = path(resolve(self.roots, place)?);
                    fsconfig_set_string(&context, key, at.as_str()).during(about)?;
                }
            }
            (None, None, true) => {
                let scratch = self.scratch(of)?;
                for (key, folder) in [("upperdir", "upper"), ("workdir", "work")] {
                    let at = scratch.at.join(folder);
                    fsconfig_set_string(&context, key, at).during(about)?;
                }
                // Unmounted at the end of this function; the overlay keeps its own.
                kept = Some(scratch);
            }
            _ => {
                return Err(Failure::invalid(format!(
                    "overlay {} needs upper and work, or scratch, or neither",
                    self.storage.id
                )));
            }
        }
        fsconfig_create(&context).during(about)?;
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        let made = fsmount(&context, flags, MountAttrFlags::empty()).during(about);
        drop(kept);
        made
    }

    /// Two folders of a tmpfs that only the overlay keeps alive. An overlay's layers must be attached
    /// somewhere when it is made.
    fn scratch(&self, of: &Overlay) -> Result<Scratch, Failure> {
        let about = || format!("make scratch space for overlay {}", self.storage.id);
        let mut words = vec!["mode=755".to_owned()];
        if of.scratch_bytes != 0 {
            words.push(format!("size={}", of.scratch_bytes));
        }
        let tmpfs = super::tmpfs(&words)?;
        let at = self.state.join("scratch").join(&self.storage.id);
        std::fs::create_dir_all(&at).during(about)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&tmpfs, "", rustix::fs::CWD, &at, flags).during(about)?;
        let scratch = Scratch { at };
        for folder in ["upper", "work"] {
            std::fs::create_dir(scratch.at.join(folder)).during(about)?;
        }
        Ok(scratch)
    }

    fn bind(&self, of: &Bind) -> Result<OwnedFd, Failure> {
        match &of.of {
            Some(bind::Of::Place(place)) => self.bind_place(place),
            Some(bind::Of::Path(path)) => clone(rustix::fs::CWD, path, true),
            None => Err(Failure::invalid(format!(
                "storage {} does not say what to bind",
                self.storage.id
            ))),
        }
    }

    fn bind_place(&self, place: &Place) -> Result<OwnedFd, Failure> {
        let fd = resolve(self.roots, place)?;
        crate::stage::detached(fd, true)
            .during(|| format!("bind {:?} of storage {}", place.path, place.storage))
    }
}

/// Attached as long as it lives.
struct Scratch {
    at: PathBuf,
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = unmount(&self.at, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        let _ = std::fs::remove_dir(&self.at);
    }
}

fn clone(at: impl std::os::fd::AsFd, path: &str, recursive: bool) -> Result<OwnedFd, Failure> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(at, path, flags).during(|| format!("bind {path}"))
}

fn tmpfs(of: &Tmpfs) -> Result<OwnedFd, Failure> {
    let mut words = vec![format!("mode={:o}", of.mode.unwrap_or(0o755) & 0o7777)];
    if of.bytes != 0 {
        words.push(format!("size={}", of.bytes));
    }
    if of.inodes != 0 {
        words.push(format!("nr_inodes={}", of.inodes));
    }
    words.push(format!("uid={}", of.uid));
    words.push(format!("gid={}", of.gid));
    super::tmpfs(&words)
}

fn huge_pages(of: &HugeTlbFs) -> Result<OwnedFd, Failure> {
    let mut words = Vec::new();
    if of.page_bytes != 0 {
        words.push(format!("pagesize={}", of.page_bytes));
    }
    if of.bytes != 0 {
        words.push(format!("size={}", of.bytes));
    }
    make_filesystem("hugetlbfs", "hugetlbfs", &Options::read(&words))
}
