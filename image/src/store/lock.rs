//! Locks of files (flock(2)): they end with their process, whatever ends it.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

/// Held until dropped.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    /// Waits for the lock; `waiting` hears of it if somebody else has it.
    pub(super) fn take(path: &Path, waiting: &mut dyn FnMut()) -> io::Result<Self> {
        let file = open(path)?;
        if !try_lock(&file)? {
            waiting();
            retry(&file, FlockOperation::LockExclusive)?;
        }
        Ok(Self { _file: file })
    }
}

/// True if the file is locked now, by us.
pub(super) fn try_lock(file: &File) -> io::Result<bool> {
    match retry(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(e) => Err(e),
    }
}

fn retry(file: &File, how: FlockOperation) -> io::Result<()> {
    Ok(rustix::io::retry_on_intr(|| flock(file, how))?)
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .read(true)
        .open(path)
}
