//! Plugged blocks as ranges of guest RAM.
//!
//! The region is divided into chunks. A chunk with a plugged block in it is a range of guest RAM, of
//! which everybody who listens is told; one with none is not there at all. See ADR 0009.

use std::collections::BTreeMap;

use testudo_arch::Span;
use testudo_memory::{Backing, GuestRam, RamError};

/// The least a chunk has: what Linux adds and removes at once.
const CHUNK: u64 = 128 << 20;
/// No more chunks than this, because who listens may take few ranges: vhost has 64 by default.
const CHUNKS_MAX: u64 = 32;

pub(super) struct Chunks {
    region: Span,
    chunk: u64,
    /// Plugged bytes of the chunks that are there, by guest-physical address.
    plugged: BTreeMap<u64, u64>,
}

impl Chunks {
    pub(super) fn new(region: Span) -> Self {
        let chunk = region
            .size()
            .div_ceil(CHUNKS_MAX)
            .checked_next_power_of_two()
            .unwrap_or(u64::MAX);
        Self {
            region,
            chunk: chunk.max(CHUNK),
            plugged: BTreeMap::new(),
        }
    }

    /// The parts of `size` bytes at `gpa` by chunk: the chunk's address and size, the part's.
    fn parts(&self, gpa: u64, size: u64) -> Vec<(u64, u64, u64, u64)> {
        let base = self.region.base();
        let end = gpa.saturating_add(size).min(self.region.end());
        let mut parts = Vec::new();
        let mut at = gpa.max(base);
        while at < end {
            let number = at.saturating_sub(base) / self.chunk;
            let chunk = base.saturating_add(number.saturating_mul(self.chunk));
            let chunk_end = chunk.saturating_add(self.chunk).min(self.region.end());
            let part = end.min(chunk_end).saturating_sub(at);
            parts.push((chunk, chunk_end.saturating_sub(chunk), at, part));
            at = at.saturating_add(part);
        }
        parts
    }

    /// Makes these bytes, none of which is plugged, be there. On error nothing has changed.
    pub(super) fn plug(
        &mut self,
        ram: &mut GuestRam,
        gpa: u64,
        size: u64,
        backing: &Backing,
    ) -> Result<(), RamError> {
        let parts = self.parts(gpa, size);
        let mut added = Vec::new();
        let all = parts.iter().try_for_each(|(chunk, chunk_size, at, part)| {
            if !self.plugged.contains_key(chunk) {
                // Only what is plugged of it is faulted in.
                let lazy = Backing {
                    prefault: None,
                    ..*backing
                };
                ram.add(*chunk, *chunk_size, &lazy)?;
                added.push(*chunk);
            }
            match backing.prefault {
                Some(prefault) => ram.prefault(*at, *part, prefault),
                None => Ok(()),
            }
        });
        if let Err(error) = all {
            for chunk in added {
                if let Err(again) = ram.remove(chunk) {
                    log::error!("{again}");
                    self.plugged.insert(chunk, 0);
                }
            }
            return Err(error);
        }
        for (chunk, _, _, part) in parts {
            let plugged = self.plugged.entry(chunk).or_default();
            *plugged = plugged.saturating_add(part);
        }
        Ok(())
    }

    /// Takes these bytes, all of which are plugged, away. A chunk that a listener does not let go of
    /// stays, empty.
    pub(super) fn unplug(&mut self, ram: &mut GuestRam, gpa: u64, size: u64) {
        for (chunk, _, at, part) in self.parts(gpa, size) {
            let Some(plugged) = self.plugged.get_mut(&chunk) else {
                continue;
            };
            *plugged = plugged.saturating_sub(part);
            if *plugged == 0 {
                match ram.remove(chunk) {
                    Ok(()) => {
                        self.plugged.remove(&chunk);
                        continue;
                    }
                    Err(error) => log::error!("{error}"),
                }
            }
            if let Err(error) = ram.discard(at, part) {
                log::error!("{error}");
            }
        }
    }

    /// Takes everything away.
    pub(super) fn clear(&mut self, ram: &mut GuestRam) -> Result<(), RamError> {
        while let Some((chunk, plugged)) = self.plugged.pop_first() {
            if let Err(error) = ram.remove(chunk) {
                self.plugged.insert(chunk, plugged);
                return Err(error);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const BASE: u64 = 4 << 30;

    fn ranges(ram: &GuestRam) -> Vec<(u64, u64)> {
        let mut ranges: Vec<_> = ram
            .ranges()
            .map(|r| ((r.gpa - BASE) / MIB, r.size / MIB))
            .collect();
        ranges.sort_unstable();
        ranges
    }

    fn chunks(size: u64) -> Chunks {
        Chunks::new(Span::new(BASE, size).unwrap())
    }

    #[test]
    fn chunks_are_few() {
        assert_eq!(chunks(128 * MIB).chunk, 128 * MIB);
        assert_eq!(chunks(4096 * MIB).chunk, 128 * MIB);
        assert_eq!(chunks(4098 * MIB).chunk, 256 * MIB);
        assert_eq!(chunks(1 << 40).chunk, 32 << 30);
    }

    #[test]
    fn a_chunk_is_there_while_a_block_of_it_is_plugged() {
        let mut ram = GuestRam::new();
        let mut chunks = chunks(300 * MIB);
        let backing = Backing::default();
        chunks
            .plug(&mut ram, BASE + 126 * MIB, 4 * MIB, &backing)
            .unwrap();
        assert_eq!(ranges(&ram), [(0, 128), (128, 128)]);
        chunks
            .plug(&mut ram, BASE + 298 * MIB, 2 * MIB, &backing)
            .unwrap();
        assert_eq!(ranges(&ram), [(0, 128), (128, 128), (256, 44)]);
        chunks.unplug(&mut ram, BASE + 128 * MIB, 2 * MIB);
        assert_eq!(ranges(&ram), [(0, 128), (256, 44)]);
        chunks
            .plug(&mut ram, BASE + 128 * MIB, 2 * MIB, &backing)
            .unwrap();
        chunks.unplug(&mut ram, BASE + 126 * MIB, 4 * MIB);
        assert_eq!(ranges(&ram), [(256, 44)]);
        chunks.clear(&mut ram).unwrap();
        assert_eq!(ranges(&ram), []);
    }

    #[test]
    fn what_cannot_be_added_is_not_there() {
        let mut ram = GuestRam::new();
        let mut chunks = chunks(512 * MIB);
        ram.add(BASE + 128 * MIB, 2 * MIB, &Backing::default())
            .unwrap();
        let all = chunks.plug(&mut ram, BASE, 256 * MIB, &Backing::default());
        assert!(all.is_err());
        assert_eq!(ranges(&ram), [(128, 2)]);
        assert!(chunks.plugged.is_empty());
    }
}
