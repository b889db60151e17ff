//! Disks.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use testudo_protocol::{LimitsSpec, RateSpec};
use thiserror::Error;
use virtio_devices::{
    BackingError, Blk, Disk, DiskEngine, DiskError, DiskOptions, IoThread, Limits, RateLimit,
    ResizeError, VirtioModel, check_disk_kind,
};

use super::{
    Adjust, AdjustError, BadDevice, DeviceError, DeviceSpec, HostContext, OpenDevice, Place,
};
use crate::options::{Options, OptionsError, parse, switch};
use crate::seccomp::ThreadKind;
use crate::spec::{ByteSize, Source, SourceError};

/// Queues a disk may have.
const MAX_QUEUES: u16 = 64;
/// Bytes that a guest can ask a disk's name to be.
const MAX_SERIAL: usize = 20;
/// Bytes in the logical blocks that guests take.
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=4096;
/// Bytes in physical blocks.
const PHYSICAL_BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=65536;

/// A disk: a raw file, or a block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The file or block device, or `fd:N`. Its content is the disk's, byte for byte.
    pub path: Source,
    /// Its name; default: disk0, disk1, … by its place in the list.
    #[serde(default)]
    pub id: Option<String>,
    /// The guest may only read.
    #[serde(default)]
    pub readonly: bool,
    /// Past the host's page cache (`O_DIRECT`).
    #[serde(default)]
    pub direct: bool,
    /// Queues, 1 to 64; one for each vCPU is what a guest can use.
    #[serde(default = "one")]
    pub queues: u16,
    /// Host threads that serve them, at most as many as there are queues.
    #[serde(default = "one")]
    pub threads: u16,
    /// Who carries requests out.
    #[serde(default)]
    pub engine: EngineConfig,
    /// Whether the guest finds a write cache, which it flushes, or every write is durable.
    #[serde(default)]
    pub cache: CacheConfig,
    /// Bytes in a logical block: 512, 1024, 2048 or 4096; default: what suits the file.
    #[serde(default)]
    pub block_size: Option<u32>,
    /// Bytes in a physical block: a power of two up to 64K; default: what suits the file.
    #[serde(default)]
    pub physical_block_size: Option<u32>,
    /// What the guest reads as its serial number, up to 20 bytes; default: the id.
    #[serde(default)]
    pub serial: Option<String>,
    /// Bytes a second.
    #[serde(default)]
    pub bw: Option<ByteSize>,
    /// Bytes at once; default: a second's worth.
    #[serde(default)]
    pub bw_burst: Option<ByteSize>,
    /// Requests a second.
    #[serde(default)]
    pub iops: Option<u64>,
    /// Requests at once; default: a second's worth.
    #[serde(default)]
    pub iops_burst: Option<u64>,
    /// Lock the file, so that no two VMs write to it.
    #[serde(default = "yes")]
    pub lock: bool,
}

fn one() -> u16 {
    1
}

fn yes() -> bool {
    true
}

/// Who carries a disk's requests out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EngineConfig {
    /// io_uring where it works, system calls where it does not.
    #[default]
    Auto,
    /// io_uring, or an error.
    IoUring,
    /// System calls, one after the other.
    Sync,
}

impl std::str::FromStr for EngineConfig {
    type Err = &'static str;
    fn from_str(word: &str) -> Result<Self, Self::Err> {
        match word {
            "auto" => Ok(Self::Auto),
            "io_uring" => Ok(Self::IoUring),
            "sync" => Ok(Self::Sync),
            _ => Err("write auto, io_uring or sync"),
        }
    }
}

/// What a write is when the guest is told that it is done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CacheConfig {
    /// In a cache that the guest flushes.
    #[default]
    Writeback,
    /// On stable storage.
    Writethrough,
}

impl std::str::FromStr for CacheConfig {
    type Err = &'static str;
    fn from_str(word: &str) -> Result<Self, Self::Err> {
        match word {
            "writeback" => Ok(Self::Writeback),
            "writethrough" => Ok(Self::Writethrough),
            _ => Err("write writeback or writethrough"),
        }
    }
}

impl DiskConfig {
    fn of(path: Source) -> Self {
        Self {
            path,
            id: None,
            readonly: false,
            direct: false,
            queues: 1,
            threads: 1,
            engine: EngineConfig::default(),
            cache: CacheConfig::default(),
            block_size: None,
            physical_block_size: None,
            serial: None,
            bw: None,
            bw_burst: None,
            iops: None,
            iops_burst: None,
            lock: true,
        }
    }

