//! A disk as the host holds it: the file, its limits, its rings. It outlives the models made of it,
//! one for each boot of the guest.
//!
//! Shared by the threads that serve it, the vCPUs (configuration space) and the control thread
//! ([`Disk::resize`], [`Disk::limit`]).

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::backing::{Access, Backing, BackingError};
use super::config::{Layout, QUEUE_SIZE};
use super::lane::Lane;
use super::request::Bounds;
use super::ring::Ring;
use super::throttle::Throttle;
use crate::limiter::Limits;
use crate::signal::DeviceEvents;
use crate::timer::Timer;

/// Who carries requests out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DiskEngine {
    /// What is quickest: system calls for what does not wait (the page cache), io_uring, where it
    /// works, for what does.
    #[default]
    Auto,
    /// io_uring for everything, or an error.
    IoUring,
    /// System calls, one after the other.
    Sync,
}

/// What a disk is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskOptions {
    /// The guest may only read.
    pub readonly: bool,
    /// Past the host's page cache.
    pub direct: bool,
    /// Lock the file: shared if read-only, exclusive if not.
    pub lock: bool,
    /// Who carries requests out.
    pub engine: DiskEngine,
    /// Queues, from 1.
    pub queues: u16,
    /// Threads that serve them, from 1 to as many as there are queues.
    pub threads: u16,
    /// Bytes in a logical block, if not what suits the file.
    pub block_size: Option<u32>,
    /// Bytes in a physical block, if not what suits the file.
    pub physical_block_size: Option<u32>,
    /// What `VIRTIO_BLK_T_GET_ID` answers: up to 20 bytes.
    pub serial: String,
    /// Whether the guest finds a write cache switched on; it flushes then.
    pub writeback: bool,
    /// Limits.
    pub limits: Limits,
}

