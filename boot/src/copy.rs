//! How bytes travel from an image into guest RAM: the piece to replace when a faster way is found.
//!
//! Measured in `docs/adr/0002-kernel-loading.md`. Two ways:
//!
//! * **mapped**: the file is mapped under a guard ([`Mapping`]) and copied by this process. Blocks
//!   of zeroes are not written when guest RAM is known to be zero already, so the pages under the
//!   kernel's .bss and .brk, which `vmlinux` carries as zeroes, stay untouched.
//! * **read**: pread(2) straight into guest RAM, for files that cannot be guarded.
//!
//! Huge pages make a load and the guest after it faster, but not those that a load would hardly fill
//! ([`sparse_huge_pages`]).
//!
//! Guest RAM is written through raw pointers: no reference into it ever exists.
#![expect(unsafe_code, reason = "copies into guest RAM through raw pointers")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use testudo_memory::RamView;
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError, VolatileSlice};

use crate::layout::Reservation;
use crate::mapping::{Mapping, Pages};
use crate::source::{Source, SourceError, part};

/// Unit of the zero test and of one memcpy: what the guest or the host may then leave untouched.
const BLOCK: usize = 4096;

/// Size of a transparent huge page.
pub(crate) const HUGE: u64 = 2 << 20;

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

/// Asks for small pages under `size` bytes of guest RAM at `gpa`. A wish: the host may have no huge
/// pages, or only such.
pub(crate) fn small_pages(ram: &RamView, gpa: u64, size: u64) {
    let Ok(len) = usize::try_from(size) else {
        return;
    };
    for slice in ram.get_slices(GuestAddress(gpa), len).flatten() {
        let at = slice.ptr_guard_mut();
        // SAFETY: the range is mapped guest RAM, and the advice changes the size of pages that are
        // yet to be, no contents. The kernel refuses an address that is not a page's.
        let result =
            unsafe { libc::madvise(at.as_ptr().cast(), slice.len(), libc::MADV_NOHUGEPAGE) };
        if result < 0 {
            log::debug!("small pages at {gpa:#x}: {}", io::Error::last_os_error());
        }
    }
}

/// The huge pages that `parts` of guest RAM (address and size) fill to less than a quarter. To clear
/// a whole one for them costs more than a small page for each.
pub(crate) fn sparse_huge_pages(parts: &[(u64, u64)]) -> Vec<u64> {
    let mut filled: BTreeMap<u64, u64> = BTreeMap::new();
    for &(start, size) in parts {
        let end = start.saturating_add(size);
        // Whole pages inside a part are full, whatever else: only its two ends are looked at.
        let (first, last) = (start / HUGE, end.saturating_sub(1) / HUGE);
        for page in [first, last]
            .into_iter()
            .take(if first == last { 1 } else { 2 })
        {
            let base = page.saturating_mul(HUGE);
            let covered = end
                .min(base.saturating_add(HUGE))
                .saturating_sub(start.max(base));
            let so_far = filled.entry(base).or_default();
            *so_far = so_far.saturating_add(covered);
        }
    }
    filled
        .into_iter()
        .filter(|(_, covered)| *covered < HUGE / 4)
        .map(|(base, _)| base)
        .collect()
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

/// Most blocks are known by their first bytes; the rest is a loop that becomes vector instructions.
fn is_zero(block: &[u8]) -> bool {
    const WORDS: usize = 16;
    const LINE: usize = 8 * WORDS;
    let (first, _) = block.split_at(block.len().min(16));
    if first.iter().any(|b| *b != 0) {
        return false;
    }
    let (lines, rest) = block.as_chunks::<LINE>();
    let mut or = [0u64; WORDS];
    for line in lines {
        for (or, word) in or.iter_mut().zip(line.as_chunks::<8>().0) {
            *or |= u64::from_ne_bytes(*word);
        }
    }
    or.iter().all(|w| *w == 0) && rest.iter().all(|b| *b == 0)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_zeroes_are_told_from_others() {
        for size in [1, 15, 16, 17, 127, 128, 129, 4096] {
            let mut block = vec![0; size];
            assert!(is_zero(&block));
            for at in [0, size / 2, size - 1] {
                block[at] = 1;
                assert!(!is_zero(&block), "{size} {at}");
                block[at] = 0;
            }
        }
    }

    #[test]
    fn hardly_filled_huge_pages_are_found() {
        const KIB: u64 = 1 << 10;
        let text = (8 * HUGE, 2 * HUGE + 100 * KIB);
        assert_eq!(sparse_huge_pages(&[text]), [10 * HUGE]);
        let beside = (10 * HUGE + 100 * KIB, 500 * KIB);
        assert!(sparse_huge_pages(&[text, beside]).is_empty());
        assert_eq!(sparse_huge_pages(&[(HUGE - 1, 2)]), [0, HUGE]);
        assert!(sparse_huge_pages(&[]).is_empty());
    }
}
