//! Guest RAM as a back-end maps it.
//!
//! Addresses in messages are "front-end addresses", by which a back-end finds rings in what it has
//! mapped. They mean nothing outside of the messages, so guest-physical ones are used: a back-end
//! learns nothing of where this process keeps things.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use testudo_memory::{RamRange, RamView};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::connection::PeerError;
use super::message::Payload;

/// Regions a back-end takes that does not say how many it takes.
pub(super) const BASELINE: usize = 8;

/// One region.
#[derive(Debug, Clone)]
pub(super) struct Region {
    gpa: u64,
    size: u64,
    offset: u64,
    file: Arc<File>,
}

impl PartialEq for Region {
    fn eq(&self, other: &Self) -> bool {
        let place = |region: &Self| (region.gpa, region.size, region.offset);
        place(self) == place(other) && Arc::ptr_eq(&self.file, &other.file)
    }
}

impl Region {
    /// All of guest RAM.
    pub(super) fn all(ram: &RamView) -> Result<Vec<Self>, PeerError> {
        ram.iter()
            .map(|region| {
                let gpa = region.start_addr().0;
                let file = region.file_offset().ok_or(PeerError::PrivateRam { gpa })?;
                Ok(Self {
                    gpa,
                    size: region.len(),
                    offset: file.start(),
                    file: Arc::clone(file.arc()),
                })
            })
            .collect()
    }

    /// A range that is about to be added to guest RAM, or removed.
    pub(super) fn of(range: &RamRange) -> Result<Self, PeerError> {
        let file = range.file.as_ref();
        Ok(Self {
            gpa: range.gpa,
            size: range.size,
            offset: 0,
            file: Arc::clone(file.ok_or(PeerError::PrivateRam { gpa: range.gpa })?),
        })
    }

    /// Whether `len` bytes at `gpa` lie in it.
    pub(super) fn holds(&self, gpa: u64, len: usize) -> bool {
        let offset = gpa.checked_sub(self.gpa);
        let end = offset.and_then(|offset| offset.checked_add(u64::try_from(len).ok()?));
        end.is_some_and(|end| end <= self.size)
    }

    /// Its description, after what is already in `payload`.
    pub(super) fn describe(&self, payload: Payload) -> Payload {
        payload
            .u64(self.gpa)
            .u64(self.size)
            .u64(self.gpa)
            .u64(self.offset)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
