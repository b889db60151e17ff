//! What requests come to.

use proptest::prelude::*;
use testudo_memory::RamView;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::blk::request::{Bounds, Operation, Request};
use crate::queue::{CheckedQueue, QueueRegisters, VirtQueue};
use crate::signal::{Interrupts, QueueInterrupt};

#[test]
fn what_is_written_is_in_the_file_and_is_read_back() {
    for engine in engines() {
        let mut bench = Bench::new(&options(engine));
        let data = pattern(8 * SECTOR, 3);
        assert_eq!(bench.request(WRITE_TO, 5, &data, 0).0, OK);
        assert_eq!(bench.on_file(5 * 512, data.len()), data);
        let (status, len, back) = bench.request(READ, 5, &[], data.len());
        assert_eq!((status, len), (OK, 8 * 512 + 1));
        assert!(back == data);
        assert_eq!(bench.status(FLUSH, 0, &[]), OK);
        let end = (1 << 20) / 512 - 1;
        assert_eq!(bench.request(WRITE_TO, end, &data[..SECTOR], 0).0, OK);
        assert_eq!(bench.request(READ, end, &[], SECTOR).0, OK);
        assert_eq!(bench.errors(), 0);
    }
}

/// Where descriptors begin and end means nothing: headers split, data joined to them.
#[test]
fn requests_may_be_cut_up_in_any_way() {
    for engine in engines() {
        let mut bench = Bench::new(&options(engine));
        let data = pattern(SECTOR, 9);
        for piece in [67, 100, 511, 513, 4096] {
            bench.file.write_all_at(&[0; SECTOR], 1024).unwrap();
            let given = header(WRITE_TO, 2, &data);
            assert_eq!(bench.raw(&given, 0, piece).0, OK, "{piece}");
            assert_eq!(bench.on_file(1024, SECTOR), data, "{piece}");
            let (status, len, back) = bench.raw(&header(READ, 2, &[]), SECTOR, piece);
            assert_eq!((status, len), (OK, 513), "{piece}");
            assert!(back == data, "{piece}");
        }
        for piece in 3..16 {
            assert_eq!(bench.raw(&header(FLUSH, 0, &[]), 0, piece).0, OK);
        }
    }
}

#[test]
fn what_is_not_on_the_disk_or_not_in_sectors_is_an_error() {
    for engine in engines() {
        let mut bench = Bench::new(&options(engine));
        let sectors = (1_u64 << 20) / 512;
        let two = vec![1; 2 * SECTOR];
        let mut wrong = 0;
        for sector in [
            sectors - 1,
            sectors,
            sectors + 1,
            u64::MAX,
            u64::MAX / 512,
            u64::MAX / 512 + 1,
            1 << 55,
        ] {
            assert_eq!(bench.status(WRITE_TO, sector, &two), IOERR, "{sector}");
            let (status, len, _) = bench.request(READ, sector, &[], 2 * SECTOR);
            assert_eq!((status, len), (IOERR, 0), "{sector}");
            wrong += 2;
        }
        for len in [1, 511, 513, 1000] {
            assert_eq!(bench.status(WRITE_TO, 0, &vec![1; len]), IOERR, "{len}");
            assert_eq!(bench.request(READ, 0, &[], len).0, IOERR, "{len}");
            wrong += 2;
        }
        assert_eq!(bench.errors(), wrong);
        let all = bench.on_file(0, 1 << 20);
        assert!(all.iter().all(|b| *b == 0), "something was written");
    }
}

#[test]
fn nothing_is_read_and_written_without_complaint() {
    let mut bench = Bench::new(&options(DiskEngine::Auto));
    assert_eq!(bench.request(READ, 0, &[], 0).0, OK);
    assert_eq!(bench.status(WRITE_TO, 0, &[]), OK);
    for kind in [DISCARD, ZEROES] {
        assert_eq!(bench.status(kind, 0, &range(0, 0, 0)), OK);
    }
}

/// CVE-2026-48914: there is no SCSI passthrough to be attacked.
#[test]
fn unknown_requests_and_scsi_commands_are_unsupported() {
    let mut bench = Bench::new(&options(DiskEngine::Auto));
    for kind in [
        2,
        3,
        5,
        6,
        7,
        9,
        10,
        12,
        14,
        15,
        16,
        26,
        0x8000_0000,
        u32::MAX,
    ] {
        assert_eq!(bench.status(kind, 0, &[0; 64]), UNSUPP, "{kind}");
    }
}

