//! Any rings, descriptors and requests in guest RAM, and any accesses to the configuration space,
//! against a disk of 64 KiB.
//!
//! Input: a byte of choices, the number of accesses to the configuration space, the accesses (4 bytes
//! each), and what is in guest RAM from its beginning at 4 KiB on.
#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use libfuzzer_sys::fuzz_target;
use testudo_bus::Access;
use testudo_fuzz::Host;
use testudo_memory::{RamHandle, RamView};
use testudo_pci::PciFunction;
use virtio_devices::{Blk, Disk, DiskEngine, DiskOptions, IoThread, Limits, VirtioPci, Wiring};
use vm_memory::{Bytes, GuestAddress};

const RAM: usize = 64 << 10;
const RAM_START: u64 = 0x1000;
const STEP: usize = 4;
const DISK: u64 = 64 << 10;
const CONFIG: u64 = 0x2000;
const STATUS: u64 = 20;

/// What lasts from one input to the next: threads, files, rings.
struct Bench {
    io: IoThread,
    file: File,
    /// By engine and by whether it is read-only.
    disks: Vec<Arc<Disk>>,
}

fn bench() -> &'static Bench {
    static BENCH: OnceLock<Bench> = OnceLock::new();
    BENCH.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("fuzz-virtio-blk-{}", std::process::id()));
        let mut how = File::options();
        how.read(true).write(true).create(true);
        let open = || how.open(&path).expect("a temporary file");
        let file = open();
        file.set_len(DISK).expect("64 KiB");
        let engines = [DiskEngine::Sync, DiskEngine::IoUring, DiskEngine::Auto];
        let kinds = engines.into_iter().flat_map(|e| [(e, false), (e, true)]);
        let disks = kinds
            .filter_map(|(engine, readonly)| {
                let options = DiskOptions {
                    readonly,
                    direct: false,
                    lock: false,
                    engine,
                    queues: 1,
                    threads: 1,
                    block_size: None,
                    physical_block_size: None,
                    serial: "fuzz".to_owned(),
                    writeback: true,
                    limits: Limits::default(),
                };
                Disk::new(open(), &options).ok().map(Arc::new)
            })
            .collect();
        std::fs::remove_file(&path).expect("it can go");
        Bench {
            io: IoThread::spawn("fuzz", || Ok(())).expect("a thread"),
            file,
            disks,
        }
    })
}

fn put(function: &mut VirtioPci, offset: u64, data: &[u8]) {
    function.bar_write(VirtioPci::BAR, Access { offset }, data);
}

fn config(function: &mut VirtioPci, step: [u8; STEP]) {
    let [kind, at, value, more] = step;
    let at = CONFIG + u64::from(at & 0x7f);
    let width = 1 << (kind & 3);
    let data = [value, more, value, more, value, more, value, more];
    if kind & 0x80 != 0 {
        put(function, at, &data[..width]);
    } else {
        let mut data = data;
        function.bar_read(VirtioPci::BAR, Access { offset: at }, &mut data[..width]);
    }
}

fuzz_target!(|data: &[u8]| {
    let [how, steps, rest @ ..] = data else {
        return;
    };
    let (steps, rest) = rest.split_at((usize::from(*steps) * STEP).min(rest.len()));
    let bench = bench();
    let disk = &bench.disks[usize::from(how >> 4) % bench.disks.len()];
    let ram = RamView::from_ranges(&[(GuestAddress(RAM_START), RAM)]).expect("64 KiB of memory");
    ram.write_slice(&rest[..rest.len().min(RAM)], GuestAddress(RAM_START))
        .expect("it fits");
    let wiring = Wiring {
        ram: RamHandle::new(ram.clone()),
        msi: &Host,
        doorbells: Arc::new(Host),
        windows: Arc::new(Host),
    };
    let model = Box::new(Blk::new(Arc::clone(disk), vec![bench.io.handle()]));
    let mut function = VirtioPci::new(model, wiring).expect("a device");
    function.config_write(4, &[6, 0]);
    put(&mut function, STATUS, &[1]);
    put(&mut function, STATUS, &[3]);
    // FLUSH and CONFIG_WCE, the ring's features, and VERSION_1.
    let features = (u32::from(how & 3) << 28) | (u32::from(how >> 2 & 1) * 0xa00);
    put(&mut function, 8, &0u32.to_le_bytes());
    put(&mut function, 12, &features.to_le_bytes());
    put(&mut function, 8, &1u32.to_le_bytes());
    put(&mut function, 12, &1u32.to_le_bytes());
    put(&mut function, STATUS, &[0xb]);
    put(&mut function, 24, &16u16.to_le_bytes());
    put(&mut function, 32, &RAM_START.to_le_bytes());
    put(&mut function, 40, &(RAM_START + 0x1000).to_le_bytes());
    put(&mut function, 48, &(RAM_START + 0x2000).to_le_bytes());
    put(&mut function, 28, &1u16.to_le_bytes());
    for step in steps.as_chunks::<STEP>().0 {
        config(&mut function, *step);
    }
    // A worker looks at its queues when it starts, before this returns.
    put(&mut function, STATUS, &[0xf]);
    function.pause();
    function.resume();
    // Nothing touches guest memory or the file after a reset.
    put(&mut function, STATUS, &[0]);
    let mut before = vec![0; RAM];
    ram.read_slice(&mut before, GuestAddress(RAM_START))
        .expect("all of it");
    assert_eq!(bench.file.metadata().expect("its size").len(), DISK);
    assert_eq!(disk.size(), DISK);
    let mut byte = [0];
    bench.file.read_exact_at(&mut byte, 0).expect("a byte");
    let mut after = vec![0; RAM];
    ram.read_slice(&mut after, GuestAddress(RAM_START))
        .expect("all of it");
    assert!(before == after, "guest memory changed after a reset");
});
