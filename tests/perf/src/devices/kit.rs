//! What is measured: files the caller has prepared, copied to memory so that no disk is measured.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount};
use serde::Deserialize;

/// Where the copies go, and what disks and shares are made of: a tmpfs of this process's own.
const STAGE: &str = "/run/perf-devices";

/// Paths of everything.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Kit {
    /// `testudo-vmm`.
    pub(crate) vmm: PathBuf,
    /// `qemu-system-x86_64`.
    pub(crate) qemu: Option<PathBuf>,
    /// QEMU's file system daemon.
    pub(crate) virtiofsd: Option<PathBuf>,
    /// Our guest kernel, a bzImage.
    pub(crate) kernel: PathBuf,
    /// Our init, without modules.
    pub(crate) initramfs: PathBuf,
    /// The Debian userland, a disk image.
    pub(crate) userland: PathBuf,
}

impl Kit {
    pub(crate) fn read(path: &Path) -> Result<Kit> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is no kit", path.display()))
    }

    /// The same kit in memory. QEMU and virtiofsd stay where their libraries are; the caller has
    /// those brought into memory.
    pub(crate) fn staged(mut self) -> Result<Kit> {
        fs::create_dir_all(STAGE).with_context(|| format!("cannot create {STAGE}"))?;
        mount("perf", STAGE, "tmpfs", MountFlags::empty(), None)
            .with_context(|| format!("cannot mount a tmpfs at {STAGE}; this needs root"))?;
        for (file, name) in [
            (&mut self.vmm, "testudo-vmm"),
            (&mut self.kernel, "kernel"),
            (&mut self.initramfs, "initramfs"),
            (&mut self.userland, "userland"),
        ] {
            let to = stage(name);
            fs::copy(&*file, &to).with_context(|| format!("cannot copy {}", file.display()))?;
            *file = to;
        }
        Ok(self)
    }
}

/// A path in memory.
pub(crate) fn stage(name: &str) -> PathBuf {
    Path::new(STAGE).join(name)
}
