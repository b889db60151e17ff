//! How bytes travel from an image into guest RAM: the piece to replace when a faster way is found.
//!
//! Measured in `docs/adr/0002-kernel-loading.md`. Two ways:
//!
//! * **mapped**: the file is mapped under a guard ([`Mapping`]) and copied by this process. Blocks
//!   of zeroes are not written when guest RAM is known to be zero already, so the pages under the
//!   kernel's .bss and .brk, which `vmlinux` carries as zeroes, stay untouched.
//! * **read**: pread(2) straight into guest RAM, for files that cannot be guarded.
//!
//! Guest RAM is written through raw pointers: no reference into it ever exists.
#![expect(unsafe_code, reason = "copies into guest RAM through raw pointers")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use testudo_memory::RamView;
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError, VolatileSlice};

use crate::layout::Reservation;
use crate::mapping::{Mapping, Pages};
use crate::source::{Source, SourceError, part};

/// Unit of the zero test and of one memcpy. Below the sizes at which C libraries change from
/// vector loops to `rep movsb`, which is slow under emulation and no faster on hardware.
const BLOCK: usize = 1024;

/// Bytes did not get into guest RAM.
#[derive(Debug, Error)]
pub enum CopyError {
    /// The image could not be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Guest RAM refused.
    #[error("cannot write {what} at {gpa:#x} (+{size:#x})")]
    Ram {
        /// What was written.
        what: Box<str>,
        /// First guest-physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
        /// Why.
        #[source]
        source: GuestMemoryError,
    },
    /// The bytes do not fit their reservation.
    #[error("{size:#x} bytes at offset {offset:#x} do not fit the {room:#x} reserved for {what}")]
    Outside {
        /// What was written.
        what: Box<str>,
        /// Offset in the reservation.
        offset: u64,
        /// Bytes.
        size: u64,
        /// Bytes of the reservation.
        room: u64,
    },
}

/// What a load cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    /// Bytes copied from mappings.
    pub mapped: u64,
    /// Bytes read with pread(2) or taken from memory.
    pub read: u64,
    /// Bytes of zeroes that were not written because guest RAM holds them already.
    pub skipped: u64,
}

impl Copied {
    /// Both together.
    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            mapped: self.mapped.saturating_add(other.mapped),
            read: self.read.saturating_add(other.read),
            skipped: self.skipped.saturating_add(other.skipped),
        }
    }
}

/// Copies parts of one image into guest RAM.
pub(crate) struct Copier<'a> {
    source: &'a Source,
    mapping: Option<Mapping<'a>>,
    ram: &'a RamView,
    /// Nothing has been written to guest RAM where this copier writes.
    ram_is_zero: bool,
    copied: Copied,
}

impl<'a> Copier<'a> {
    /// A copier from `source`. `ram_is_zero`: the guest has not run since its RAM was mapped.
    pub(crate) fn new(source: &'a Source, ram: &'a RamView, ram_is_zero: bool) -> Self {
        Self {
            mapping: source.file().and_then(Mapping::new),
            source,
            ram,
            ram_is_zero,
            copied: Copied::default(),
        }
    }

    /// Copies `size` bytes at `offset` of the image to `at` in `place`.
    pub(crate) fn copy(
        &mut self,
        offset: u64,
        size: u64,
        place: &Reservation,
        at: u64,
    ) -> Result<(), CopyError> {
        let eof = || {
            self.source
                .error("read", io::ErrorKind::UnexpectedEof.into())
        };
        let mut from = offset;
        for slice in slices(self.ram, place, at, size)? {
            let slice = slice?;
            let end = from
                .checked_add(u64::try_from(slice.len()).unwrap_or(u64::MAX))
                .ok_or_else(eof)?;
            self.fill(from, end, &slice)?;
            from = end;
        }
        Ok(())
    }

    /// Makes `size` bytes at `at` in `place` zero.
    pub(crate) fn clear(
        &mut self,
        size: u64,
        place: &Reservation,
        at: u64,
    ) -> Result<(), CopyError> {
        if self.ram_is_zero {
            self.copied.skipped = self.copied.skipped.saturating_add(size);
            return Ok(());
        }
        for slice in slices(self.ram, place, at, size)? {
            let slice = slice?;
            let to = slice.ptr_guard_mut();
            // SAFETY: the slice is `len` writable bytes of guest RAM that outlive the guard, and
            // nothing in this process holds a reference to them.
            unsafe { to.as_ptr().write_bytes(0, slice.len()) };
        }
        Ok(())
    }

    /// What it did, and what may be given back later. The file is free to change from here on.
    pub(crate) fn finish(self) -> (Copied, Option<Pages>) {
        (self.copied, self.mapping.map(Mapping::into_pages))
    }