    /// Reads `path=FILE,ro,…`.
    pub(crate) fn from_flag(argument: &str) -> Result<Self, OptionsError> {
        let options = Options::keys(argument);
        let known = "path, fd, ro, direct, queues, threads, id, serial, bw, bw-burst, iops, \
                     iops-burst, engine, block-size, physical-block-size, cache and lock";
        let mut path: Option<Source> = None;
        let mut disk = Self::of(Source::Path(std::path::PathBuf::new()));
        options.each(known, |key, value| {
            match key {
                "path" | "fd" if path.is_some() => {
                    return Err("one disk has one file; repeat --disk for more".to_owned());
                }
                "path" => path = Some(parse(value)?),
                "fd" => path = Some(parse(value.map(|n| format!("fd:{n}")).as_deref())?),
                "ro" => disk.readonly = switch(value)?,
                "direct" => disk.direct = switch(value)?,
                "queues" => disk.queues = parse(value)?,
                "threads" => disk.threads = parse(value)?,
                "id" => disk.id = Some(parse(value)?),
                "serial" => disk.serial = Some(parse(value)?),
                "bw" => disk.bw = Some(parse(value)?),
                "bw-burst" => disk.bw_burst = Some(parse(value)?),
                "iops" => disk.iops = Some(parse(value)?),
                "iops-burst" => disk.iops_burst = Some(parse(value)?),
                "engine" => disk.engine = parse(value)?,
                "block-size" => disk.block_size = Some(bytes(value)?),
                "physical-block-size" => disk.physical_block_size = Some(bytes(value)?),
                "cache" => disk.cache = parse(value)?,
                "lock" => disk.lock = switch(value)?,
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        disk.path =
            path.ok_or_else(|| options.missing("name the disk's file: path=FILE or fd=N"))?;
        Ok(disk)
    }

    /// Checks the disk at place `number` of the list.
    pub(super) fn check(&self, number: usize) -> Result<DiskSpec, BadDevice> {
        let id = self.id.clone().unwrap_or_else(|| format!("disk{number}"));
        let bad = |why: String| Err(BadDevice::new(&id, why));
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return bad(format!("a disk has 1 to {MAX_QUEUES} queues"));
        }
        if !(1..=self.queues).contains(&self.threads) {
            return bad(format!(
                "{} threads cannot share {} queues: write 1 to {}",
                self.threads, self.queues, self.queues
            ));
        }
        if let Some(why) = block_size_error(self.block_size, self.physical_block_size) {
            return bad(why);
        }
        let serial = match &self.serial {
            Some(serial)
                if serial.len() > MAX_SERIAL || !serial.bytes().all(|b| b.is_ascii_graphic()) =>
            {
                return bad(format!(
                    "a serial has up to {MAX_SERIAL} letters, digits and signs"
                ));
            }
            Some(serial) => serial.clone(),
            None => id.chars().take(MAX_SERIAL).collect(),
        };
        if self.readonly && self.cache == CacheConfig::Writethrough {
            return bad("cache has no effect on a disk that is only read; remove it".to_owned());
        }
        let rate = |per_second, burst| RateSpec { per_second, burst };
        let lone = |burst: bool, limit: bool| burst && !limit;
        if lone(self.bw_burst.is_some(), self.bw.is_some()) {
            return bad("bw_burst has no effect without bw; add bw, or remove it".to_owned());
        }
        if lone(self.iops_burst.is_some(), self.iops.is_some()) {
            return bad("iops_burst has no effect without iops; add iops, or remove it".to_owned());
        }
        let limits = limits(&LimitsSpec {
            direction: None,
            bytes: self.bw.map(|bw| rate(bw.0, self.bw_burst.map(|b| b.0))),
            ops: self.iops.map(|iops| rate(iops, self.iops_burst)),
        });
        let limits = match limits {
            Ok(limits) => limits,
            Err(why) => return bad(why.to_owned()),
        };
        Ok(DiskSpec {
            id,
            path: self.path.clone(),
            options: DiskOptions {
                readonly: self.readonly,
                direct: self.direct,
                lock: self.lock,
                engine: match self.engine {
                    EngineConfig::Auto => DiskEngine::Auto,
                    EngineConfig::IoUring => DiskEngine::IoUring,
                    EngineConfig::Sync => DiskEngine::Sync,
                },
                queues: self.queues,
                threads: self.threads,
                block_size: self.block_size,
                physical_block_size: self.physical_block_size,
                serial,
                writeback: self.cache == CacheConfig::Writeback,
                limits,
            },
        })
    }
}

/// A size that is small enough for a block.
fn bytes(value: Option<&str>) -> Result<u32, String> {
    let size: ByteSize = parse(value)?;
    u32::try_from(size.0).map_err(|_| "too large for a block".to_owned())
}

fn block_size_error(logical: Option<u32>, physical: Option<u32>) -> Option<String> {
    let fits = |size: &u32, range: &std::ops::RangeInclusive<u32>| {
        size.is_power_of_two() && range.contains(size)
    };
    if let Some(size) = logical.filter(|size| !fits(size, &BLOCK_SIZES)) {
        return Some(format!(
            "a block of {size} bytes cannot be: write 512, 1024, 2048 or 4096"
        ));
    }
    if let Some(size) = physical.filter(|size| !fits(size, &PHYSICAL_BLOCK_SIZES)) {
        return Some(format!(
            "a physical block of {size} bytes cannot be: write a power of two from 512 to 64K"
        ));
    }
    match (logical, physical) {
        (Some(logical), Some(physical)) if physical < logical => Some(format!(
            "a physical block of {physical} bytes is smaller than a logical one of {logical}"
        )),
        _ => None,
    }
}

fn limits(spec: &LimitsSpec) -> Result<Limits, &'static str> {
    if spec.direction.is_some() {
        return Err("a disk has no direction: its limits are for reads and writes together");
    }
    let limit = |rate: Option<RateSpec>| match rate {
        None => Ok(None),
        Some(rate) => RateLimit::new(rate.per_second, rate.burst.unwrap_or(rate.per_second))
            .map(Some)
            .ok_or("a limit of 0 would stop the disk; leave it out for no limit"),
    };
    Ok(Limits {
        bytes: limit(spec.bytes)?,
        ops: limit(spec.ops)?,
    })
}

#[derive(Debug, Clone)]
pub(super) struct DiskSpec {
    id: String,
    path: Source,
    options: DiskOptions,
}

/// A disk cannot be opened.
#[derive(Debug, Error)]
enum OpenError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("disk {path}")]
    Backing {
        path: Source,
        #[source]
        source: BackingError,
    },
    #[error("disk {path}")]
    Disk {
        path: Source,
        #[source]
        source: DiskError,
    },
}