/// A file does not make the disk that was asked for. The message goes on where "disk /path" ended.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The file.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// Blocks smaller than the host's.
    #[error(
        "has blocks of {host} bytes on the host: a block size of {asked} cannot be had with `direct`"
    )]
    BlockSize {
        /// What was asked for.
        asked: u32,
        /// What the host needs.
        host: u32,
    },
    /// Not one block in it.
    #[error("has {size} bytes, less than a block of {block}; give it a size first (truncate -s)")]
    Empty {
        /// Bytes.
        size: u64,
        /// Bytes in a block.
        block: u32,
    },
    /// io_uring was asked for and is not to be had.
    #[error(
        "cannot have io_uring: this host's kernel lacks it, or does not allow it (/proc/sys/kernel/io_uring_disabled); use engine=auto"
    )]
    IoUring {
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The host does not give what every disk needs.
    #[error("cannot be set up")]
    Host {
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// A disk cannot have that size.
#[derive(Debug, Error)]
pub enum ResizeError {
    /// Not a size in blocks.
    #[error("{asked} bytes are not a multiple of the disk's block of {block}, or none")]
    Blocks {
        /// What was asked for.
        asked: u64,
        /// Bytes in a block.
        block: u32,
    },
    /// It has the size it has.
    #[error(
        "the disk has {is} bytes and cannot be given another size from here: it is a block device, or read-only; ask for what it has become"
    )]
    Fixed {
        /// Bytes.
        is: u64,
    },
    /// The host refused.
    #[error("the file cannot be made {asked} bytes long")]
    Host {
        /// What was asked for.
        asked: u64,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// A model at work: who must hear of changes.
struct Running {
    device: DeviceEvents,
    kicks: Vec<Arc<EventFd>>,
}

/// What a disk has done.
#[derive(Default)]
pub(super) struct Gauges {
    pub(super) reads: Arc<AtomicU64>,
    pub(super) read_bytes: Arc<AtomicU64>,
    /// Of the reads, those that were in the page cache when they were tried.
    pub(super) cached_reads: Arc<AtomicU64>,
    pub(super) writes: Arc<AtomicU64>,
    pub(super) written_bytes: Arc<AtomicU64>,
    pub(super) flushes: Arc<AtomicU64>,
    pub(super) discards: Arc<AtomicU64>,
}

impl Gauges {
    fn list(&self) -> Vec<(&'static str, Arc<AtomicU64>)> {
        [
            ("reads", &self.reads),
            ("read_bytes", &self.read_bytes),
            ("cached_reads", &self.cached_reads),
            ("writes", &self.writes),
            ("written_bytes", &self.written_bytes),
            ("flushes", &self.flushes),
            ("discards", &self.discards),
        ]
        .map(|(name, gauge)| (name, Arc::clone(gauge)))
        .to_vec()
    }
}

/// The host's half of a disk.
pub struct Disk {
    pub(super) backing: Backing,
    pub(super) throttle: Throttle,
    pub(super) gauges: Gauges,
    pub(super) serial: [u8; 20],
    size: AtomicU64,
    logical: u32,
    physical: u32,
    queues: u16,
    threads: u16,
    writeback: bool,
    /// One for each thread, taken while a model runs.
    lanes: Mutex<Vec<Option<Lane>>>,
    running: Mutex<Option<Running>>,
}

impl Disk {
    /// A disk of `file`, which its owner opened for what the disk is to do.
    pub fn new(file: File, options: &DiskOptions) -> Result<Self, DiskError> {
        let host = |source| DiskError::Host { source };
        let access = Access {
            readonly: options.readonly,
            direct: options.direct,
            lock: options.lock,
        };
        let backing = Backing::new(file, access)?;
        let (host_logical, host_physical) = backing.block_sizes();
        let logical = options.block_size.unwrap_or(host_logical);
        if backing.alignment().is_some_and(|least| logical < least) {
            return Err(DiskError::BlockSize {
                asked: logical,
                host: host_logical,
            });
        }
        let physical = options.physical_block_size.unwrap_or(host_physical);
        let mut serial = [0; 20];
        for (to, from) in serial.iter_mut().zip(options.serial.bytes()) {
            *to = from;
        }
        let size = backing.size().map_err(host)?;
        let disk = Self {
            throttle: Throttle::new(options.limits),
            gauges: Gauges::default(),
            serial,
            size: AtomicU64::new(whole_blocks(size, logical)),
            logical,
            physical: physical.max(logical),
            queues: options.queues,
            threads: options.threads,
            writeback: options.writeback,
            lanes: Mutex::new(Vec::new()),
            running: Mutex::new(None),
            backing,
        };
        if disk.size() == 0 {
            let block = logical;
            return Err(DiskError::Empty { size, block });
        }
        let lanes = (0..options.threads).map(|_| {
            let ring = disk.ring(options.engine)?;
            let inline = options.engine == DiskEngine::Auto && disk.backing.alignment().is_none();
            Ok(Some(Lane::new(ring, Timer::new().map_err(host)?, inline)))
        });
        let lanes = lanes.collect::<Result<_, DiskError>>()?;
        *lock(&disk.lanes) = lanes;
        Ok(disk)
    }

    fn ring<T>(&self, engine: DiskEngine) -> Result<Option<Ring<T>>, DiskError> {
        if engine == DiskEngine::Sync {
            return Ok(None);
        }
        // The most queues that one thread serves.
        let queues = usize::from(self.queues.div_ceil(self.threads.max(1)));
        let depth = queues.saturating_mul(QUEUE_SIZE.into());
        match Ring::new(self.backing.as_fd(), depth) {
            Ok(ring) => Ok(Some(ring)),
            Err(source) if engine == DiskEngine::IoUring => Err(DiskError::IoUring { source }),
            Err(e) => {
                log::debug!("disks are served without io_uring: {e}");
                Ok(None)
            }
        }
    }

    /// Bytes the guest sees.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Threads that are to serve it.
    pub fn threads(&self) -> u16 {
        self.threads
    }

    /// Makes it `asked` bytes long, or, if its size is not ours to change, takes note of what it
    /// has become; tells the guest.
    pub fn resize(&self, asked: u64) -> Result<(), ResizeError> {
        let block = self.logical;
        if asked == 0 || !asked.is_multiple_of(block.into()) {
            return Err(ResizeError::Blocks { asked, block });
        }
        // Requests behind the new end are refused before it is cut off.
        let before = self.size.fetch_min(asked, Ordering::AcqRel);
        let is = match self.backing.resize(asked) {
            Ok(is) => is,
            Err(source) => {
                self.size.store(before, Ordering::Release);
                return Err(ResizeError::Host { asked, source });
            }
        };
        if whole_blocks(is, block) != asked {
            self.size.store(before, Ordering::Release);
            return Err(ResizeError::Fixed { is });
        }
        self.size.store(asked, Ordering::Release);
        if let Some(running) = lock(&self.running).as_ref() {
            running.device.config_changed();
        }
        Ok(())
    }

    /// New limits, at once.
    pub fn limit(&self, limits: Limits) {
        self.throttle.set(limits);
        if let Some(running) = lock(&self.running).as_ref() {
            // Requests that wait for the old limits are looked at anew.
            for kick in &running.kicks {
                let _ = kick.write(1);
            }
        }
    }

    pub(super) fn layout(&self) -> Layout {
        Layout {
            size: self.size(),
            logical: self.logical,
            physical: self.physical,
            queues: self.queues,
            readonly: self.backing.readonly(),
            sparse: self.backing.sparse(),
        }
    }

    pub(super) fn bounds(&self) -> Bounds {
        let granule = self.backing.alignment().map_or(512, u64::from);
        Bounds {
            size: self.size(),
            granule,
            readonly: self.backing.readonly(),
            sparse: self.backing.sparse(),
        }
    }

    pub(super) fn starts_writeback(&self) -> bool {
        self.writeback && !self.backing.readonly()
    }

    pub(super) fn gauges(&self) -> Vec<(&'static str, Arc<AtomicU64>)> {
        self.gauges.list()
    }

    /// What thread `number` works with, if nobody has it.
    pub(super) fn take_lane(&self, number: usize) -> Option<Lane> {
        lock(&self.lanes).get_mut(number)?.take()
    }

    pub(super) fn return_lane(&self, number: usize, lane: Lane) {
        if let Some(place) = lock(&self.lanes).get_mut(number) {
            *place = Some(lane);
        }
    }

    pub(super) fn started(&self, device: DeviceEvents, kicks: Vec<Arc<EventFd>>) {
        *lock(&self.running) = Some(Running { device, kicks });
    }

    pub(super) fn stopped(&self) {
        *lock(&self.running) = None;
    }
}

fn whole_blocks(size: u64, block: u32) -> u64 {
    let block = u64::from(block);
    size.checked_div(block).unwrap_or(0).saturating_mul(block)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A switch that vCPUs turn and workers look at.
pub(super) type Switch = Arc<AtomicBool>;
