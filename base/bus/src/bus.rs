//! One address space: ranges to targets, read without a lock.

use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use thiserror::Error;

use crate::{Access, Target, fill_absent};

/// A half-open range of bus addresses that is never empty and never wraps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    base: u64,
    last: u64,
}

impl Range {
    /// `len` bytes from `base`; `None` if that is empty or runs past the 64-bit space.
    pub fn new(base: u64, len: u64) -> Option<Self> {
        let last = base.checked_add(len.checked_sub(1)?)?;
        Some(Self { base, last })
    }

    /// First address.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Last address, inclusive.
    pub fn last(&self) -> u64 {
        self.last
    }

    fn moved_to(&self, base: u64) -> Option<Self> {
        let last = base.checked_add(self.last.checked_sub(self.base)?)?;
        Some(Self { base, last })
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.base <= other.last && other.base <= self.last
    }
}

/// A range could not be mapped.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum MapError {
    /// Something else answers for part of the range.
    #[error("{bus} range {wanted:x?} overlaps {taken:x?}, which is already mapped")]
    Overlap {
        /// Name of the bus.
        bus: &'static str,
        /// First and last address asked for.
        wanted: (u64, u64),
        /// First and last address already mapped.
        taken: (u64, u64),
    },
    /// The range would run past the end of the address space.
    #[error("{bus} range at {base:#x} runs past the end of the address space")]
    Wraps {
        /// Name of the bus.
        bus: &'static str,
        /// Base asked for.
        base: u64,
    },
}

#[derive(Clone)]
struct Entry {
    range: Range,
    id: u64,
    target: Arc<dyn Target>,
}

/// The table a vCPU reads: sorted by address, immutable once published.
#[derive(Clone, Default)]
struct Table(Vec<Entry>);

impl Table {
    fn find(&self, addr: u64) -> Option<&Entry> {
        let after = self.0.partition_point(|e| e.range.base <= addr);
        let entry = self.0.get(after.checked_sub(1)?)?;
        (addr <= entry.range.last).then_some(entry)
    }

    fn overlapping(&self, range: &Range, except: Option<u64>) -> Option<&Entry> {
        self.0
            .iter()
            .find(|e| Some(e.id) != except && e.range.overlaps(range))
    }

    fn insert(&mut self, entry: Entry) {
        let at = self.0.partition_point(|e| e.range.base < entry.range.base);
        self.0.insert(at, entry);
    }
}

/// One address space (port I/O or MMIO) and who answers where.
///
/// Clones share the same space. Writers take a lock, copy the table and publish the copy; readers
/// never wait for them. An access that began before an unmap may still reach the target after it:
/// closing the target's [`Slot`](crate::Slot) is what waits for it.
#[derive(Clone)]
pub struct Bus {
    shared: Arc<Shared>,
}

struct Shared {
    name: &'static str,
    table: ArcSwap<Table>,
    next_id: Mutex<u64>,
}

impl Bus {
    /// An empty space; `name` appears in errors.
    pub fn new(name: &'static str) -> Self {
        Self {
            shared: Arc::new(Shared {
                name,
                table: ArcSwap::default(),
                next_id: Mutex::new(0),
            }),
        }
    }

    /// Routes `range` to `target` until the returned guard is dropped.
    pub fn map(&self, range: Range, target: Arc<dyn Target>) -> Result<Mapping, MapError> {
        let id = self.shared.edit(|table, next_id| {
            if let Some(taken) = table.overlapping(&range, None) {
                return Err(self.shared.overlap(&range, &taken.range));
            }
            let id = *next_id;
            *next_id = id.wrapping_add(1);
            table.insert(Entry { range, id, target });
            Ok(id)
        })?;
        Ok(Mapping {
            shared: Arc::clone(&self.shared),
            range,
            id,
        })
    }

    /// Reads `data.len()` bytes at `addr`; all-ones and `false` where nothing answers.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        match self.resolve(addr, data.len()) {
            Some((target, at)) => {
                target.read(at, data);
                true
            }
            None => {
                fill_absent(data);
                false
            }
        }
    }

    /// Writes `data` at `addr`; `false` where nothing answers.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        match self.resolve(addr, data.len()) {
            Some((target, at)) => {
                target.write(at, data);
                true
            }
            None => false,
        }
    }

    fn resolve(&self, addr: u64, len: usize) -> Option<(Arc<dyn Target>, Access)> {
        let wanted = Range::new(addr, u64::try_from(len).ok()?)?;
        let table = self.shared.table.load();
        let entry = table.find(addr)?;
        let offset = addr.checked_sub(entry.range.base)?;
        (wanted.last <= entry.range.last).then(|| (Arc::clone(&entry.target), Access { offset }))
    }
}

