use std::fs::File;

use super::*;
use crate::conformance::{Subject, conformance};
use crate::limiter::Limits;

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

fn model(engine: DiskEngine, io: &IoHandle) -> Box<dyn VirtioModel> {
    let disk = Disk::new(scratch(1 << 20), &options(engine)).unwrap();
    Box::new(Blk::new(Arc::new(disk), vec![io.clone()]))
}

/// A sector is read.
fn read() -> (Vec<u8>, u32) {
    (vec![0; 16], 513)
}

/// A sector is written.
fn write() -> (Vec<u8>, u32) {
    let mut request = vec![0; 16 + 512];
    request[0] = 1;
    (request, 1)
}

const SYNC: Subject = Subject {
    make: |io| model(DiskEngine::Sync, io),
    queue: 0,
    request: read,
};

const URING: Subject = Subject {
    make: |io| model(DiskEngine::Auto, io),
    queue: 0,
    request: read,
};

const WRITING: Subject = Subject {
    make: |io| model(DiskEngine::Auto, io),
    queue: 0,
    request: write,
};

conformance!(conforms, SYNC);
conformance!(conforms_with_io_uring, URING);
conformance!(conforms_when_writing, WRITING);
