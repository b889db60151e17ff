//! The ranges of guest RAM and those who must be told of them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap,
    GuestRegionMmap,
};

use crate::backing::{Backing, HostMapping, Prefault};
use crate::{RamHandle, RamView};

/// Guest RAM could not be had, added or removed.
#[derive(Debug, Error)]
pub enum RamError {
    /// The host refused memory.
    #[error("cannot {action} {} of guest RAM; free memory on the host or give the guest less", mib(*.size))]
    Host {
        /// What was tried, as a verb.
        action: &'static str,
        /// Bytes asked for.
        size: u64,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The host has not that many huge pages.
    #[error("cannot map {} of guest RAM in hugepages of {}; reserve them on the host (/sys/kernel/mm/hugepages) or leave hugepages out", mib(*.size), mib(*.page))]
    HugePages {
        /// Bytes asked for.
        size: u64,
        /// Bytes in a page.
        page: u64,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The size is not a multiple of the huge page size.
    #[error("{} of guest RAM is not a multiple of the {} huge page; round the memory size up", mib(*.size), mib(*.page))]
    PageSize {
        /// Bytes asked for.
        size: u64,
        /// Bytes in a page.
        page: u64,
    },
    /// The size does not fit this host's address space.
    #[error("{} of guest RAM do not fit this host's address space", mib(*.size))]
    TooLarge {
        /// Bytes asked for.
        size: u64,
    },
    /// The range collides with RAM that is there, or is empty.
    #[error("guest RAM at {gpa:#x} (+{size:#x}) collides with RAM already there")]
    Overlap {
        /// First guest-physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// No range of guest RAM is or begins there.
    #[error("no range of guest RAM is at {gpa:#x}")]
    Absent {
        /// The guest-physical address named.
        gpa: u64,
    },
    /// A listener refused the change; those told before it were told to take it back.
    #[error("guest RAM at {gpa:#x} (+{size:#x}) was refused by {listener}")]
    Refused {
        /// First guest-physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
        /// Who refused.
        listener: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The view could not be made.
    #[error("cannot make a view of guest RAM at {gpa:#x} (+{size:#x})")]
    View {
        /// First guest-physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
        /// Why.
        #[source]
        source: MmapRegionError,
    },
}

fn mib(bytes: u64) -> String {
    if bytes.is_multiple_of(1 << 20) {
        format!("{} MiB", bytes >> 20)
    } else {
        format!("{bytes} bytes")
    }
}

/// One contiguous range of guest RAM.
#[derive(Debug, Clone)]
pub struct RamRange {
    /// First guest-physical address, a multiple of 4 KiB.
    pub gpa: u64,
    /// Length in bytes.
    pub size: u64,
    /// Address in this process.
    pub host: usize,
    /// The memfd behind it, from its beginning, when the memory is shared.
    pub file: Option<Arc<File>>,
}

/// Somebody who keeps a second account of guest RAM: KVM's memslots, an IOMMU, vhost.
pub trait RamListener: Send {
    /// Names the listener in errors.
    fn name(&self) -> &'static str;
    /// A range was added. On error it must be as if it had never been told.
    fn added(&mut self, range: &RamRange) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;
    /// A range is about to go. On error it must be as if it had never been told.
    fn removed(&mut self, range: &RamRange)
    -> Result<(), Box<dyn std::error::Error + Send + Sync>>;
}

struct Range {
    range: RamRange,
    mapping: HostMapping,
    prefault: Option<Prefault>,
}

/// The guest's RAM: owned by the control thread, seen by others through views.
pub struct GuestRam {
    handle: RamHandle,
    ranges: Vec<Range>,
    /// Mappings of ranges that were removed, by guest-physical address: a range that comes and goes
    /// uses the same addresses each time.
    retired: BTreeMap<u64, HostMapping>,
    listeners: Vec<Box<dyn RamListener>>,
}

impl Default for GuestRam {
    fn default() -> Self {
        Self::new()
    }
}

impl GuestRam {
    /// No RAM and no listeners yet.
    pub fn new() -> Self {
        Self {
            handle: GuestMemoryAtomic::new(GuestMemoryMmap::default()),
            ranges: Vec::new(),
            retired: BTreeMap::new(),
            listeners: Vec::new(),
        }
    }

    /// Registers `listener` and tells it of the ranges that are there.
    pub fn listen(&mut self, mut listener: Box<dyn RamListener>) -> Result<(), RamError> {
        for (told, entry) in self.ranges.iter().enumerate() {
            if let Err(source) = listener.added(&entry.range) {
                for back in self.ranges.iter().take(told).rev() {
                    take_back(listener.as_mut(), &back.range);
                }
                return Err(refused(listener.as_ref(), &entry.range, source));
            }
        }
        self.listeners.push(listener);
        Ok(())
    }

    /// Adds `size` bytes at `gpa`: maps them, tells every listener in order, then publishes a view
    /// that has them. On error nothing changed.
    pub fn add(&mut self, gpa: u64, size: u64, backing: &Backing) -> Result<(), RamError> {
        let end = gpa.checked_add(size).filter(|_| size > 0);
        let free = end.is_some_and(|end| {
            self.ranges
                .iter()
                .all(|r| end <= r.range.gpa || r.range.gpa.saturating_add(r.range.size) <= gpa)
        });
        if !free {
            return Err(RamError::Overlap { gpa, size });
        }
        let mapping = match self.retired.remove(&gpa) {
            Some(mut mapping) if mapping.size as u64 == size => match mapping.revive(backing) {
                Ok(()) => mapping,
                Err(error) => {
                    self.retired.insert(gpa, mapping);
                    return Err(error);
                }
            },
            _ => HostMapping::new(size, backing)?,
        };
        match self.add_mapping(gpa, &mapping, backing) {
            Ok(range) => {
                self.ranges.push(Range {
                    range,
                    mapping,
                    prefault: backing.prefault,
                });
                Ok(())
            }
            Err(error) => {
                self.retire(gpa, mapping)?;
                Err(error)
            }
        }
    }

    /// All of [`Self::add`] that can still be taken back.
    fn add_mapping(
        &mut self,
        gpa: u64,
        mapping: &HostMapping,
        backing: &Backing,
    ) -> Result<RamRange, RamError> {
        let size = mapping.size as u64;
        if let Some(prefault) = backing.prefault {
            mapping
                .prefault(prefault)
                .map_err(|source| RamError::Host {
                    action: "prefault",
                    size,
                    source,
                })?;
        }
        let range = RamRange {
            gpa,
            size,
            host: mapping.addr,
            file: mapping.file.clone(),
        };
        let region = region(&range)?;
        let view = RamView::clone(&self.handle.memory())
            .insert_region(Arc::new(region))
            .map_err(|_| RamError::Overlap { gpa, size })?;
        for told in 0..self.listeners.len() {
            let (before, rest) = self.listeners.split_at_mut(told);
            let Some(listener) = rest.first_mut() else {
                break;
            };
            if let Err(source) = listener.added(&range) {
                let error = refused(listener.as_ref(), &range, source);
                before
                    .iter_mut()
                    .rev()
                    .for_each(|l| take_back(l.as_mut(), &range));
                return Err(error);
            }
        }
        self.publish(view);
        Ok(range)
    }

    fn retire(&mut self, gpa: u64, mut mapping: HostMapping) -> Result<(), RamError> {
        let retired = mapping.retire();
        let size = mapping.size as u64;
        self.retired.insert(gpa, mapping);
        retired.map_err(|source| RamError::Host {
            action: "give back",
            size,
            source,
        })
    }

    /// Removes the range that begins at `gpa`: publishes a view without it, tells every listener
    /// in reverse order, then gives the pages back. A listener that refuses leaves the range in
    /// place.
    pub fn remove(&mut self, gpa: u64) -> Result<(), RamError> {
        let at = self
            .ranges
            .iter()
            .position(|r| r.range.gpa == gpa)
            .ok_or(RamError::Absent { gpa })?;
        let entry = self.ranges.remove(at);
        let with = RamView::clone(&self.handle.memory());
        let (without, _) = with
            .remove_region(GuestAddress(gpa), entry.range.size)
            .map_err(|_| RamError::Absent { gpa })?;
        self.publish(without);
        for told in (0..self.listeners.len()).rev() {
            let Some((listener, later)) = self
                .listeners
                .get_mut(told..)
                .and_then(<[_]>::split_first_mut)
            else {
                break;
            };
            if let Err(source) = listener.removed(&entry.range) {
                let error = refused(listener.as_ref(), &entry.range, source);
                for told_before in later {
                    if let Err(again) = told_before.added(&entry.range) {
                        log::error!("{}: RAM at {gpa:#x} is lost: {again}", told_before.name());
                    }
                }
                self.publish(with);
                self.ranges.push(entry);
                return Err(error);
            }
        }
        self.retire(gpa, entry.mapping)
    }

    /// Makes the RAM what it was before the guest first ran: every page reads as zeroes again, those
    /// that were faulted in at first are again, and nobody listens. For a guest that boots again in a
    /// new VM.
    pub fn recycle(&mut self) -> Result<(), RamError> {
        self.listeners.clear();
        for entry in &self.ranges {
            let failed = |action| {
                move |source| RamError::Host {
                    action,
                    size: entry.range.size,
                    source,
                }
            };
            entry.mapping.discard().map_err(failed("give back"))?;
            if let Some(prefault) = entry.prefault {
                entry
                    .mapping
                    .prefault(prefault)
                    .map_err(failed("prefault"))?;
            }
        }
        Ok(())
    }

    /// Gives the pages of `size` bytes at `gpa` back to the host; they read as zeroes afterwards. The
    /// range they are in stays.
    pub fn discard(&self, gpa: u64, size: u64) -> Result<(), RamError> {
        let (entry, offset, len) = self.part(gpa, size)?;
        let addr = entry.mapping.addr.saturating_add(offset);
        let shared = entry.mapping.file.is_some();
        crate::backing::discard(addr, len, shared).map_err(|source| RamError::Host {
            action: "give back",
            size,
            source,
        })
    }

    /// Faults in `size` bytes at `gpa`.
    pub fn prefault(&self, gpa: u64, size: u64, prefault: Prefault) -> Result<(), RamError> {
        let (entry, offset, len) = self.part(gpa, size)?;
        entry
            .mapping
            .prefault_part(offset, len, prefault)
            .map_err(|source| RamError::Host {
                action: "prefault",
                size,
                source,
            })
    }

    /// The range that holds all of these bytes, the offset in it and their number.
    fn part(&self, gpa: u64, size: u64) -> Result<(&Range, usize, usize), RamError> {
        let within = self.ranges.iter().find_map(|entry| {
            let offset = gpa.checked_sub(entry.range.gpa)?;
            let fits = offset.checked_add(size)? <= entry.range.size;
            let (offset, len) = (usize::try_from(offset).ok()?, usize::try_from(size).ok()?);
            fits.then_some((entry, offset, len))
        });
        within.ok_or(RamError::Absent { gpa })
    }

    /// A snapshot of the RAM as it is now.
    pub fn view(&self) -> RamView {
        RamView::clone(&self.handle.memory())
    }

    /// A handle from which devices take views.
    pub fn handle(&self) -> RamHandle {
        self.handle.clone()
    }

    /// The ranges, in the order they were added.
    pub fn ranges(&self) -> impl Iterator<Item = &RamRange> {
        self.ranges.iter().map(|r| &r.range)
    }

    /// Bytes in all ranges.
    pub fn size(&self) -> u64 {
        self.ranges().fold(0, |sum, r| sum.saturating_add(r.size))
    }

    fn publish(&self, view: RamView) {
        match self.handle.lock() {
            Ok(guard) => guard.replace(view),
            Err(poisoned) => poisoned.into_inner().replace(view),
        }
    }
}

fn take_back(listener: &mut dyn RamListener, range: &RamRange) {
    if let Err(error) = listener.removed(range) {
        log::error!(
            "{}: cannot take back RAM at {:#x}: {error}",
            listener.name(),
            range.gpa
        );
    }
}

fn refused(
    listener: &dyn RamListener,
    range: &RamRange,
    source: Box<dyn std::error::Error + Send + Sync>,
) -> RamError {
    RamError::Refused {
        gpa: range.gpa,
        size: range.size,
        listener: listener.name(),
        source,
    }
}

#[expect(unsafe_code, reason = "hands a mapping to vm-memory")]
fn region(range: &RamRange) -> Result<GuestRegionMmap, RamError> {
    let (gpa, size) = (range.gpa, range.size);
    let len = usize::try_from(size).map_err(|_| RamError::TooLarge { size })?;
    let host: *mut u8 = std::ptr::with_exposed_provenance_mut(range.host);
    let mut builder = MmapRegionBuilder::new(len)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(if range.file.is_some() {
            libc::MAP_SHARED
        } else {
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS
        });
    if let Some(file) = &range.file {
        builder = builder.with_file_offset(FileOffset::from_arc(Arc::clone(file), 0));
    }
    // SAFETY: the mapping is `len` bytes of readable, writable memory that stays mapped for the
    // life of the process (see `backing`).
    let region = unsafe { builder.with_raw_mmap_pointer(host) }
        .build()
        .map_err(|source| RamError::View { gpa, size, source })?;
    GuestRegionMmap::new(region, GuestAddress(gpa)).ok_or(RamError::Overlap { gpa, size })
}

#[cfg(test)]
mod tests;
