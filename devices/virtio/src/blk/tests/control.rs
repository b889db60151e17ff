//! What happens beside requests: limits, sizes, the cache switch, reset and pause in the middle.

use std::time::{Duration, Instant};

use super::*;
use crate::limit::RateLimit;

const BATCH: [u16; 4] = [0, 4, 8, 12];

impl Bench {
    /// Four writes of 4 KiB each, of `byte`, made available at once.
    fn write_batch(&mut self, byte: u8) {
        for head in BATCH {
            let sector = u64::from(head) * 8;
            let given = header(WRITE_TO, sector, &[byte; 4096]);
            self.put(head, &given, 0, 1 << 16);
        }
        for head in BATCH {
            offer(&self.driver.ram, &Areas::of(0, 16), head);
        }
        self.driver.kick(0);
    }

    fn scribble(&self) {
        let mark = vec![0xee; 4 * usize::try_from(STRIDE).unwrap()];
        self.driver
            .ram
            .write_slice(&mark, GuestAddress(BUFFERS))
            .unwrap();
    }
}

/// CVE-2026-45782: buffers of requests in flight were used after the device had let go of them.
#[test]
fn a_reset_waits_for_what_is_in_flight() {
    for engine in engines() {
        // Every write goes to the storage: it takes its time.
        let durable = DiskOptions {
            writeback: false,
            ..options(engine)
        };
        let mut bench = Bench::new(&durable);
        for round in 1..6_u8 {
            bench.driver.start_full();
            bench.write_batch(round);
            std::thread::sleep(Duration::from_micros(u64::from(round) * 200));
            bench.driver.set_status(0);
            let answered = bench.used_index();
            let file = bench.on_file(0, 1 << 16);
            bench.scribble();
            std::thread::sleep(Duration::from_millis(10));
            assert_eq!(bench.used_index(), answered, "an answer after the reset");
            assert!(bench.on_file(0, 1 << 16) == file, "a write after the reset");
            for head in BATCH.iter().take(answered.into()) {
                let at = usize::from(*head) * 4096;
                assert!(file[at..at + 4096].iter().all(|b| *b == round));
            }
            for head in BATCH {
                let (status, _) = bench.answer(head, 0);
                assert_eq!(status, NONE, "a status after the reset");
            }
        }
    }
}

#[test]
fn a_pause_answers_what_is_in_flight_and_keeps_the_rest() {
    for engine in engines() {
        let durable = DiskOptions {
            writeback: false,
            ..options(engine)
        };
        let mut bench = Bench::new(&durable);
        for round in 1..6_u8 {
            bench.write_batch(round);
            std::thread::sleep(Duration::from_micros(u64::from(round) * 100));
            bench.driver.function.pause();
            let answered = bench.used_index();
            std::thread::sleep(Duration::from_millis(5));
            assert_eq!(bench.used_index(), answered, "served while paused");
            bench.driver.function.resume();
            for _ in BATCH {
                bench.driver.used(0);
            }
            for head in BATCH {
                assert_eq!(bench.answer(head, 0).0, OK);
                let at = u64::from(head) * 4096;
                assert_eq!(bench.on_file(at, 4096), [round; 4096]);
            }
        }
    }
}

