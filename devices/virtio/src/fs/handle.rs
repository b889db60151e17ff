//! Files and directories the guest has open.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use super::dir::Listing;

/// An open file or directory.
#[derive(Debug)]
pub(super) struct Handle {
    file: OwnedFd,
    /// Where a directory is being read.
    pub(super) listing: Option<Mutex<Listing>>,
}

impl Handle {
    pub(super) fn file(file: OwnedFd) -> Self {
        Self {
            file,
            listing: None,
        }
    }

    pub(super) fn directory(file: OwnedFd) -> Self {
        Self {
            file,
            listing: Some(Mutex::default()),
        }
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