#[test]
fn a_chain_without_room_for_a_status_goes_back_as_it_is() {
    let mut bench = Bench::new(&options(DiskEngine::Auto));
    let given = header(WRITE_TO, 0, &[1; SECTOR]);
    let ram = &bench.driver.ram;
    ram.write_slice(&given, GuestAddress(BUFFERS)).unwrap();
    let len = u32::try_from(given.len()).unwrap();
    bench.driver.submit(0, &[Desc::new(BUFFERS, len, 0, 0)]);
    assert_eq!(bench.driver.used(0), (0, 0));
    assert_eq!(bench.on_file(0, 1), [0]);
    // A header that is not whole has room for an answer.
    assert_eq!(bench.raw(&[0; 15], 0, 64).0, IOERR);
    bench.driver.submit(0, &[Desc::new(BUFFERS, 1, WRITE, 0)]);
    assert_eq!(bench.driver.used(0), (0, 1));
    assert_eq!(bench.errors(), 3);
}

#[test]
fn the_serial_fills_what_room_there_is() {
    let mut bench = Bench::new(&options(DiskEngine::Auto));
    let (status, len, id) = bench.request(GET_ID, 0, &[], 20);
    assert_eq!((status, len), (OK, 21));
    assert_eq!(id, b"serial-of-tests\0\0\0\0\0");
    let (status, _, id) = bench.request(GET_ID, 0, &[], 6);
    assert_eq!((status, &id[..]), (OK, &b"serial"[..]));
    let (status, _, id) = bench.request(GET_ID, 0, &[], 40);
    assert_eq!((status, &id[15..]), (OK, &[0; 25][..]));
    assert_eq!(bench.request(GET_ID, 0, &[], 0).0, OK);
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    for engine in engines() {
        let mut bench = Bench::new(&options(engine));
        if !bench.disk.layout().sparse {
            eprintln!("no holes on this file system");
            return;
        }
        bench.file.write_all_at(&[5; 1 << 16], 0).unwrap();
        let blocks = |bench: &Bench| {
            bench.file.sync_all().unwrap();
            std::os::unix::fs::MetadataExt::blocks(&bench.file.metadata().unwrap())
        };
        let before = blocks(&bench);
        assert_eq!(bench.status(DISCARD, 0, &range(8, 16, 0)), OK);
        assert_eq!(bench.on_file(4096, 8192), [0; 8192]);
        assert_eq!(blocks(&bench), before - 16);
        assert_eq!(bench.status(ZEROES, 0, &range(32, 8, 1)), OK);
        assert_eq!(bench.on_file(32 * 512, 4096), [0; 4096]);
        assert_eq!(blocks(&bench), before - 24);
        assert_eq!(bench.status(ZEROES, 0, &range(65, 3, 0)), OK);
        assert_eq!(bench.on_file(65 * 512, 3 * 512), [0; 3 * 512]);
        assert_eq!(bench.on_file(68 * 512, 1), [5]);
        for kind in [DISCARD, ZEROES] {
            let sectors = (1_u64 << 20) / 512;
            let wrong = [
                (range(sectors - 1, 2, 0), IOERR),
                (range(u64::MAX, 1, 0), IOERR),
                (range(0, u32::MAX, 0), IOERR),
                (range(0, 1, 2), UNSUPP),
                (range(0, 1, 0x8000_0000), UNSUPP),
                ([range(0, 1, 0), range(8, 1, 0)].concat(), IOERR),
                (range(0, 1, 0)[..15].to_vec(), IOERR),
                (Vec::new(), IOERR),
            ];
            for (data, status) in wrong {
                assert_eq!(bench.status(kind, 0, &data), status, "{data:?}");
            }
        }
        assert_eq!(bench.status(DISCARD, 0, &range(0, 1, 1)), UNSUPP);
        assert_eq!(bench.on_file(0, 1), [5], "a refused range was touched");
    }
}

#[test]
fn a_read_only_disk_is_only_read() {
    for engine in engines() {
        let file = scratch(1 << 20);
        file.write_all_at(&pattern(SECTOR, 1), 0).unwrap();
        let readonly = DiskOptions {
            readonly: true,
            ..options(engine)
        };
        let mut bench = Bench::of(file, &readonly);
        assert_eq!(bench.status(WRITE_TO, 0, &[1; SECTOR]), IOERR);
        assert_eq!(bench.status(DISCARD, 0, &range(0, 8, 0)), UNSUPP);
        assert_eq!(bench.status(ZEROES, 0, &range(0, 8, 0)), UNSUPP);
        assert_eq!(bench.status(FLUSH, 0, &[]), OK);
        let (status, _, data) = bench.request(READ, 0, &[], SECTOR);
        assert_eq!((status, data), (OK, pattern(SECTOR, 1)));
        bench.driver.write(0x2000 + config::WRITEBACK, &[1]);
        assert_eq!(bench.config()[32], 0);
    }
}