#[test]
fn limits_hold_and_are_lifted_at_once() {
    for engine in engines() {
        let limited = DiskOptions {
            limits: Limits {
                bytes: None,
                ops: RateLimit::new(50, 2),
            },
            ..options(engine)
        };
        let mut bench = Bench::new(&limited);
        let start = Instant::now();
        for _ in 0..12 {
            assert_eq!(bench.status(FLUSH, 0, &[]), OK);
        }
        assert!(start.elapsed() >= Duration::from_millis(199));
        let stalls = &bench.driver.function.counters().queues[0].stalls;
        assert!(stalls.load(Ordering::Relaxed) > 5);
        bench.disk.limit(Limits {
            bytes: RateLimit::new(1, 4096),
            ops: None,
        });
        assert_eq!(bench.status(WRITE_TO, 0, &[1; 4096]), OK);
        let start = Instant::now();
        bench.put(0, &header(WRITE_TO, 0, &[2; 4096]), 0, 1 << 16);
        bench.driver.offer_one(0, 0);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(bench.answer(0, 0).0, NONE, "the limit does not hold");
        bench.disk.limit(Limits::default());
        bench.driver.used(0);
        assert!(start.elapsed() < Duration::from_secs(5));
        assert_eq!(bench.answer(0, 0).0, OK);
        // A reset does not wait for a limit.
        bench.disk.limit(Limits {
            bytes: RateLimit::new(1, 1),
            ops: None,
        });
        bench.write_batch(3);
        bench.driver.set_status(0);
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}

#[test]
fn a_new_size_is_seen_and_holds() {
    let mut bench = Bench::new(&options(DiskEngine::Auto));
    let resize = |bench: &Bench, size| bench.disk.resize(size).map_err(|e| e.to_string());
    resize(&bench, 2 << 20).unwrap();
    bench.driver.interrupt(0);
    assert_eq!(bench.config()[..8], 4096_u64.to_le_bytes());
    assert_eq!(bench.file.metadata().unwrap().len(), 2 << 20);
    assert_eq!(bench.status(WRITE_TO, 4095, &[1; SECTOR]), OK);
    resize(&bench, 1 << 20).unwrap();
    bench.driver.interrupt(0);
    assert_eq!(bench.status(WRITE_TO, 4095, &[1; SECTOR]), IOERR);
    assert_eq!(bench.file.metadata().unwrap().len(), 1 << 20);
    for size in [0, 1, 513, (1 << 20) + 100] {
        assert!(resize(&bench, size).unwrap_err().contains("multiple"));
    }
    assert!(
        resize(&bench, 1 << 63)
            .unwrap_err()
            .contains("cannot be made")
    );
    assert_eq!(bench.disk.size(), 1 << 20);
    let readonly = DiskOptions {
        readonly: true,
        ..options(DiskEngine::Auto)
    };
    let mut bench = Bench::new(&readonly);
    let error = resize(&bench, 2 << 20).unwrap_err();
    assert!(error.contains("cannot be given another size"), "{error}");
    bench.file.set_len(2 << 20).unwrap();
    resize(&bench, 2 << 20).unwrap();
    assert_eq!(bench.config()[..8], 4096_u64.to_le_bytes());
}

#[test]
fn the_cache_is_switched_by_the_driver_and_back_by_a_reset() {
    for writeback in [true, false] {
        let options = DiskOptions {
            writeback,
            ..options(DiskEngine::Auto)
        };
        let mut bench = Bench::new(&options);
        let initial = u8::from(writeback);
        assert_eq!(bench.config()[32], initial);
        for now in [1 - initial, initial, 1 - initial] {
            bench.driver.write(0x2000 + config::WRITEBACK, &[now]);
            assert_eq!(bench.config()[32], now);
            assert_eq!(bench.status(WRITE_TO, 0, &[1; SECTOR]), OK);
        }
        // Other fields, and other widths, are not written.
        bench.driver.write(0x2000, &[0xff; 8]);
        bench.driver.write(0x2000 + 30, &[0xff; 4]);
        assert_eq!(bench.config()[..8], 2048_u64.to_le_bytes());
        assert_eq!(bench.config()[32], 1 - initial);
        bench.driver.function.pause();
        bench.driver.function.resume();
        assert_eq!(bench.config()[32], 1 - initial);
        bench.driver.start_full();
        assert_eq!(bench.config()[32], initial);
    }
}

#[test]
fn a_driver_that_cannot_flush_has_no_cache() {
    let disk = Arc::new(Disk::new(scratch(4096), &options(DiskEngine::Sync)).unwrap());
    let model = Blk::new(disk, Vec::new());
    let cached = |features| model.writeback(features).load(Ordering::Acquire);
    assert!(!cached(0));
    assert!(cached(feature::FLUSH));
    assert!(cached(feature::FLUSH | feature::CONFIG_WCE));
    model.cache_on.store(false, Ordering::Release);
    assert!(cached(feature::FLUSH));
    assert!(!cached(feature::FLUSH | feature::CONFIG_WCE));
}

#[test]
fn all_queues_are_served_whoever_serves_them() {
    for threads in [1, 2, 4] {
        let many = DiskOptions {
            queues: 4,
            threads,
            ..options(DiskEngine::Auto)
        };
        let mut bench = Bench::new(&many);
        let features = bench.driver.offered();
        assert_eq!(bench.config()[34..36], [4, 0]);
        for _ in 0..3 {
            for queue in 0..4_u16 {
                let given = header(WRITE_TO, queue.into(), &[queue.to_le_bytes()[0]; SECTOR]);
                let ram = bench.driver.ram.clone();
                ram.write_slice(&given, GuestAddress(BUFFERS)).unwrap();
                let descs = [
                    Desc::new(BUFFERS, 528, NEXT, 1),
                    Desc::new(BUFFERS + 0x1000, 1, WRITE, 0),
                ];
                bench.driver.submit(queue, &descs);
                assert_eq!(bench.driver.used(queue), (0, 1));
                assert_eq!(bench.on_file(u64::from(queue) * 512, 1)[0], given[16]);
            }
            bench.driver.function.pause();
            bench.driver.function.resume();
        }
        assert_ne!(features & (1 << 12), 0);
        bench.driver.start_full();
    }
}

#[test]
fn what_a_disk_does_is_counted() {
    let mut bench = Bench::new(&options(DiskEngine::Auto));
    bench.status(WRITE_TO, 0, &[1; 1024]);
    bench.request(READ, 0, &[], 512);
    bench.status(FLUSH, 0, &[]);
    bench.status(DISCARD, 0, &range(0, 8, 0));
    let counters = bench.driver.function.counters().read();
    let get = |name: &str| counters.iter().find(|(n, _)| n == name).map(|(_, v)| *v);
    for (name, value) in [
        ("reads", 1),
        ("read_bytes", 512),
        ("writes", 1),
        ("written_bytes", 1024),
        ("flushes", 1),
        ("queue0.chains", 4),
    ] {
        assert_eq!(get(name), Some(value), "{name}");
    }
}
