//! A Debian userland for a root, and the test's script run there by bash.
//!
//! ```text
//! /script          of the initramfs: an archive that the test has added to it
//! /files           likewise: what the script finds in /run/files
//! a block device   an EROFS image, known by its UUID, whatever its name
//!     /lower       the image          /over   a tmpfs
//!     /root        both, as an overlay; becomes /, for this process and the kernel's helpers
//! ```
//! Orders that follow the script are carried out in the new root.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{chdir, chroot};

use crate::console::Console;
use crate::facts;

const SCRIPT: &str = "/script";
const FILES: &str = "/files";
const NEW: &str = "/root";
/// `mkfs.erofs -U` of the recipe.
const UUID: [u8; 16] = [
    0x7e, 0x57, 0xed, 0x00, 0xb0, 0x07, 0x4a, 0x11, 0x8e, 0x55, 0x00, 0x00, 0xda, 0x7a, 0xba, 0x5e,
];
/// `struct erofs_super_block` (Linux, fs/erofs/erofs_fs.h): where it is, its magic, its UUID's offset.
const SUPER_BLOCK: u64 = 1024;
const MAGIC: [u8; 4] = 0xe0f5_e1e2_u32.to_le_bytes();
const UUID_AT: usize = 48;
/// For a driver to find its disk.
const PATIENCE: Duration = Duration::from_secs(10);

/// Sourced by the bash that runs the script, and by no other: it fails at the first command that
/// fails and says which it was. `fact KEY VALUE` tells the test something.
const PRELUDE: &str = r#"unset BASH_ENV
set -eEu -o pipefail
trap 'echo "script: line $LINENO: \`$BASH_COMMAND\` returned $?"' ERR
fact() { echo "FACT $1=$2"; }
"#;
/// What udev would do: the modules of the devices that there are.
const COLDPLUG: &str =
    "find /sys/devices -name modalias -exec cat {} + | sort -u | xargs -r modprobe -abq || true";

/// Enters the userland and runs the script; an error unless that returns 0.
pub(crate) fn run_script(console: &mut Console) -> io::Result<()> {
    let script =
        fs::read(SCRIPT).map_err(|e| told(format_args!("the initramfs has no {SCRIPT}: {e}")))?;
    let files = files()?;
    enter()?;
    fs::write("/run/script", script)?;
    if !files.is_empty() {
        make("/run/files")?;
    }
    for (name, data) in files {
        let mut open = OpenOptions::new();
        let mut file = open
            .write(true)
            .create_new(true)
            .mode(0o755)
            .open(Path::new("/run/files").join(name))?;
        file.write_all(&data)?;
    }
    fs::write("/run/prelude", PRELUDE)?;
    // A loopback gets its address from the kernel when it comes up (IFF_UP).
    let _ = fs::write("/sys/class/net/lo/flags", "0x1");
    fs::write("/proc/sys/kernel/hostname", "guest")?;
    let release = facts::read("/proc/sys/kernel/osrelease").unwrap_or_default();
    if Path::new("/lib/modules").join(release).exists() {
        bash(console, &["-c", COLDPLUG])?.status()?;
    }
    console.line("SCRIPT begin");
    let mut script = bash(console, &["/run/script"])?;
    let status = script.env("BASH_ENV", "/run/prelude").status()?;
    console.line("SCRIPT end");
    ended(status)
}

