//! The DAX window: files mapped into memory that the guest sees (virtio 1.2 §5.11.6.4).
//!
//! Mappings are whole granules of 2 MiB, which bounds how many there can be, and which is what
//! Linux asks for. A file that ends within a granule may be mapped; the guest knows the file's
//! size and does not look beyond.
//!
//! Unless somebody else shortens the file. What touches the part that is gone then cannot go on: the
//! guest's kernel fails with its vCPU, which the control thread has [mended](Mender); a process of the
//! guest's waits for a page that KVM asks for again and again (asynchronous page faults), of which
//! nobody here hears. So the files that are mapped are looked at every second.
//!
//! ```text
//!   granule shows the file ──the file has become shorter──▶ its end shows zeroes
//!            ▲                                                  │
//!            └────────── the file has become longer ◀───────────┘
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::host;
use super::node::{Key, Node};
use super::server::{Answer, Answered, Call, Server, count, lock};
use super::wire::{MAPPING_READ, MAPPING_WRITE, RemovemappingIn, RemovemappingOne, SetupmappingIn};

/// Binary logarithm of a granule.
pub(super) const MAP_ALIGNMENT: u16 = 21;
const GRANULE: u64 = 1 << MAP_ALIGNMENT;
/// How often the sizes of mapped files are looked at.
pub(super) const LOOK: Duration = Duration::from_secs(1);
/// What a file's end is rounded up to in memory.
const PAGE: u64 = 4096;

/// What one granule shows.
#[derive(Debug)]
struct Mapped {
    node: Arc<Node>,
    /// Where in the file it begins.
    offset: u64,
    writable: bool,
    /// So many bytes show the file, the rest shows zeroes.
    shown: u64,
    /// Bytes that the file had when that was decided.
    size: u64,
}

impl Mapped {
    /// How much of the granule a file of `size` bytes reaches into.
    fn reached(&self, size: u64) -> u64 {
        let end = size.div_ceil(PAGE).saturating_mul(PAGE);
        end.saturating_sub(self.offset).min(GRANULE)
    }
}

/// Sizes of files, each asked for once. Ordered and not hashed: a hash asks the host for random numbers,
/// which a thread under its filter may not.
#[derive(Default)]
struct Sizes(BTreeMap<Key, Option<u64>>);

impl Sizes {
    fn of(&mut self, node: &Node) -> Option<u64> {
        let ask = || host::stat(node).ok().map(|found| found.stx_size);
        *self.0.entry(node.key).or_insert_with(ask)
    }
}

/// The granules of the window that show a file, by number.
#[derive(Debug, Default)]
pub(super) struct Mappings {
    granules: BTreeMap<u64, Mapped>,
}

/// Whether any granule shows less than its file: asked at every request that may change a file.
#[derive(Debug, Default)]
pub(super) struct Mended(AtomicBool);

/// The control thread's way to the window of a device, as long as there is one.
#[derive(Debug, Clone)]
pub struct Mender(Weak<Server>);

impl Mender {
    pub(super) fn new(server: &Arc<Server>) -> Self {
        Self(Arc::downgrade(server))
    }

