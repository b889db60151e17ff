//! Who gets which part of guest RAM at boot.
//!
//! A [`Layout`] knows the ranges that are backed by RAM and, among them, those the guest is told
//! it may use. It is the only maker of [`Reservation`]s, and no two of its reservations share a
//! byte; writers elsewhere in this crate want a reservation, not an address.

use std::ops::Range;

use testudo_memory::RamView;
use thiserror::Error;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

/// Something does not fit into guest RAM.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PlaceError {
    /// No gap is large enough.
    #[error(
        "{what} needs {size} bytes of guest RAM between {:#x} and {:#x}, and the largest gap there has {gap}; \
         give the guest more memory",
        within.start, within.end
    )]
    NoRoom {
        /// What was to be placed.
        what: Box<str>,
        /// Bytes wanted.
        size: u64,
        /// Where it had to lie.
        within: Range<u64>,
        /// Largest gap there, in bytes.
        gap: u64,
    },
    /// The range is not all RAM.
    #[error(
        "{what} at {gpa:#x} (+{size:#x}) does not lie in guest RAM; give the guest more memory"
    )]
    NotRam {
        /// What was to be placed.
        what: Box<str>,
        /// First guest-physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// The range is taken.
    #[error(
        "{what} at {gpa:#x} (+{size:#x}) collides with {other} at {other_gpa:#x} (+{other_size:#x})"
    )]
    Overlap {
        /// What was to be placed.
        what: Box<str>,
        /// First guest-physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
        /// Who is there.
        other: Box<str>,
        /// Where that one begins.
        other_gpa: u64,
        /// Its bytes.
        other_size: u64,
    },
    /// Nothing was asked for.
    #[error("{what} is empty")]
    Empty {
        /// What was to be placed.
        what: Box<str>,
    },
}

/// The right to write one range of guest RAM.
#[derive(Debug, PartialEq, Eq)]
pub struct Reservation {
    what: Box<str>,
    gpa: u64,
    size: u64,
}

impl Reservation {
    /// What lies there.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// First guest-physical address.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Bytes, never zero.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// First guest-physical address after it. A layout hands out nothing at the end of the
    /// 64-bit space, so this does not wrap.
    pub fn end(&self) -> u64 {
        self.gpa.saturating_add(self.size)
    }

    /// Guest-physical address of `size` bytes at `offset`, if they all lie inside.
    pub(crate) fn part(&self, offset: u64, size: u64) -> Option<u64> {
        (offset.checked_add(size)? <= self.size).then_some(self.gpa.saturating_add(offset))
    }
}

/// The ranges of guest RAM and who has which.
#[derive(Debug, Default)]
pub struct Layout {
    backed: Vec<Range<u64>>,
    usable: Vec<Range<u64>>,
    /// Sorted by address.
    taken: Vec<(Range<u64>, Box<str>)>,
}

impl Layout {
    /// A layout over `ram`. `usable` are the ranges the guest is told it may use (the RAM entries
    /// of its memory map): what has no fixed address goes there.
    pub fn new(ram: &RamView, usable: impl IntoIterator<Item = Range<u64>>) -> Self {
        let backed = merge(ram.iter().map(|region| {
            let start = region.start_addr().raw_value();
            start..start.saturating_add(region.len())
        }));
        let usable = usable.into_iter().flat_map(|u| {
            backed
                .iter()
                .map(move |b| intersect(&u, b))
                .collect::<Vec<_>>()
        });
        Self {
            usable: merge(usable),
            backed,
            taken: Vec::new(),
        }
    }

    /// Takes `size` bytes at `gpa`, which must be RAM; whether the guest's memory map calls it
    /// usable is the caller's affair (firmware tables lie in reserved ranges).
    pub fn at(&mut self, what: &str, gpa: u64, size: u64) -> Result<Reservation, PlaceError> {
        let range = gpa..gpa.saturating_add(size);
        if size == 0 {
            return Err(PlaceError::Empty { what: what.into() });
        }
        let backed = gpa.checked_add(size).is_some() && contained(&range, &self.backed);
        if !backed {
            return Err(PlaceError::NotRam {
                what: what.into(),
                gpa,
                size,
            });
        }
        if let Some((other, name)) = self.collision(&range) {
            return Err(PlaceError::Overlap {
                what: what.into(),
                gpa,
                size,
                other: name.clone(),
                other_gpa: other.start,
                other_size: other.end.saturating_sub(other.start),
            });
        }
        Ok(self.take(what, range))
    }

    /// Takes `size` bytes at `gpa`, which must be usable by the guest.
    pub fn usable_at(
        &mut self,
        what: &str,
        gpa: u64,
        size: u64,
    ) -> Result<Reservation, PlaceError> {
        let end = gpa.saturating_add(size);
        if size != 0 && !contained(&(gpa..end), &self.usable) {
            return Err(PlaceError::NotRam {
                what: what.into(),
                gpa,
                size,
            });
        }
        self.at(what, gpa, size)
    }