/// The host's file shrinks under the guest: an error, and it is counted.
#[test]
fn errors_of_the_host_are_errors_of_the_guest() {
    for engine in engines() {
        let mut bench = Bench::new(&options(engine));
        bench.file.set_len(6 * 512).unwrap();
        assert_eq!(bench.request(READ, 4, &[], 4 * SECTOR).0, IOERR);
        assert_eq!(bench.request(READ, 100, &[], SECTOR).0, IOERR);
        assert_eq!(bench.request(READ, 4, &[], 2 * SECTOR).0, OK);
        assert_eq!(bench.errors(), 2);
    }
}

struct Deaf;

impl Interrupts for Deaf {
    fn queue(&self, _index: u16) {}
    fn config(&self) {}
    fn queue_event(&self, _index: u16) -> Option<&EventFd> {
        None
    }
}

fn parse(
    ram: &RamView,
    given: &[u8],
    parts: &[(u32, bool)],
    bounds: Bounds,
) -> Option<(Request, u32)> {
    let areas = Areas::of(0, 16);
    ram.write_slice(given, GuestAddress(BUFFERS)).unwrap();
    let (mut from, mut to) = (BUFFERS, BUFFERS + 0x4_0000);
    for (index, (len, writable)) in (0_u16..).zip(parts) {
        let more = if usize::from(index) + 1 < parts.len() {
            NEXT
        } else {
            0
        };
        let (at, flags) = if *writable {
            (&mut to, WRITE)
        } else {
            (&mut from, 0)
        };
        write_desc(
            ram,
            areas.desc,
            index,
            Desc::new(*at, *len, flags | more, index + 1),
        );
        *at += u64::from(*len);
    }
    let registers = QueueRegisters {
        size: 16,
        enabled: true,
        descriptors: areas.desc,
        driver: areas.avail,
        device: areas.used,
        ..QueueRegisters::new(256)
    };
    let checked = CheckedQueue::check(0, &registers, 0, ram).unwrap();
    let interrupt = QueueInterrupt::new(Arc::new(Deaf), 0);
    let mut queue = VirtQueue::new(checked, interrupt, Arc::default());
    offer(ram, &areas, 0);
    let chain = queue.pop(ram).unwrap()?;
    let request = Request::parse(&chain, ram, bounds).ok()?;
    Some((request, chain.writable_len()))
}

proptest! {
    /// Whatever a driver writes: a request that passes is on the disk and its data is in its
    /// buffers.
    #[test]
    fn no_request_reaches_beyond_the_disk(
        kind in prop_oneof![0_u32..16, any::<u32>()],
        sector in prop_oneof![0_u64..40, any::<u64>()],
        rest in prop::collection::vec(any::<u8>(), 0..64),
        small in any::<bool>(),
        reads in prop::collection::vec(0_u32..0x1000, 0..4),
        writes in prop::collection::vec(0_u32..0x1000, 0..4),
        granule in prop_oneof![Just(512_u64), Just(4096)],
        readonly in any::<bool>(),
    ) {
        let ram = crate::driver::ram();
        let mut given = header(kind, sector, &rest);
        if small {
            for byte in given.iter_mut().skip(18).step_by(2) {
                *byte = 0;
            }
        }
        let parts: Vec<_> = reads
            .iter()
            .map(|len| (*len, false))
            .chain(writes.iter().map(|len| (*len, true)))
            .collect();
        if parts.is_empty() {
            return Ok(());
        }
        let size = 32 * 512;
        let bounds = Bounds { size, granule, readonly, sparse: !readonly };
        let Some((request, writable)) = parse(&ram, &given, &parts, bounds) else {
            return Ok(());
        };
        let end = request.offset.checked_add(request.len).unwrap();
        prop_assert!(end <= size);
        prop_assert!(request.status.0 >= BUFFERS + 0x4_0000);
        prop_assert!(writable >= 1);
        match request.operation {
            Operation::Read => prop_assert_eq!(request.len, u64::from(writable - 1)),
            Operation::Write => {
                let readable: u32 = reads.iter().sum();
                prop_assert_eq!(request.len, u64::from(readable - 16));
                prop_assert!(!readonly);
            }
            Operation::Discard | Operation::Zero { .. } => prop_assert!(!readonly),
            Operation::Flush | Operation::GetId => {}
        }
        if matches!(request.operation, Operation::Read | Operation::Write) {
            prop_assert!(request.offset % granule == 0 && request.len % granule == 0);
        }
    }
}
