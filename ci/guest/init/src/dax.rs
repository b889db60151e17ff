//! Persistent memory: file systems mounted with DAX, whose files are read where they are.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::checks::fnv1a;
use crate::console::Console;
use crate::facts;

const AT: &str = "/mnt";
const PIECE: usize = 64 << 10;
/// How long a driver may take to make its device.
const PATIENCE: Duration = Duration::from_secs(5);
/// What [`poke`] writes.
const POKE: [u8; 4096] = [0xa5; 4096];

/// Where to mount what: `DEVICE:TYPE[:ro]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DaxMount {
    device: String,
    kind: String,
    readonly: bool,
}

impl DaxMount {
    pub(crate) fn parse(text: &str) -> Option<DaxMount> {
        let mut words = text.split(':');
        let (device, kind) = (words.next()?, words.next()?);
        let readonly = match words.next() {
            None => false,
            Some("ro") => true,
            Some(_) => return None,
        };
        Some(DaxMount {
            device: device.to_owned(),
            kind: kind.to_owned(),
            readonly,
        })
    }
}

/// Waits for a device node; the drivers' work goes on after their modules are loaded.
fn appears(device: &str) -> io::Result<String> {
    let path = format!("/dev/{device}");
    let start = Instant::now();
    while !Path::new(&path).exists() {
        if start.elapsed() > PATIENCE {
            return Err(io::Error::other(format!("there is no {path}")));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(path)
}

/// Mounts it with DAX and tells the options that the kernel then shows.
pub(crate) fn mount_dax(console: &mut Console, what: &DaxMount) -> io::Result<()> {
    let device = appears(&what.device)?;
    let _ = fs::create_dir(AT);
    let flags = if what.readonly {
        MountFlags::RDONLY
    } else {
        MountFlags::empty()
    };
    mount(&*device, AT, &*what.kind, flags, c"dax=always")?;
    let mounts = facts::read("/proc/mounts").unwrap_or_default();
    let line = mounts.lines().find(|l| l.split(' ').nth(1) == Some(AT));
    let options = line.and_then(|l| l.split(' ').nth(3)).unwrap_or_default();
    console.fact("dax.options", options);
    if let Some(sectors) = facts::read(format!("/sys/class/block/{}/size", what.device)) {
        console.fact("dax.sectors", sectors);
    }
    Ok(())
}

/// Reads a file of the mount and tells its length, its hash, and by how much the page cache grew.
pub(crate) fn read_file(console: &mut Console, name: &str) -> io::Result<()> {
    let before = cached_kib();
    let mut file = File::open(format!("{AT}/{name}"))?;
    let mut piece = vec![0; PIECE];
    let (mut bytes, mut hash) = (0_usize, fnv1a(&[]));
    loop {
        let read = file.read(&mut piece)?;
        let Some(data) = piece.get(..read).filter(|d| !d.is_empty()) else {
            break;
        };
        hash = crate::checks::fnv1a_more(hash, data);
        bytes = bytes.saturating_add(read);
    }
    console.fact("file.bytes", bytes);
    console.fact("file.hash", format_args!("{hash:016x}"));
    let grown = cached_kib().saturating_sub(before);
    console.fact("file.cache_growth_kib", grown);
    Ok(())
}

/// Writes a file of so many KiB of `w` and has it on the disk.
pub(crate) fn write_file(name: &str, kib: usize) -> io::Result<()> {
    let mut file = File::create(format!("{AT}/{name}"))?;
    file.write_all(&vec![b'w'; kib.saturating_mul(1024)])?;
    file.sync_all()?;
    drop(file);
    Ok(unmount(AT, UnmountFlags::empty())?)
}

/// Writes a page to the start or the end of a device, past any file system, and tells whether it is
/// there then: `DEVICE[:end]`.
pub(crate) fn poke(console: &mut Console, what: &str) -> io::Result<()> {
    let (device, fact) = match what.strip_suffix(":end") {
        Some(device) => (device, "poke.end_changed"),
        None => (what, "poke.changed"),
    };
    let path = appears(device)?;
    let mut at = 0;
    if fact == "poke.end_changed" {
        let sectors = facts::read(format!("/sys/class/block/{device}/size"));
        let sectors: u64 = sectors.and_then(|s| s.parse().ok()).unwrap_or(0);
        at = sectors.saturating_mul(512).saturating_sub(4096);
    }
    let file = OpenOptions::new().read(true).write(true).open(&path)?;
    file.write_all_at(&POKE, at)?;
    let synced = file.sync_all();
    console.fact("poke.synced", synced.is_ok());
    drop(file);
    // What is read now comes from the device.
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    let mut now = [0; 4096];
    File::open(&path)?.read_exact_at(&mut now, at)?;
    console.fact(fact, now == POKE);
    Ok(())
}

fn cached_kib() -> u64 {
    let meminfo = facts::read("/proc/meminfo").unwrap_or_default();
    ["Cached:", "Buffers:"]
        .iter()
        .filter_map(|key| facts::meminfo_kib(&meminfo, key))
        .fold(0, u64::saturating_add)
}