    /// Takes `size` usable bytes at the lowest multiple of `align` (a power of two) in `within`.
    pub fn lowest(
        &mut self,
        what: &str,
        size: u64,
        align: u64,
        within: Range<u64>,
    ) -> Result<Reservation, PlaceError> {
        let found = self.gaps(&within).iter().find_map(|gap| {
            let start = gap.start.checked_next_multiple_of(align)?;
            let end = start.checked_add(size)?;
            (end <= gap.end).then_some(start..end)
        });
        self.place(what, size, within, found)
    }

    /// Takes `size` usable bytes at the highest multiple of `align` (a power of two) in `within`.
    pub fn highest(
        &mut self,
        what: &str,
        size: u64,
        align: u64,
        within: Range<u64>,
    ) -> Result<Reservation, PlaceError> {
        let found = self.gaps(&within).iter().rev().find_map(|gap| {
            let top = gap.end.checked_sub(size)?;
            let start = top.checked_sub(top.checked_rem(align)?)?;
            (start >= gap.start).then(|| start..start.saturating_add(size))
        });
        self.place(what, size, within, found)
    }

    /// What has been handed out so far, by address.
    pub fn taken(&self) -> impl Iterator<Item = (&str, Range<u64>)> {
        self.taken
            .iter()
            .map(|(range, what)| (&**what, range.clone()))
    }

    fn place(
        &mut self,
        what: &str,
        size: u64,
        within: Range<u64>,
        found: Option<Range<u64>>,
    ) -> Result<Reservation, PlaceError> {
        match found {
            _ if size == 0 => Err(PlaceError::Empty { what: what.into() }),
            Some(range) => Ok(self.take(what, range)),
            None => Err(PlaceError::NoRoom {
                what: what.into(),
                size,
                gap: self.gaps(&within).iter().map(length).max().unwrap_or(0),
                within,
            }),
        }
    }

    fn take(&mut self, what: &str, range: Range<u64>) -> Reservation {
        let index = self.taken.partition_point(|(t, _)| t.start < range.start);
        let reservation = Reservation {
            what: what.into(),
            gpa: range.start,
            size: length(&range),
        };
        self.taken.insert(index, (range, what.into()));
        reservation
    }

    fn collision(&self, range: &Range<u64>) -> Option<&(Range<u64>, Box<str>)> {
        self.taken
            .iter()
            .find(|(t, _)| t.start < range.end && range.start < t.end)
    }

    /// Usable ranges inside `within` that nobody has, by address.
    fn gaps(&self, within: &Range<u64>) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        for usable in &self.usable {
            let mut rest = intersect(usable, within);
            for (taken, _) in &self.taken {
                if taken.end <= rest.start || rest.end <= taken.start {
                    continue;
                }
                if rest.start < taken.start {
                    gaps.push(rest.start..taken.start);
                }
                rest.start = taken.end.min(rest.end);
            }
            if !rest.is_empty() {
                gaps.push(rest);
            }
        }
        gaps
    }
}