    fn fill(&mut self, start: u64, end: u64, to: &VolatileSlice<'_>) -> Result<(), CopyError> {
        let size = end.saturating_sub(start);
        if let Some(bytes) = self.source.memory() {
            let eof = || {
                self.source
                    .error("read", io::ErrorKind::UnexpectedEof.into())
            };
            let skipped = copy_blocks(
                part(bytes, start, to.len()).ok_or_else(eof)?,
                to,
                self.ram_is_zero,
            );
            self.count(skipped, |c| &mut c.read, size);
            return Ok(());
        }
        if let Some(mapping) = &self.mapping {
            let range = usize::try_from(start).unwrap_or(usize::MAX)
                ..usize::try_from(end).unwrap_or(usize::MAX);
            match mapping.bytes(&range) {
                Ok(bytes) => {
                    let skipped = copy_blocks(bytes, to, self.ram_is_zero);
                    self.count(skipped, |c| &mut c.mapped, size);
                    return Ok(());
                }
                Err(error) => {
                    log::debug!("{}: not mapped ({error}), reading it", self.source.name());
                    self.mapping = None;
                }
            }
        }
        if let Some(file) = self.source.file() {
            read_blocks(file, start, to).map_err(|error| self.source.error("read", error))?;
            self.count(0, |c| &mut c.read, size);
        }
        Ok(())
    }

    fn count(&mut self, skipped: u64, way: impl Fn(&mut Copied) -> &mut u64, size: u64) {
        self.copied.skipped = self.copied.skipped.saturating_add(skipped);
        let way = way(&mut self.copied);
        *way = way.saturating_add(size.saturating_sub(skipped));
    }
}

type Slices<'r> = Box<dyn Iterator<Item = Result<VolatileSlice<'r>, CopyError>> + 'r>;

/// The host memory under `size` bytes at `at` in `place`.
fn slices<'r>(
    ram: &'r RamView,
    place: &Reservation,
    at: u64,
    size: u64,
) -> Result<Slices<'r>, CopyError> {
    let outside = || CopyError::Outside {
        what: place.what().into(),
        offset: at,
        size,
        room: place.size(),
    };
    let gpa = place.part(at, size).ok_or_else(outside)?;
    let len = usize::try_from(size).map_err(|_| outside())?;
    let what: Box<str> = place.what().into();
    Ok(Box::new(ram.get_slices(GuestAddress(gpa), len).map(
        move |slice| {
            slice.map_err(|source| CopyError::Ram {
                what: what.clone(),
                gpa,
                size,
                source,
            })
        },
    )))
}

/// Copies `from` over `to`, which is as long, and returns how many bytes were left out as zeroes.
fn copy_blocks(from: &[u8], to: &VolatileSlice<'_>, skip_zeroes: bool) -> u64 {
    debug_assert_eq!(from.len(), to.len());
    let to = to.ptr_guard_mut();
    let mut skipped = 0u64;
    for (index, block) in from.chunks(BLOCK).enumerate() {
        if skip_zeroes && is_zero(block) {
            skipped = skipped.saturating_add(u64::try_from(block.len()).unwrap_or(0));
            continue;
        }
        let offset = index.saturating_mul(BLOCK);
        // SAFETY: block `index` of `from` has its place at the same offset of `to`, which is as
        // long as `from`.
        let at = unsafe { to.as_ptr().add(offset) };
        // SAFETY: `at` has room for the block (above) in guest RAM, which no reference of this
        // process points to, `from` included: it is a file mapping or a buffer.
        unsafe { at.copy_from_nonoverlapping(block.as_ptr(), block.len()) };
    }
    skipped
}

/// Most blocks end at the first look; the rest is a loop that becomes vector instructions.
fn is_zero(block: &[u8]) -> bool {
    let any = |bytes: &[u8]| {
        let (words, rest) = bytes.as_chunks::<8>();
        let all = words.iter().fold(0, |or, w| or | u64::from_ne_bytes(*w));
        rest.iter().fold(all, |or, b| or | u64::from(*b)) != 0
    };
    let (first, rest) = block.split_at(block.len().min(32));
    !any(first) && !any(rest)
}

fn read_blocks(file: &File, start: u64, to: &VolatileSlice<'_>) -> io::Result<()> {
    let guard = to.ptr_guard_mut();
    let mut done = 0usize;
    while done < to.len() {
        let offset = start
            .checked_add(u64::try_from(done).unwrap_or(u64::MAX))
            .and_then(|offset| libc::off_t::try_from(offset).ok())
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        // SAFETY: `done` is less than the length of the slice.
        let at = unsafe { guard.as_ptr().add(done) };
        // SAFETY: from `at` there are `len - done` writable bytes of guest RAM, which no reference
        // of this process points to.
        let got = unsafe {
            libc::pread(
                file.as_raw_fd(),
                at.cast(),
                to.len().saturating_sub(done),
                offset,
            )
        };
        match usize::try_from(got) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(got) => done = done.saturating_add(got),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}
