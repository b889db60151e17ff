//! What PID 1 owes the guest: its file systems, a root that can be left, and a clean end.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, mount, move_mount, open_tree};
use rustix::system::{RebootCommand, reboot};

use crate::failure::{During, Failure};

/// What, where, how, and whether the guest can do without.
const MOUNTS: &[(&str, &str, &std::ffi::CStr, MountFlags)] = &[
    ("proc", "/proc", c"", SAFE),
    ("sysfs", "/sys", c"", SAFE),
    ("devtmpfs", "/dev", c"mode=0755", MountFlags::NOSUID),
    (
        "devpts",
        "/dev/pts",
        c"gid=5,mode=0620,ptmxmode=0666",
        SAFE_DEVICES,
    ),
    ("tmpfs", "/dev/shm", c"mode=1777", SAFE),
    ("mqueue", "/dev/mqueue", c"", SAFE),
    ("tmpfs", "/run", c"mode=0755", SAFE),
    ("tmpfs", "/tmp", c"mode=1777", SAFE),
    ("cgroup2", "/sys/fs/cgroup", c"nsdelegate", SAFE),
];
const SAFE_DEVICES: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);
const SAFE: MountFlags = SAFE_DEVICES.union(MountFlags::NODEV);

/// Mounts what is not mounted.
pub(crate) fn mount_all() -> Result<(), Failure> {
    for (kind, at, data, flags) in MOUNTS {
        match fs::create_dir(at) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => {
                return Err(e).during(|| format!("make {at}"));
            }
            _ => {}
        }
        match mount(*kind, *at, *kind, *flags, Some(*data)) {
            // The kernel or an initramfs was first.
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            // A kernel without message queues is a poorer guest, not a broken one.
            Err(rustix::io::Errno::NODEV) if *kind == "mqueue" => {}
            Err(e) => return Err(e).during(|| format!("mount {kind} on {at}")),
        }
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        let _ = std::os::unix::fs::symlink(target, Path::new("/dev").join(name));
    }
    Ok(())
}

/// The root of an initramfs is the root of all mounts and cannot be left by pivot_root(2), as every
/// container's first process must. A mount of itself on top of itself can.
pub(crate) fn make_root_leavable() -> Result<(), Failure> {
    let about = || "mount the root on itself".into();
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, "/", flags).during(about)?;
    move_mount(&tree, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).during(about)?;
    rustix::process::fchdir(&tree).during(about)?;
    rustix::process::chroot(".").during(about)?;
    rustix::process::chdir("/").during(about)
}

/// Services are told apart from the kernel's threads by their session, and a terminal's signals are not
/// for PID 1.
pub(crate) fn begin() {
    let _ = rustix::process::setsid();
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    // What the agent says is not held back: the kernel's log is the only place it has.
    let _ = fs::write("/proc/sys/kernel/printk_devkmsg", "on\n");
    // A loopback gets its address from the kernel when it comes up (IFF_UP).
    let _ = fs::write("/sys/class/net/lo/flags", "0x1");
    // Containers may be many; the kernel's own default is for small machines.
    let _ = fs::write("/proc/sys/fs/inotify/max_user_instances", "1024");
}

/// Everything written is kept, then the machine goes. Returns only if it does not.
pub(crate) fn power_off() {
    rustix::fs::sync();
    if let Err(e) = reboot(RebootCommand::PowerOff) {
        log::error!("cannot power off: {e}");
    }
}