fn length(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

/// The common part; an empty range if there is none.
fn intersect(a: &Range<u64>, b: &Range<u64>) -> Range<u64> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

fn contained(range: &Range<u64>, ranges: &[Range<u64>]) -> bool {
    ranges
        .iter()
        .any(|r| r.start <= range.start && range.end <= r.end)
}

/// Sorts, drops empty ranges and joins those that touch or overlap.
fn merge(ranges: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut sorted: Vec<_> = ranges.filter(|r| !r.is_empty()).collect();
    sorted.sort_by_key(|r| r.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(sorted.len());
    for range in sorted {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use super::*;

    fn over(ram: &RamView, usable: Range<u64>) -> Layout {
        Layout::new(ram, [usable])
    }

    const MIB: u64 = 1 << 20;

    fn ram(ranges: &[(u64, usize)]) -> RamView {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|&(gpa, size)| (GuestAddress(gpa), size))
            .collect();
        RamView::from_ranges(&ranges).unwrap()
    }

    #[test]
    fn highest_and_lowest_respect_alignment_and_limits() {
        let ram = ram(&[(0, 64 << 20)]);
        let mut layout = Layout::new(&ram, [0..0x9fc00, MIB..64 * MIB]);
        let high = layout.highest("initrd", 5000, 4096, 0..32 * MIB).unwrap();
        assert_eq!(high.gpa(), 32 * MIB - 8192);
        let next = layout.highest("second", 1, 4096, 0..32 * MIB).unwrap();
        assert_eq!(next.gpa(), 32 * MIB - 8192 - 4096);
        let low = layout.lowest("zero page", 4096, 4096, 0x1000..MIB).unwrap();
        assert_eq!(low.gpa(), 0x1000);
        let error = layout.lowest("big", MIB, 4096, 0..MIB).unwrap_err();
        assert_eq!(
            error,
            PlaceError::NoRoom {
                what: "big".into(),
                size: MIB,
                within: 0..MIB,
                gap: 0x9fc00 - 0x2000
            }
        );
    }

    #[test]
    fn fixed_places_must_be_ram_and_free() {
        let ram = ram(&[(0, 16 << 20)]);
        let mut layout = over(&ram, MIB..16 * MIB);
        assert!(layout.usable_at("kernel", 0xe0000, 0x1000).is_err());
        layout.at("rsdp", 0xe0000, 36).unwrap();
        assert!(matches!(
            layout.at("x", 0xe0020, 8),
            Err(PlaceError::Overlap { .. })
        ));
        assert!(matches!(
            layout.at("x", 16 * MIB - 4, 8),
            Err(PlaceError::NotRam { .. })
        ));
        assert!(matches!(
            layout.at("x", u64::MAX - 4, 8),
            Err(PlaceError::NotRam { .. })
        ));
        assert!(matches!(
            layout.at("x", 0, 0),
            Err(PlaceError::Empty { .. })
        ));
    }

    #[derive(Debug, Clone)]
    enum Ask {
        At(u64, u64),
        UsableAt(u64, u64),
        Lowest(u64, u32, Range<u64>),
        Highest(u64, u32, Range<u64>),
    }

    fn ask() -> impl Strategy<Value = Ask> {
        let gpa = prop_oneof![0..48 * MIB, any::<u64>()];
        let size = prop_oneof![0..0x4000u64, 0..32 * MIB, any::<u64>()];
        let within = (0..64 * MIB, 0..64 * MIB).prop_map(|(a, b)| a.min(b)..a.max(b));
        prop_oneof![
            (gpa.clone(), size.clone()).prop_map(|(g, s)| Ask::At(g, s)),
            (gpa, size.clone()).prop_map(|(g, s)| Ask::UsableAt(g, s)),
            (size.clone(), 0u32..22, within.clone()).prop_map(|(s, a, w)| Ask::Lowest(s, a, w)),
            (size, 0u32..22, within).prop_map(|(s, a, w)| Ask::Highest(s, a, w)),
        ]
    }

    proptest! {
        #[test]
        fn reservations_never_overlap_and_lie_in_ram(asks in prop::collection::vec(ask(), 0..24)) {
            let ram = ram(&[(0, 32 << 20), (40 << 20, 8 << 20)]);
            let usable = [0x1000..0x9f000, MIB..32 * MIB, 40 * MIB..47 * MIB];
            let mut layout = Layout::new(&ram, usable.clone());
            let mut got: Vec<Reservation> = Vec::new();
            for ask in asks {
                let (answer, want_usable, within) = match ask {
                    Ask::At(g, s) => (layout.at("at", g, s), false, 0..u64::MAX),
                    Ask::UsableAt(g, s) => (layout.usable_at("usable", g, s), true, 0..u64::MAX),
                    Ask::Lowest(s, a, w) => (layout.lowest("low", s, 1 << a, w.clone()), true, w),
                    Ask::Highest(s, a, w) => (layout.highest("high", s, 1 << a, w.clone()), true, w),
                };
                let Ok(r) = answer else { continue };
                prop_assert!(r.size() > 0);
                prop_assert!(within.start <= r.gpa() && r.end() <= within.end);
                prop_assert!(ram.check_range(GuestAddress(r.gpa()), usize::try_from(r.size()).unwrap()));
                if want_usable {
                    prop_assert!(usable.iter().any(|u| u.start <= r.gpa() && r.end() <= u.end));
                }
                for other in &got {
                    prop_assert!(r.end() <= other.gpa() || other.end() <= r.gpa());
                }
                got.push(r);
            }
            prop_assert_eq!(layout.taken().count(), got.len());
        }

        #[test]
        fn lowest_is_lowest_and_highest_is_highest(size in 1u64..4 * MIB, hole in 1u64..31 * MIB) {
            let ram = ram(&[(0, 32 << 20)]);
            let mut layout = over(&ram, 0..32 * MIB);
            layout.at("hole", hole, 4096).unwrap();
            let low = layout.lowest("low", size, 4096, 0..32 * MIB).unwrap();
            prop_assert_eq!(low.gpa(), if size <= hole { 0 } else { (hole + 4096).next_multiple_of(4096) });
            let mut layout = over(&ram, 0..32 * MIB);
            layout.at("hole", hole, 4096).unwrap();
            let high = layout.highest("high", size, 1, 0..32 * MIB).unwrap();
            prop_assert_eq!(high.end(), if hole + 4096 + size <= 32 * MIB { 32 * MIB } else { hole });
        }
    }
}