impl DiskSpec {
    fn file(&self) -> Result<File, OpenError> {
        match &self.path {
            Source::Fd(_) => Ok(self.path.open("disk")?),
            Source::Path(path) => self.open_path(path),
        }
    }

    fn open_path(&self, path: &Path) -> Result<File, OpenError> {
        let failed = |source| SourceError::Open {
            what: "disk",
            path: path.to_path_buf(),
            source,
        };
        let metadata = std::fs::metadata(path).map_err(failed)?;
        check_disk_kind(&metadata).map_err(|source| OpenError::Backing {
            path: self.path.clone(),
            source,
        })?;
        let mut how = OpenOptions::new();
        how.read(true).write(!self.options.readonly);
        Ok(how.open(path).map_err(failed)?)
    }

    fn disk(&self) -> Result<Disk, OpenError> {
        Disk::new(self.file()?, &self.options).map_err(|source| OpenError::Disk {
            path: self.path.clone(),
            source,
        })
    }

    /// As `top` shows it: 15 bytes.
    fn thread_name(&self, number: u16) -> String {
        let id: String = self.id.chars().take(8).collect();
        match self.options.threads {
            1 => format!("blk-{id}"),
            _ => format!("blk-{id}-{number}"),
        }
    }
}

impl DeviceSpec for DiskSpec {
    fn kind(&self) -> &'static str {
        "virtio-blk"
    }
    fn id(&self) -> &str {
        &self.id
    }
    fn sources(&self) -> Vec<&Source> {
        vec![&self.path]
    }
    fn open(&self, host: &HostContext) -> Result<Box<dyn OpenDevice>, DeviceError> {
        let disk = self.disk().map_err(|e| DeviceError::new(self, e))?;
        let threads = (0..self.options.threads)
            .map(|number| host.thread(&self.thread_name(number), ThreadKind::BLK))
            .collect::<Result<_, _>>()
            .map_err(|e| DeviceError::new(self, e))?;
        Ok(Box::new(OpenDisk {
            threads,
            disk: Arc::new(disk),
        }))
    }
}

struct OpenDisk {
    disk: Arc<Disk>,
    threads: Vec<IoThread>,
}

impl OpenDevice for OpenDisk {
    fn model(&self, _place: &Place<'_>) -> Result<Box<dyn VirtioModel>, DeviceError> {
        let threads = self.threads.iter().map(IoThread::handle).collect();
        Ok(Box::new(Blk::new(Arc::clone(&self.disk), threads)))
    }

    fn adjust(&self, what: &Adjust) -> Result<(), AdjustError> {
        match what {
            Adjust::DiskSize(bytes) => self.disk.resize(*bytes).map_err(|e| match e {
                ResizeError::Host { .. } => AdjustError::Host {
                    what: "the disk was not resized",
                    source: Box::new(e),
                },
                _ => AdjustError::Value(e.to_string()),
            }),
            Adjust::Limits(spec) => {
                let limits = limits(spec).map_err(|why| AdjustError::Value(why.to_owned()))?;
                self.disk.limit(limits);
                Ok(())
            }
            _ => Err(AdjustError::Unsupported(what.verb())),
        }
    }
}

#[cfg(test)]
mod tests;
