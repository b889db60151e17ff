//! The lock of a pod's folder: held as long as somebody looks after the pod.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use thiserror::Error;

/// The lock cannot be taken.
#[derive(Debug, Error)]
#[error("cannot lock {}", path.display())]
pub struct LockError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// A lock that is held: by this process, and by every other that has inherited the descriptor.
#[derive(Debug)]
pub struct Held(OwnedFd);

impl Held {
    /// Takes it, unless somebody has it.
    pub fn try_take(path: &Path) -> Result<Option<Self>, LockError> {
        let error = |source| LockError {
            path: path.to_owned(),
            source,
        };
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .map_err(error)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self(file.into()))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(e) => Err(error(e.into())),
        }
    }

    /// One that was inherited.
    pub fn inherited(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsFd for Held {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
