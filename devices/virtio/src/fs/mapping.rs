//! The DAX window: files mapped into memory that the guest sees (virtio 1.2 §5.11.6.4).
//!
//! Mappings are whole granules of 2 MiB, which bounds how many there can be, and which is what
//! Linux asks for. A file that ends within a granule may be mapped; the guest knows the file's
//! size and does not look beyond.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::server::{Answer, Answered, Call, Server, count, lock};
use super::wire::{MAPPING_READ, MAPPING_WRITE, RemovemappingIn, RemovemappingOne, SetupmappingIn};

/// Binary logarithm of a granule.
pub(super) const MAP_ALIGNMENT: u16 = 21;
const GRANULE: u64 = 1 << MAP_ALIGNMENT;

/// The granules of the window that show a file, by number.
#[derive(Debug, Default)]
pub(super) struct Mappings(BTreeMap<u64, ()>);

/// The granules from `offset` on that are `len` bytes, if both are whole ones and in the window.
fn granules(offset: u64, len: u64, window: u64) -> Result<Range<u64>, Errno> {
    let end = offset.checked_add(len).filter(|end| *end <= window);
    let whole = offset.is_multiple_of(GRANULE) && len.is_multiple_of(GRANULE) && len != 0;
    match end {
        Some(end) if whole => Ok(offset / GRANULE..end / GRANULE),
        _ => Err(Errno::INVAL),
    }
}

impl Server {
    pub(super) fn setup_mapping(&self, call: &mut Call<'_>) -> Answered {
        let window = self.window.as_ref().ok_or(Errno::NOSYS)?;
        let asked: SetupmappingIn = call.args.take()?;
        let writable = asked.flags & MAPPING_WRITE != 0;
        if !writable && asked.flags & MAPPING_READ == 0 {
            return Err(Errno::INVAL);
        }
        if writable && self.options.readonly {
            return Err(Errno::ROFS);
        }
        let covered = granules(asked.moffset, asked.len, window.len())?;
        if !asked.foffset.is_multiple_of(GRANULE) {
            return Err(Errno::INVAL);
        }
        let node = self.node(call.header.nodeid)?;
        if node.kind != FileType::RegularFile {
            return Err(Errno::INVAL);
        }
        let flags = if writable {
            OFlags::RDWR
        } else {
            OFlags::RDONLY
        };
        let file = File::from(self.export.open(&node, flags)?);
        let mut mappings = lock(&self.mappings);
        window
            .map_file(asked.moffset, asked.len, &file, asked.foffset, writable)
            .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::INVAL))?;
        mappings.0.extend(covered.map(|granule| (granule, ())));
        count(&self.gauges.mapped, mappings.0.len());
        Ok(Answer::Built)
    }

    pub(super) fn remove_mapping(&self, call: &mut Call<'_>) -> Answered {
        let window = self.window.as_ref().ok_or(Errno::NOSYS)?;
        let RemovemappingIn { count: entries } = call.args.take()?;
        for _ in 0..entries {
            let one: RemovemappingOne = call.args.take()?;
            let covered = granules(one.moffset, one.len, window.len())?;
            let mut mappings = lock(&self.mappings);
            window
                .clear(one.moffset, one.len)
                .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::INVAL))?;
            mappings.0.retain(|granule, ()| !covered.contains(granule));
            count(&self.gauges.mapped, mappings.0.len());
        }
        Ok(Answer::Built)
    }

    pub(super) fn remove_all_mappings(&self) {
        let Some(window) = &self.window else {
            return;
        };
        let mut mappings = lock(&self.mappings);
        if std::mem::take(&mut mappings.0).is_empty() {
            return;
        }
        count(&self.gauges.mapped, 0);
        if let Err(e) = window.clear(0, window.len()) {
            log::error!("virtio-fs: the window cannot be cleared: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_granules_of_the_window() {
        assert_eq!(granules(0, GRANULE, GRANULE), Ok(0..1));
        assert_eq!(granules(GRANULE, 2 * GRANULE, 4 * GRANULE), Ok(1..3));
        for (offset, len) in [
            (0, 0),
            (1, GRANULE),
            (0, GRANULE - 1),
            (4096, GRANULE),
            (4 * GRANULE, GRANULE),
            (0, 5 * GRANULE),
            (u64::MAX - GRANULE + 1, GRANULE),
            (GRANULE, u64::MAX),
        ] {
            assert_eq!(granules(offset, len, 4 * GRANULE), Err(Errno::INVAL));
        }
    }
}
