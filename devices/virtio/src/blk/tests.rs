mod control;
mod host;
mod requests;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use testudo_pci::PciFunction as _;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::conformance::{Subject, conformance};
use crate::driver::{Areas, BUFFERS, Desc, Driver, NEXT, WRITE, get_u16, offer, write_desc};
use crate::limiter::Limits;

const SECTOR: usize = 512;
/// Where a driver puts headers, data to write, data to read, status bytes; 64 KiB for each head.
const STRIDE: u64 = 0x4000;
const READ: u32 = 0;
const WRITE_TO: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// Not written by the device.
const NONE: u8 = 0xee;

/// A file that nobody else sees.
pub(crate) fn scratch(size: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    file
}

pub(crate) fn options(engine: DiskEngine) -> DiskOptions {
    DiskOptions {
        readonly: false,
        direct: false,
        lock: true,
        engine,
        queues: 1,
        threads: 1,
        block_size: None,
        physical_block_size: None,
        serial: "serial-of-tests".to_owned(),
        writeback: true,
        limits: Limits::default(),
    }
}

/// io_uring for everything, or system calls on a host that has none.
fn uring() -> DiskEngine {
    match Disk::new(scratch(4096), &options(DiskEngine::IoUring)) {
        Ok(_) => DiskEngine::IoUring,
        Err(_) => DiskEngine::Sync,
    }
}

fn model(engine: DiskEngine, io: &IoHandle) -> Box<dyn VirtioModel> {
    let disk = Disk::new(scratch(1 << 20), &options(engine)).unwrap();
    Box::new(Blk::new(Arc::new(disk), vec![io.clone()]))
}

const SYNC: Subject = Subject {
    make: |io| model(DiskEngine::Sync, io),
    queue: 0,
    request: || (vec![0; 16], 513),
};

const URING: Subject = Subject {
    make: |io| model(uring(), io),
    queue: 0,
    request: || (vec![0; 16], 513),
};

const WRITING: Subject = Subject {
    make: |io| model(uring(), io),
    queue: 0,
    request: || (header(WRITE_TO, 0, &[7; SECTOR]), 1),
};

const MIXED: Subject = Subject {
    make: |io| model(DiskEngine::Auto, io),
    ..SYNC
};

conformance!(conforms, SYNC);
conformance!(conforms_with_both, MIXED);
conformance!(conforms_with_io_uring, URING);
conformance!(conforms_when_writing, WRITING);

/// The ways to carry requests out; those with io_uring are the first where there is none.
fn engines() -> [DiskEngine; 3] {
    [DiskEngine::Sync, DiskEngine::Auto, uring()]
}

fn header(kind: u32, sector: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::from(kind.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes.extend(data);
    bytes
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = Vec::from(sector.to_le_bytes());
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    let next = |n: usize| (n.wrapping_mul(31) >> 3).to_le_bytes()[0] ^ seed;
    (0..len).map(next).collect()
}

/// A disk and its driver.
struct Bench {
    driver: Driver,
    disk: Arc<Disk>,
    file: File,
}

impl Bench {
    fn new(options: &DiskOptions) -> Self {
        Self::of(scratch(1 << 20), options)
    }

    fn of(file: File, options: &DiskOptions) -> Self {
        // Another description for the test: the disk's may be one for O_DIRECT.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let ours = File::options().read(true).write(true).open(path).unwrap();
        let disk = Arc::new(Disk::new(file, options).unwrap());
        let shared = Arc::clone(&disk);
        let threads = options.threads.into();
        let mut driver = Driver::new(|io| Box::new(Blk::new(shared, vec![io.clone(); threads])));
        driver.start_full();
        Self {
            driver,
            disk,
            file: ours,
        }
    }

    /// Writes the request of `head` into guest memory: what the driver gives, what it wants, and a
    /// status byte, in descriptors of at most `piece` bytes each.
    fn put(&self, head: u16, given: &[u8], wanted: usize, piece: usize) {
        let base = BUFFERS + u64::from(head / 4) * STRIDE;
        let ram = &self.driver.ram;
        ram.write_slice(given, GuestAddress(base)).unwrap();
        let mut answer = vec![0; wanted];
        answer.push(NONE);
        let to = base + 0x2000;
        ram.write_slice(&answer, GuestAddress(to)).unwrap();
        let mut parts = Vec::new();
        for (at, len, flags) in [(base, given.len(), 0), (to, wanted + 1, WRITE)] {
            let mut done = 0;
            while done < len {
                let now = piece.min(len - done);
                let now_u32 = u32::try_from(now).unwrap();
                parts.push((at + u64::try_from(done).unwrap(), now_u32, flags));
                done += now;
            }
        }
        let last = parts.len() - 1;
        for (n, (at, len, flags)) in parts.into_iter().enumerate() {
            let index = head + u16::try_from(n).unwrap();
            let more = if n < last { NEXT } else { 0 };
            let desc = Desc::new(at, len, flags | more, index + 1);
            write_desc(ram, Areas::of(0, 16).desc, index, desc);
        }
    }

    /// Status and data of the request of `head`.
    fn answer(&self, head: u16, wanted: usize) -> (u8, Vec<u8>) {
        let at = BUFFERS + u64::from(head / 4) * STRIDE + 0x2000;
        let mut answer = vec![0; wanted + 1];
        self.driver
            .ram
            .read_slice(&mut answer, GuestAddress(at))
            .unwrap();
        (answer.pop().unwrap(), answer)
    }

    fn raw(&mut self, given: &[u8], wanted: usize, piece: usize) -> (u8, u32, Vec<u8>) {
        self.put(0, given, wanted, piece);
        self.driver.offer_one(0, 0);
        let (head, len) = self.driver.used(0);
        assert_eq!(head, 0);
        let (status, data) = self.answer(0, wanted);
        (status, len, data)
    }

    fn request(
        &mut self,
        kind: u32,
        sector: u64,
        data: &[u8],
        wanted: usize,
    ) -> (u8, u32, Vec<u8>) {
        self.raw(&header(kind, sector, data), wanted, 1 << 16)
    }

    fn status(&mut self, kind: u32, sector: u64, data: &[u8]) -> u8 {
        self.request(kind, sector, data, 0).0
    }

    fn on_file(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.file.read_exact_at(&mut data, offset).unwrap();
        data
    }

    fn errors(&self) -> u64 {
        self.driver.function.counters().queues[0]
            .errors
            .load(Ordering::Relaxed)
    }

    fn config(&mut self) -> [u8; config::LEN as usize] {
        self.driver.read(0x2000)
    }

    fn used_index(&self) -> u16 {
        get_u16(&self.driver.ram, Areas::of(0, 16).used + 2)
    }
}