/// Names and contents of the files that came with the script.
fn files() -> io::Result<Vec<(OsString, Vec<u8>)>> {
    let folder = match fs::read_dir(FILES) {
        Ok(folder) => folder,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    folder
        .map(|entry| {
            let entry = entry?;
            Ok((entry.file_name(), fs::read(entry.path())?))
        })
        .collect()
}

fn ended(status: ExitStatus) -> io::Result<()> {
    match (status.code(), status.signal()) {
        (Some(0), _) => Ok(()),
        (_, Some(signal)) => Err(told(format_args!("ended by signal {signal}"))),
        (code, None) => Err(told(format_args!("returned {}", code.unwrap_or(-1)))),
    }
}

fn bash(console: &Console, arguments: &[&str]) -> io::Result<Command> {
    let mut bash = Command::new("/bin/bash");
    bash.args(arguments)
        .current_dir("/root")
        .env_clear()
        .envs([
            (
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            ),
            ("HOME", "/root"),
            ("LANG", "C.UTF-8"),
            ("TERM", "dumb"),
        ])
        .stdin(Stdio::from(console.descriptor()?))
        .stdout(Stdio::from(console.descriptor()?))
        .stderr(Stdio::from(console.descriptor()?));
    Ok(bash)
}

fn enter() -> io::Result<()> {
    let disk = find_disk()?;
    for folder in ["/lower", "/over", NEW] {
        make(folder)?;
    }
    let image = disk.to_string_lossy();
    on(&image, "erofs", "/lower", MountFlags::RDONLY, c"")?;
    on(
        "over",
        "tmpfs",
        "/over",
        MountFlags::empty(),
        c"mode=755,size=80%",
    )?;
    make("/over/upper")?;
    make("/over/work")?;
    let layers = c"lowerdir=/lower,upperdir=/over/upper,workdir=/over/work";
    on("userland", "overlay", NEW, MountFlags::empty(), layers)?;
    for at in ["/proc", "/sys", "/dev"] {
        let to = format!("{NEW}{at}");
        make(&to)?;
        mount_move(at, &to).map_err(|e| told(format_args!("cannot move {at} to {to}: {e}")))?;
    }
    chdir(NEW)?;
    mount_move(".", "/")?;
    chroot(".")?;
    chdir("/")?;
    for (kind, at, options) in [
        ("devpts", "/dev/pts", c"gid=5,mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", c"mode=1777"),
        ("tmpfs", "/run", c"mode=755"),
        ("cgroup2", "/sys/fs/cgroup", c""),
    ] {
        make(at)?;
        on(kind, kind, at, MountFlags::empty(), options)?;
    }
    for (name, target) in [
        ("fd", ""),
        ("stdin", "/0"),
        ("stdout", "/1"),
        ("stderr", "/2"),
    ] {
        // A kernel that mounts /dev itself makes none of them.
        let _ = symlink(format!("/proc/self/fd{target}"), format!("/dev/{name}"));
    }
    Ok(())
}

fn find_disk() -> io::Result<PathBuf> {
    let begun = Instant::now();
    loop {
        let disks = fs::read_dir("/sys/class/block");
        let names = disks.into_iter().flatten().flatten().map(|e| e.file_name());
        let found = names
            .map(|name| Path::new("/dev").join(name))
            .find(|path| super_block(path).is_some_and(|block| is_userland(&block)));
        if let Some(path) = found {
            return Ok(path);
        }
        if begun.elapsed() > PATIENCE {
            return Err(told("no block device holds the userland image"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn super_block(disk: &Path) -> Option<[u8; 128]> {
    let mut block = [0; 128];
    File::open(disk)
        .ok()?
        .read_exact_at(&mut block, SUPER_BLOCK)
        .ok()?;
    Some(block)
}

fn is_userland(block: &[u8]) -> bool {
    block.starts_with(&MAGIC) && block.get(UUID_AT..UUID_AT + UUID.len()) == Some(&UUID)
}

fn make(folder: &str) -> io::Result<()> {
    match fs::create_dir(folder) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => {
            Err(told(format_args!("cannot create {folder}: {e}")))
        }
        _ => Ok(()),
    }
}

fn on(
    what: &str,
    kind: &str,
    at: &str,
    flags: MountFlags,
    options: &std::ffi::CStr,
) -> io::Result<()> {
    mount(what, at, kind, flags, Some(options))
        .map_err(|e| told(format_args!("cannot mount {what} ({kind}) on {at}: {e}")))
}

fn told(why: impl std::fmt::Display) -> io::Error {
    io::Error::other(why.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_is_known_by_its_kind_and_its_uuid() {
        let mut block = [0_u8; 128];
        block[..4].copy_from_slice(&[0xe2, 0xe1, 0xf5, 0xe0]);
        assert!(!is_userland(&block));
        block[48..64].copy_from_slice(&UUID);
        assert!(is_userland(&block));
        block[0] = 0;
        assert!(!is_userland(&block) && !is_userland(&block[..50]));
    }

    #[test]
    fn how_a_script_ended_is_told() {
        assert!(ended(ExitStatus::from_raw(0)).is_ok());
        let code = ended(ExitStatus::from_raw(3 << 8)).unwrap_err();
        assert_eq!(code.to_string(), "returned 3");
        let signal = ended(ExitStatus::from_raw(9)).unwrap_err();
        assert_eq!(signal.to_string(), "ended by signal 9");
    }
}
