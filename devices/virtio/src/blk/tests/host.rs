//! The host's side: files, locks, alignment.

use std::fs::OpenOptions;

use super::*;

fn refused(file: File, options: &DiskOptions) -> String {
    match Disk::new(file, options) {
        Ok(_) => panic!("it was taken"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn what_is_no_disk_is_refused() {
    let plain = options(DiskEngine::Sync);
    let null = File::open("/dev/null").unwrap();
    assert!(refused(null, &plain).starts_with("is a character device; a disk is"));
    let folder = File::open("/").unwrap();
    assert!(refused(folder, &plain).starts_with("is a directory"));
    for path in ["/dev/null", "/"] {
        assert!(check_disk_kind(&std::fs::metadata(path).unwrap()).is_err());
    }
    assert!(refused(scratch(0), &plain).contains("has 0 bytes"));
    assert!(refused(scratch(511), &plain).contains("has 511 bytes"));
    let large = DiskOptions {
        block_size: Some(4096),
        ..plain.clone()
    };
    assert!(refused(scratch(4095), &large).contains("less than a block of 4096"));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, [0; 4096]).unwrap();
    let reader = File::open(&path).unwrap();
    assert!(refused(reader, &plain).contains("add ro"));
    let writer = OpenOptions::new().write(true).open(&path).unwrap();
    assert!(refused(writer, &plain).contains("not open for reading"));
}

#[test]
fn locks_are_shared_to_read_and_exclusive_to_write() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, [0; 4096]).unwrap();
    let open = |readonly: bool, lock: bool| {
        let file = OpenOptions::new()
            .read(true)
            .write(!readonly)
            .open(&path)
            .unwrap();
        Disk::new(
            file,
            &DiskOptions {
                readonly,
                lock,
                ..options(DiskEngine::Sync)
            },
        )
    };
    let writer = open(false, true).unwrap();
    for (readonly, lock, works) in [
        (false, true, false),
        (true, true, false),
        (false, false, true),
        (true, false, true),
    ] {
        let other = open(readonly, lock);
        assert_eq!(other.is_ok(), works, "{readonly} {lock}");
        if let Err(e) = other {
            assert!(e.to_string().starts_with("is in use"), "{e}");
        }
    }
    drop(writer);
    let reader = open(true, true).unwrap();
    assert!(open(true, true).is_ok());
    assert!(open(false, true).is_err());
    drop(reader);
    assert!(open(false, true).is_ok());
}

#[test]
fn odd_ends_of_a_file_are_not_part_of_the_disk() {
    let mut bench = Bench::of(scratch(3 * 512 + 100), &options(DiskEngine::Sync));
    assert_eq!(bench.config()[..8], 3_u64.to_le_bytes());
    assert_eq!(bench.request(READ, 3, &[], SECTOR).0, IOERR);
    let large = DiskOptions {
        block_size: Some(4096),
        physical_block_size: Some(16384),
        ..options(DiskEngine::Sync)
    };
    let mut bench = Bench::of(scratch(3 * 4096 + 2048), &large);
    let config = bench.config();
    assert_eq!(config[..8], 24_u64.to_le_bytes());
    assert_eq!(config[20..24], 4096_u32.to_le_bytes());
    assert_eq!(config[24..28], [2, 0, 4, 0]);
}

/// A descriptor that was handed over with flags that do not do for a disk.
#[test]
fn appending_files_are_written_where_the_guest_says() {
    for engine in engines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![0; 1 << 16]).unwrap();
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .open(&path)
            .unwrap();
        let mut bench = Bench::of(file, &options(engine));
        assert_eq!(bench.status(WRITE_TO, 3, &[9; SECTOR]), OK);
        assert_eq!(bench.on_file(3 * 512, 1), [9]);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 16);
    }
}

/// O_DIRECT takes no odd addresses; guests may use them all the same.
#[test]
fn memory_that_is_not_aligned_is_copied() {
    for engine in engines() {
        let direct = DiskOptions {
            direct: true,
            ..options(engine)
        };
        let file = scratch(1 << 20);
        if Disk::new(file.try_clone().unwrap(), &direct).is_err() {
            eprintln!("no O_DIRECT on this file system");
            return;
        }
        let mut bench = Bench::of(file, &direct);
        let block = bench.disk.layout().logical as usize;
        let data = pattern(block, 77);
        // Behind a header of 16 bytes nothing is aligned.
        assert_eq!(bench.status(WRITE_TO, 0, &data), OK);
        let (status, len, back) = bench.raw(&header(READ, 0, &[]), block, 100);
        assert_eq!((status, len), (OK, u32::try_from(block).unwrap() + 1));
        assert!(back == data);
        // Larger than the buffer it goes through: one long readable descriptor.
        let len = 400 << 10;
        let long = pattern(len, 5);
        let given = header(WRITE_TO, 0, &long);
        let ram = bench.driver.ram.clone();
        ram.write_slice(&given, GuestAddress(BUFFERS)).unwrap();
        let total = u32::try_from(given.len()).unwrap();
        let descs = [
            Desc::new(BUFFERS, total, NEXT, 1),
            Desc::new(BUFFERS - 1, 1, WRITE, 0),
        ];
        bench.driver.submit(0, &descs);
        assert_eq!(bench.driver.used(0), (0, 1));
        assert!(bench.on_file(0, len) == long);
        if block > SECTOR {
            assert_eq!(bench.status(WRITE_TO, 1, &[1; SECTOR]), IOERR);
        }
    }
}

#[test]
fn io_uring_that_was_asked_for_is_used_or_said_to_be_missing() {
    match Disk::new(scratch(4096), &options(DiskEngine::IoUring)) {
        Ok(disk) => assert!(disk.take_lane(0).unwrap().ring.is_some()),
        Err(e) => assert!(e.to_string().contains("engine=auto"), "{e}"),
    }
    let sync = Disk::new(scratch(4096), &options(DiskEngine::Sync)).unwrap();
    assert!(sync.take_lane(0).unwrap().ring.is_none());
}
