//! Debian's kernel for clouds: the bzImage of the package, the vmlinux packed inside it, and the few
//! modules without which that kernel does not see what a VMM offers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{Images, lz4};
use crate::cache::Cache;
use crate::{debian, lab, sh};

/// Raised when what is made of the same package changes.
const RECIPE: &[u8] = b"1";
const ELF: &[u8] = b"\x7fELF";
/// Virtio, memory devices, what the userland is mounted with, the power button, the panic device, model-specific
/// registers. Whatever else there is comes with the userland ([`MORE_MODULES`]).
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio-rng",
    "virtio_balloon",
    "virtio_mem",
    "virtio_pmem",
    "nd_pmem",
    "virtio_blk",
    "crc32c_generic",
    "erofs",
    "overlay",
    "button",
    "evdev",
    "pvpanic-mmio",
    "pvpanic-pci",
    "msr",
];
/// For the userland, whose modprobe finds them: every device a VMM may offer, and file systems.
const MORE_MODULES: &[&str] = &[
    "virtio_net",
    "virtio_console",
    "virtio_balloon",
    "virtio_mem",
    "virtio_pmem",
    "virtio_scsi",
    "virtiofs",
    "vmw_vsock_virtio_transport",
    "nd_pmem",
    "dax_pmem",
    "ptp_kvm",
    "ext4",
    "loop",
    "tun",
    "veth",
    "bridge",
    "dm-mod",
    "nf_tables",
];

pub(super) fn fetch(cache: &Cache) -> Result<Images> {
    let (kernel, dir) = unpacked(cache)?;
    Ok(Images {
        bzimage: kernel.image,
        vmlinux: dir.join("vmlinux"),
    })
}

/// `uname -r` of the kernel, and its module files in the order in which they load.
pub(super) fn modules(cache: &Cache) -> Result<(String, Vec<PathBuf>)> {
    let (kernel, dir) = unpacked(cache)?;
    let dir = dir.join("modules");
    let mut files: Vec<PathBuf> = fs::read_dir(&dir)
        .with_context(|| format!("cannot read {}", dir.display()))?
        .flatten()
        .map(|e| e.path())
        .collect();
    files.sort();
    Ok((kernel.release, files))
}

/// Puts the modules that the userland may ask for into `root/usr/lib/modules/<release>`, with their
/// index. `scratch` is a folder to be made and removed.
pub(super) fn install_modules(cache: &Cache, root: &Path, scratch: &Path) -> Result<()> {
    let kernel = debian::kernel(cache, debian::CLOUD_KERNEL)?;
    let wanted = [MODULES, MORE_MODULES].concat();
    let order = load_order(&kernel, scratch, &wanted)?;
    fs::remove_dir_all(scratch).with_context(|| format!("cannot remove {}", scratch.display()))?;
    let to = root.join("usr/lib/modules").join(&kernel.release);
    for file in order {
        let copy = to.join(&file);
        let folder = copy.parent().context("a module without a folder")?;
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let from = kernel.modules.join(&file);
        fs::copy(&from, copy).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    for list in [
        "modules.builtin",
        "modules.builtin.modinfo",
        "modules.order",
    ] {
        let from = kernel.modules.join(list);
        fs::copy(&from, to.join(list))
            .with_context(|| format!("cannot copy {}", from.display()))?;
    }
    lab::depmod(&root.join("usr"), &kernel.release)
}

/// What determines the modules that [`install_modules`] puts there.
pub(super) fn modules_input(cache: &Cache) -> Result<String> {
    let kernel = debian::kernel(cache, debian::CLOUD_KERNEL)?;
    Ok(format!(
        "{} {MODULES:?} {MORE_MODULES:?}",
        kernel.image.display()
    ))
}

fn unpacked(cache: &Cache) -> Result<(debian::Kernel, PathBuf)> {
    let kernel = debian::kernel(cache, debian::CLOUD_KERNEL)?;
    // The path holds the package's name and version, so it stands for the contents.
    let package = kernel.image.as_os_str().as_encoded_bytes();
    let wanted = MODULES.join(" ");
    let entry = cache.entry("guest-stock", &[package, wanted.as_bytes(), RECIPE]);
    let dir = entry.get_or_build(|dir| {
        eprintln!("unpacking the stock guest kernel {}", kernel.release);
        extract(&kernel.image, &dir.join("vmlinux"))?;
        pick_modules(&kernel, dir)
    })?;
    Ok((kernel, dir))
}

fn extract(bzimage: &Path, vmlinux: &Path) -> Result<()> {
    let image = fs::read(bzimage).with_context(|| format!("cannot read {}", bzimage.display()))?;
    let kernel = lab::bzimage_payload(&image)
        .context("it is no bzImage")
        .and_then(lz4::unpack)
        .and_then(|kernel| {
            ensure!(
                kernel.starts_with(ELF),
                "what is packed in it is no ELF file"
            );
            Ok(kernel)
        })
        .with_context(|| format!("cannot unpack the vmlinux of {}", bzimage.display()))?;
    fs::write(vmlinux, kernel).with_context(|| format!("cannot write {}", vmlinux.display()))
}

/// Copies the wanted modules and what they need to `modules/NN-name.ko`, numbered as they load.
fn pick_modules(kernel: &debian::Kernel, dir: &Path) -> Result<()> {
    let base = dir.join("index");
    let order = load_order(kernel, &base, MODULES)?;
    let picked = dir.join("modules");
    fs::create_dir(&picked).with_context(|| format!("cannot create {}", picked.display()))?;
    for (n, file) in order.iter().enumerate() {
        let from = kernel.modules.join(file);
        let name = file.file_name().context("a module without a name")?;
        let to = picked.join(format!("{n:02}-{}", name.to_string_lossy()));
        fs::copy(&from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    fs::remove_dir_all(&base).with_context(|| format!("cannot remove {}", base.display()))
}

/// The files of these modules in the order in which they load. The index that tells is made in
/// `base`, in a copy of links: the package's own folder is not ours to write to.
fn load_order(kernel: &debian::Kernel, base: &Path, wanted: &[&str]) -> Result<Vec<PathBuf>> {
    let all = base.join("lib/modules");
    fs::create_dir_all(&all).with_context(|| format!("cannot create {}", all.display()))?;
    sh::quiet(Command::new("cp").arg("-as").arg(&kernel.modules).arg(&all))?;
    lab::depmod(base, &kernel.release)?;
    Ok(testudo_lab::load_order(&all.join(&kernel.release), wanted)?)
}
