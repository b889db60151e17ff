//! What makes a kernel and a root a host: modules, device nodes, settings, loopback.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, setrlimit, umask};
use rustix::system::finit_module;

/// Settings beyond the kernel's defaults.
const SYSCTL: &[(&str, &str)] = &[
    // Guests much larger than the lab are sparse.
    ("vm/overcommit_memory", "1"),
    ("kernel/hostname", "lab"),
    ("net/ipv4/ip_forward", "1"),
];

/// A module file, open, with its name for errors.
pub(crate) struct Module(String, File);

/// Loads these files in order.
pub(crate) fn load(files: &[String]) -> Result<()> {
    insert(files.iter().map(|f| open(f)).collect::<Result<_>>()?)
}

/// Opened while the initramfs can still be reached by path.
pub(crate) fn open(file: &str) -> Result<Module> {
    let opened = File::open(file).with_context(|| format!("cannot open {file}"))?;
    Ok(Module(file.to_owned(), opened))
}

/// Loads them in order; one that is loaded already is fine.
pub(crate) fn insert(modules: Vec<Module>) -> Result<()> {
    for Module(name, file) in modules {
        match finit_module(&file, c"", 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error).with_context(|| format!("cannot load {name}")),
        }
    }
    Ok(())
}

/// Open files, as systemd has them: 1024 unless a program raises its limit, up to this.
const OPEN_FILES: u64 = 524_288;

/// Everything that needs the new root.
pub(crate) fn configure(modules_dir: &Path) -> Result<()> {
    let open_files = Rlimit {
        current: Some(1024),
        maximum: Some(OPEN_FILES),
    };
    setrlimit(Resource::Nofile, open_files).context("cannot set the limit of open files")?;
    for (name, value) in SYSCTL {
        let path = format!("/proc/sys/{name}");
        fs::write(&path, value).with_context(|| format!("cannot set {path}"))?;
    }
    // IFF_UP; the kernel gives a loopback its address when it comes up.
    fs::write("/sys/class/net/lo/flags", "0x1").context("cannot bring up lo")?;
    // The nodes' modes are meant as they are.
    let usual = umask(Mode::empty());
    device_nodes(&modules_dir.join("modules.devname"))?;
    umask(usual);
    Ok(())
}

/// Nodes whose opening loads their module (tun, fuse, vhost-net, loop-control …), as kmod's
/// static-nodes makes them. Lines: `module path type major:minor`, type `c` or `b` before the numbers.
fn device_nodes(list: &Path) -> Result<()> {
    let list =
        fs::read_to_string(list).with_context(|| format!("cannot read {}", list.display()))?;
    for line in list.lines().filter(|l| !l.starts_with('#')) {
        let mut words = line.split_whitespace().skip(1);
        let (Some(name), Some(number)) = (words.next(), words.next()) else {
            continue;
        };
        let kind = if number.starts_with('b') {
            FileType::BlockDevice
        } else {
            FileType::CharacterDevice
        };
        let Some((major, minor)) = number.get(1..).and_then(|n| n.split_once(':')) else {
            continue;
        };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else {
            continue;
        };
        let path = format!("/dev/{name}");
        if let Some(parent) = Path::new(&path).parent() {
            fs::create_dir_all(parent)
                .with_context(|| format!("cannot create {}", parent.display()))?;
        }
        match mknodat(
            CWD,
            &path,
            kind,
            Mode::from_raw_mode(0o666),
            makedev(major, minor),
        ) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error).with_context(|| format!("cannot make {path}")),
        }
    }
    Ok(())
}