    /// Puts zeroes in the place of what is gone of files that the guest has mapped and somebody else
    /// has shortened; how many pages that was so far. What the guest writes there is nobody's.
    pub fn mend(&self) -> u64 {
        self.0.upgrade().map_or(0, |server| server.mend())
    }
}

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
        let size = host::stat(&*node)?.stx_size;
        let first = covered.start;
        if mappings.granules.is_empty() {
            self.look_again();
        }
        let mut hidden = 0_u64;
        for granule in covered {
            let before = granule.saturating_sub(first).saturating_mul(GRANULE);
            let mut mapped = Mapped {
                node: Arc::clone(&node),
                offset: asked.foffset.saturating_add(before),
                writable,
                shown: GRANULE,
                size,
            };
            let reached = mapped.reached(size);
            // A guest that asks for what is behind the end does not know yet that the file is shorter;
            // no more does one that asks again, to write, for what has been mended.
            let again = mappings.granules.get(&granule).is_some_and(|was| {
                was.shown < GRANULE && was.node.key == node.key && was.offset == mapped.offset
            });
            if reached == 0 || (again && reached < GRANULE) {
                let gone = GRANULE.saturating_sub(reached);
                let at = granule.saturating_mul(GRANULE).saturating_add(reached);
                window
                    .map_scratch(at, gone)
                    .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::INVAL))?;
                mapped.shown = reached;
                hidden = hidden.saturating_add(gone / PAGE);
            }
            mappings.granules.insert(granule, mapped);
        }
        if hidden != 0 {
            self.mended.0.store(true, Ordering::Release);
            self.gauges.mended.fetch_add(hidden, Ordering::AcqRel);
        }
        count(&self.gauges.mapped, mappings.granules.len());
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
            mappings
                .granules
                .retain(|granule, _| !covered.contains(granule));
            count(&self.gauges.mapped, mappings.granules.len());
        }
        Ok(Answer::Built)
    }

    pub(super) fn remove_all_mappings(&self) {
        let Some(window) = &self.window else {
            return;
        };
        let mut mappings = lock(&self.mappings);
        if std::mem::take(&mut mappings.granules).is_empty() {
            return;
        }
        count(&self.gauges.mapped, 0);
        if let Err(e) = window.clear(0, window.len()) {
            log::error!("virtio-fs: the window cannot be cleared: {e}");
        }
    }

    /// Looks at the files after [`LOOK`], if this is a device with a window.
    fn look_again(&self) {
        if let Some(timer) = &self.look
            && let Err(e) = timer.set(LOOK)
        {
            log::error!("virtio-fs: the timer of mapped files: {e}");
        }
    }

    /// The timer has expired.
    pub(super) fn look(&self) {
        if let Some(timer) = &self.look {
            timer.take();
        }
        self.mend();
        self.show_grown();
        if !lock(&self.mappings).granules.is_empty() {
            self.look_again();
        }
    }

    /// See [`Mender::mend`].
    pub(super) fn mend(&self) -> u64 {
        let Some(window) = &self.window else {
            return 0;
        };
        let (mut pages, mut sizes) = (0_u64, Sizes::default());
        let mut mappings = lock(&self.mappings);
        for (granule, mapped) in &mut mappings.granules {
            let Some(size) = sizes.of(&mapped.node).filter(|s| *s < mapped.size) else {
                continue;
            };
            mapped.size = size;
            let reached = mapped.reached(size);
            let gone = mapped.shown.saturating_sub(reached);
            if gone == 0 {
                continue;
            }
            let at = granule.saturating_mul(GRANULE).saturating_add(reached);
            if let Err(e) = window.map_scratch(at, gone) {
                log::error!("virtio-fs: the window cannot be mended: {e}");
                continue;
            }
            mapped.shown = reached;
            pages = pages.saturating_add(gone / PAGE);
        }
        if pages != 0 {
            self.mended.0.store(true, Ordering::Release);
        }
        drop(mappings);
        let before = self.gauges.mended.fetch_add(pages, Ordering::AcqRel);
        if pages != 0 && before == 0 {
            let tag = &self.options.tag;
            log::warn!(
                "folder {tag}: a file became shorter while the guest had it mapped; it finds zeroes there"
            );
        }
        before.saturating_add(pages)
    }

    /// Shows files again that have become longer since their end was mended.
    pub(super) fn show_grown(&self) {
        let Some(window) = &self.window else {
            return;
        };
        if !self.mended.0.load(Ordering::Acquire) {
            return;
        }
        let mut sizes = Sizes::default();
        let mut mappings = lock(&self.mappings);
        let mut left = false;
        for (granule, mapped) in &mut mappings.granules {
            if mapped.shown == GRANULE {
                continue;
            }
            let size = sizes.of(&mapped.node).unwrap_or(0);
            let flags = if mapped.writable {
                OFlags::RDWR
            } else {
                OFlags::RDONLY
            };
            let at = granule.saturating_mul(GRANULE);
            let show = || {
                let file = File::from(self.export.open(&mapped.node, flags)?);
                window.map_file(at, GRANULE, &file, mapped.offset, mapped.writable)
            };
            let grown = mapped.reached(size) > mapped.shown;
            match grown.then(show) {
                Some(Ok(())) => {
                    mapped.shown = GRANULE;
                    mapped.size = size;
                }
                Some(Err(e)) => {
                    log::debug!("virtio-fs: a file that grew cannot be mapped: {e}");
                    left = true;
                }
                None => left = true,
            }
        }
        self.mended.0.store(left, Ordering::Release);
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