impl Shared {
    fn edit<R>(
        &self,
        f: impl FnOnce(&mut Table, &mut u64) -> Result<R, MapError>,
    ) -> Result<R, MapError> {
        let mut next_id = self.next_id.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = Table::clone(&self.table.load());
        let result = f(&mut table, &mut next_id)?;
        self.table.store(Arc::new(table));
        Ok(result)
    }

    fn overlap(&self, wanted: &Range, taken: &Range) -> MapError {
        MapError::Overlap {
            bus: self.name,
            wanted: (wanted.base, wanted.last),
            taken: (taken.base, taken.last),
        }
    }
}

/// The guard of one mapped range: dropping it unmaps the range.
#[must_use = "dropping the mapping unmaps the range"]
pub struct Mapping {
    shared: Arc<Shared>,
    range: Range,
    id: u64,
}

impl Mapping {
    /// Where the range is now.
    pub fn range(&self) -> Range {
        self.range
    }

    /// Moves the range to `base`, keeping its length and target. On error nothing changed.
    pub fn relocate(&mut self, base: u64) -> Result<(), MapError> {
        let moved = self.range.moved_to(base).ok_or(MapError::Wraps {
            bus: self.shared.name,
            base,
        })?;
        self.shared.edit(|table, _| {
            if let Some(taken) = table.overlapping(&moved, Some(self.id)) {
                return Err(self.shared.overlap(&moved, &taken.range));
            }
            if let Some(at) = table.0.iter().position(|e| e.id == self.id) {
                let mut entry = table.0.remove(at);
                entry.range = moved;
                table.insert(entry);
            }
            Ok(())
        })?;
        self.range = moved;
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let removed = self.shared.edit(|table, _| {
            table.0.retain(|e| e.id != self.id);
            Ok(())
        });
        debug_assert!(removed.is_ok(), "removing an entry cannot fail");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Slot};

    struct Tag(u8);

    impl Device for Tag {
        fn read(&mut self, at: Access, data: &mut [u8]) {
            data.fill(self.0.wrapping_add(u8::try_from(at.offset).unwrap()));
        }
        fn write(&mut self, _at: Access, _data: &[u8]) {}
    }

    fn tag(n: u8) -> Arc<dyn Target> {
        Arc::new(Slot::<dyn Device>::new(Box::new(Tag(n))))
    }

    fn read(bus: &Bus, addr: u64) -> u8 {
        let mut data = [0];
        bus.read(addr, &mut data);
        data[0]
    }

    #[test]
    fn routes_by_range_and_reads_all_ones_elsewhere() {
        let bus = Bus::new("pio");
        let _a = bus.map(Range::new(0x10, 4).unwrap(), tag(1)).unwrap();
        let b = bus.map(Range::new(0x14, 1).unwrap(), tag(0x40)).unwrap();
        assert_eq!(read(&bus, 0x12), 3);
        assert_eq!(read(&bus, 0x14), 0x40);
        assert_eq!(read(&bus, 0x0f), 0xff);
        assert_eq!(read(&bus, 0x15), 0xff);
        assert!(
            !bus.read(0x13, &mut [0, 0]),
            "an access may not straddle ranges"
        );
        drop(b);
        assert_eq!(read(&bus, 0x14), 0xff);
    }

    #[test]
    fn overlap_is_refused_and_names_both() {
        let bus = Bus::new("mmio");
        let _a = bus
            .map(Range::new(0x1000, 0x1000).unwrap(), tag(1))
            .unwrap();
        let err = bus
            .map(Range::new(0x1fff, 2).unwrap(), tag(2))
            .err()
            .unwrap();
        assert_eq!(
            err,
            MapError::Overlap {
                bus: "mmio",
                wanted: (0x1fff, 0x2000),
                taken: (0x1000, 0x1fff)
            }
        );
    }

    #[test]
    fn relocate_moves_or_changes_nothing() {
        let bus = Bus::new("mmio");
        let mut a = bus.map(Range::new(0x1000, 0x10).unwrap(), tag(1)).unwrap();
        let _b = bus.map(Range::new(0x2000, 0x10).unwrap(), tag(9)).unwrap();
        assert!(a.relocate(0x1ff8).is_err());
        assert_eq!(read(&bus, 0x1000), 1);
        a.relocate(0x1008).unwrap();
        assert_eq!(read(&bus, 0x1000), 0xff);
        assert_eq!(read(&bus, 0x1008), 1);
        assert!(a.relocate(u64::MAX).is_err());
        a.relocate(u64::MAX - 0xf).unwrap();
        assert_eq!(read(&bus, u64::MAX - 0xf), 1);
    }

    #[test]
    fn ranges_are_never_empty_and_never_wrap() {
        assert!(Range::new(0, 0).is_none());
        assert!(Range::new(u64::MAX, 2).is_none());
        assert!(Range::new(u64::MAX, 1).is_some());
    }
}
