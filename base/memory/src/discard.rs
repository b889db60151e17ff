//! Giving parts of guest RAM back to the host while the guest runs: what a balloon does.
//!
//! Called by device workers on the view they have: the addresses of guest RAM stay mapped for the
//! life of the process, so that a stale view does no harm.

use std::io;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::RamView;
use crate::backing;

/// What became of the bytes that were to be given back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Discarded {
    /// Given back; they read as zeroes when touched again.
    pub bytes: u64,
    /// Not in RAM, or in pages of which they are a part.
    pub skipped: u64,
}

/// Gives the whole pages of `page` bytes (a power of two) within `len` bytes at `gpa` back to the
/// host. What is not RAM is left alone.
pub fn discard(view: &RamView, gpa: u64, len: u64, page: u64) -> io::Result<Discarded> {
    let mut done = Discarded::default();
    let mask = page.saturating_sub(1);
    let (mut at, mut left) = (gpa, len);
    while left > 0 {
        let Some(region) = view.find_region(GuestAddress(at)) else {
            break;
        };
        // Both within the region, so neither wraps.
        let offset = at.saturating_sub(region.start_addr().0);
        let here = left.min(region.len().saturating_sub(offset));
        let first = offset.checked_add(mask).map_or(u64::MAX, |o| o & !mask);
        let end = offset.saturating_add(here) & !mask;
        if let Some(whole) = end.checked_sub(first).filter(|n| *n > 0) {
            let host = region
                .get_host_address(vm_memory::MemoryRegionAddress(first))
                .map_err(io::Error::other)?;
            let whole_len = usize::try_from(whole).map_err(io::Error::other)?;
            let shared = region.file_offset().is_some();
            backing::discard(host.expose_provenance(), whole_len, shared)?;
            done.bytes = done.bytes.saturating_add(whole);
        }
        left = left.saturating_sub(here);
        at = match at.checked_add(here) {
            Some(next) => next,
            None => break,
        };
    }
    done.skipped = len.saturating_sub(done.bytes);
    Ok(done)
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::{Backing, GuestRam, Share};

    const PAGE: u64 = 4096;

    fn filled(share: Share) -> GuestRam {
        let mut ram = GuestRam::new();
        let backing = Backing {
            share,
            ..Backing::default()
        };
        for gpa in [0, 2 << 20, 8 << 20] {
            ram.add(gpa, 2 << 20, &backing).unwrap();
            let sevens = vec![7; 2 << 20];
            ram.view().write_slice(&sevens, GuestAddress(gpa)).unwrap();
        }
        ram
    }

    fn byte(ram: &GuestRam, gpa: u64) -> u8 {
        ram.view().read_obj(GuestAddress(gpa)).unwrap()
    }

    #[test]
    fn whole_pages_read_as_zeroes_and_their_neighbours_do_not() {
        for share in [Share::Private, Share::Shared] {
            let ram = filled(share);
            let done = discard(&ram.view(), PAGE + 1, 3 * PAGE, PAGE).unwrap();
            assert_eq!((done.bytes, done.skipped), (2 * PAGE, PAGE));
            for (gpa, is) in [
                (PAGE, 7),
                (2 * PAGE - 1, 7),
                (2 * PAGE, 0),
                (4 * PAGE - 1, 0),
                (4 * PAGE, 7),
            ] {
                assert_eq!(byte(&ram, gpa), is, "{gpa:#x}");
            }
        }
    }

    #[test]
    fn ranges_may_span_regions_and_what_is_no_ram_is_left_alone() {
        let ram = filled(Share::Private);
        let done = discard(&ram.view(), (2 << 20) - PAGE, 2 * PAGE, PAGE).unwrap();
        assert_eq!((done.bytes, done.skipped), (2 * PAGE, 0));
        let done = discard(&ram.view(), (4 << 20) - PAGE, 8 << 20, PAGE).unwrap();
        assert_eq!(done.bytes, PAGE, "a hole ends it");
        assert_eq!(byte(&ram, 8 << 20), 7);
        for (gpa, len) in [(u64::MAX, 1), (6 << 20, u64::MAX), (0, 0), (64 << 20, PAGE)] {
            let done = discard(&ram.view(), gpa, len, PAGE).unwrap();
            assert_eq!((done.bytes, done.skipped), (0, len));
        }
        let done = discard(&ram.view(), 8 << 20, u64::MAX, PAGE).unwrap();
        assert_eq!(done.bytes, 2 << 20);
    }

    #[test]
    fn a_part_of_a_huge_page_is_not_given_back() {
        let ram = filled(Share::Private);
        let done = discard(&ram.view(), 0, (2 << 20) - PAGE, 2 << 20).unwrap();
        assert_eq!((done.bytes, done.skipped), (0, (2 << 20) - PAGE));
        assert_eq!(byte(&ram, 0), 7);
    }
}
