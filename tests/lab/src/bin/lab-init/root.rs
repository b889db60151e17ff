//! Mounts: first what lab-init itself needs, then the host's root under an overlay, then into it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount, mount_bind, mount_move};
use testudo_lab::wire::{Orders, TAG_OUT, TAG_ROOT};

const NEW: &str = "/root";

/// `/proc`, `/sys` and `/dev` of the initramfs.
pub(crate) fn kernel_filesystems() -> Result<()> {
    on("proc", "/proc", "")?;
    on("sysfs", "/sys", "")?;
    on("devtmpfs", "/dev", "mode=755")
}

/// The root to be, below [`NEW`].
pub(crate) fn build(orders: &Orders) -> Result<()> {
    // msize: one request carries 500 KiB. loose: the host's root does not change under a lab.
    share(TAG_ROOT, Path::new("/host"), "cache=loose,ro")?;
    on("tmpfs", "/over", "mode=755,size=75%")?;
    for dir in ["/over/upper", "/over/work"] {
        fs::create_dir(dir).with_context(|| format!("cannot create {dir}"))?;
    }
    on(
        "overlay",
        NEW,
        "lowerdir=/host,upperdir=/over/upper,workdir=/over/work",
    )?;

    for dir in ["/proc", "/sys", "/dev"] {
        let to = below(dir);
        make(&to)?;
        mount_move(dir, &to).with_context(|| format!("cannot move {dir}"))?;
    }
    for (kind, at, options) in [
        ("devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", "mode=1777,size=75%"),
        ("tmpfs", "/run", "mode=755"),
        ("cgroup2", "/sys/fs/cgroup", "nsdelegate"),
        ("debugfs", "/sys/kernel/debug", ""),
    ] {
        let at = below(at);
        make(&at)?;
        on(kind, &at, options)?;
    }
    // A link to where /proc is, as distributions have it.
    for (name, target) in [
        ("fd", "fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
    ] {
        let link = format!("{NEW}/dev/{name}");
        std::os::unix::fs::symlink(format!("/proc/self/{target}"), &link)
            .with_context(|| format!("cannot link {link}"))?;
    }
    let out = below(&orders.out);
    make(&out)?;
    share(TAG_OUT, Path::new(&out), "cache=mmap")?;
    let modules = below(Path::new("/lib/modules").join(&orders.release));
    make(&modules)?;
    mount_bind(below(&orders.modules_dir), &modules).context("cannot show the kernel's modules")
}

/// Makes it the root of this process and of the kernel's own helpers.
pub(crate) fn enter() -> Result<()> {
    rustix::process::chdir(NEW).context("cannot enter the root")?;
    mount_move(".", "/").context("cannot move the root")?;
    rustix::process::chroot(".").context("cannot change the root")?;
    rustix::process::chdir("/").context("cannot enter the root")
}

fn below(path: impl AsRef<Path>) -> String {
    format!("{NEW}{}", path.as_ref().display())
}

fn make(dir: &str) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {dir}"))
}

fn share(tag: &str, at: &Path, options: &str) -> Result<()> {
    let data = format!("trans=virtio,version=9p2000.L,msize=512000,{options}");
    let data = data.trim_end_matches(",ro");
    let flags = if options.ends_with(",ro") {
        MountFlags::RDONLY
    } else {
        MountFlags::empty()
    };
    mount(tag, at, "9p", flags, Some(text(data)?.as_c_str()))
        .with_context(|| format!("cannot mount the share {tag} on {}", at.display()))
}

fn on(kind: &str, at: &str, options: &str) -> Result<()> {
    mount(
        kind,
        at,
        kind,
        MountFlags::empty(),
        Some(text(options)?.as_c_str()),
    )
    .with_context(|| format!("cannot mount {kind} on {at}"))
}

fn text(options: &str) -> Result<std::ffi::CString> {
    std::ffi::CString::new(options).context("a NUL in mount options")
}
