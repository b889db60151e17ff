//! What is measured: files the caller has prepared, copied to memory so that no disk is measured.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;

/// Where the copies go: a tmpfs of this process's own.
const STAGE: &str = "/run/perf-boot";

/// The folder of the copies, in memory.
pub(crate) fn stage() -> &'static Path {
    Path::new(STAGE)
}

/// A kernel in its two forms.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Kernel {
    pub(crate) bzimage: PathBuf,
    pub(crate) vmlinux: PathBuf,
}

/// Paths of everything.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Kit {
    /// `testudo-vmm`; absent while there is none to measure.
    pub(crate) vmm: Option<PathBuf>,
    /// `qemu-system-x86_64`.
    pub(crate) qemu: Option<PathBuf>,
    /// `firecracker`, if somebody has one.
    #[serde(default)]
    pub(crate) firecracker: Option<PathBuf>,
    /// `cloud-hypervisor`, if somebody has one.
    #[serde(default)]
    pub(crate) cloud_hypervisor: Option<PathBuf>,
    /// Debian's cloud kernel.
    pub(crate) stock: Kernel,
    /// Our guest kernel.
    pub(crate) own: Option<Kernel>,
    /// Our init, padded to 2 MiB.
    pub(crate) initramfs: PathBuf,
}

impl Kit {
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is no kit", path.display()))
    }

    /// The same kit with kernels, initramfs and `testudo-vmm` in memory. QEMU stays where its
    /// firmware and libraries are; its first run warms the page cache.
    pub(crate) fn staged(mut self) -> Result<Self> {
        let dir = Path::new(STAGE);
        fs::create_dir_all(dir).with_context(|| format!("cannot create {STAGE}"))?;
        rustix::mount::mount(
            "perf",
            dir,
            "tmpfs",
            rustix::mount::MountFlags::empty(),
            None,
        )
        .with_context(|| format!("cannot mount a tmpfs at {STAGE}; this needs root"))?;
        let stage = |path: &mut PathBuf, name: &str| -> Result<()> {
            let to = dir.join(name);
            fs::copy(&*path, &to).with_context(|| format!("cannot copy {}", path.display()))?;
            *path = to;
            Ok(())
        };
        if let Some(vmm) = &mut self.vmm {
            stage(vmm, "testudo-vmm")?;
        }
        if let Some(firecracker) = &mut self.firecracker {
            stage(firecracker, "firecracker")?;
        }
        if let Some(cloud_hypervisor) = &mut self.cloud_hypervisor {
            stage(cloud_hypervisor, "cloud-hypervisor")?;
        }
        stage(&mut self.stock.bzimage, "stock-bzimage")?;
        stage(&mut self.stock.vmlinux, "stock-vmlinux")?;
        if let Some(own) = &mut self.own {
            stage(&mut own.bzimage, "own-bzimage")?;
            stage(&mut own.vmlinux, "own-vmlinux")?;
        }
        stage(&mut self.initramfs, "initramfs")?;
        Ok(self)
    }
}
