//! One PCI segment: who is where, and how configuration accesses reach them.
//!
//! ```text
//!   vCPU ─ECAM/0xcf8─▶ Segment ─lookup─▶ Slot<Occupant> ─lock─▶ function.config_write
//!                                                      └─ windows follow the BARs, same lock
//!   vCPU ─MMIO bus───▶ BarTarget ──────▶ Slot<Occupant> ─lock─▶ function.bar_write
//! ```
//! The table of functions is read-locked for the lookup only. A window that closes may be what
//! another function's BAR waits for, so the others are then looked at too, one lock at a time.

mod mechanism;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use testudo_bus::{Access, Bus, Range, Slot, Target, fill_absent};
use thiserror::Error;

use crate::bar::{Apertures, Moved, Windows};
use crate::config::regs;
use crate::{Bdf, Decoding, PciFunction};

const CONFIG_SIZE: u64 = 4096;

/// A function could not be plugged.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PlugError {
    /// Another function is there.
    #[error("PCI {bdf} is taken; unplug what is there or choose another slot")]
    Taken {
        /// Where.
        bdf: Bdf,
    },
    /// The address cannot be BAR `bar`'s.
    #[error(
        "PCI {bdf} BAR {bar} cannot be at {base:#x}: it must be a multiple of the BAR's size inside a memory window of the host bridge"
    )]
    Place {
        /// The function.
        bdf: Bdf,
        /// The BAR.
        bar: u8,
        /// The address asked for.
        base: u64,
    },
}

/// A segment of 256 buses. Clones share it.
#[derive(Clone)]
pub struct Segment {
    shared: Arc<Shared>,
}

type Seat = Arc<Slot<Occupant>>;

struct Shared {
    apertures: Apertures,
    functions: RwLock<BTreeMap<Bdf, Seat>>,
    /// Some BAR decodes but has no window.
    waiting: AtomicBool,
}

struct Occupant {
    function: Box<dyn PciFunction>,
    windows: Windows,
}

/// The guard of a plugged function: dropping it takes the function off its bus, waits for the
/// access in flight, closes its BAR windows and drops it.
#[must_use = "dropping it unplugs the function"]
pub struct Plugged {
    shared: Arc<Shared>,
    seat: Seat,
    bdf: Bdf,
}

impl Segment {
    /// Bytes of ECAM for all 256 buses.
    pub const ECAM_LEN: u64 = 256 << 20;
    /// First of the eight ports of configuration mechanism #1.
    pub const CF8_PORT: u64 = 0xcf8;
    /// How many ports that is.
    pub const CF8_LEN: u64 = 8;

    /// An empty segment whose BARs live on `mmio`, inside `apertures` only.
    pub fn new(mmio: Bus, apertures: Vec<Range>) -> Self {
        Self {
            shared: Arc::new(Shared {
                apertures: Apertures {
                    mmio,
                    ranges: apertures,
                },
                functions: RwLock::default(),
                waiting: AtomicBool::new(false),
            }),
        }
    }

    /// Puts `function` at `bdf` with its BARs holding the addresses in `bars` (index, base);
    /// memory decoding stays off, as after reset. It becomes visible last, when all is wired.
    pub fn plug(
        &self,
        bdf: Bdf,
        mut function: Box<dyn PciFunction>,
        bars: &[(u8, u64)],
    ) -> Result<Plugged, PlugError> {
        for (bar, base) in bars.iter().copied() {
            self.assign(function.as_mut(), bar, base)
                .ok_or(PlugError::Place { bdf, bar, base })?;
        }
        let seat = Arc::new(Slot::new(Box::new(Occupant {
            function,
            windows: Windows::default(),
        })));
        let mut functions = self.shared.functions_mut();
        if functions.contains_key(&bdf) {
            return Err(PlugError::Taken { bdf });
        }
        functions.insert(bdf, Arc::clone(&seat));
        Ok(Plugged {
            shared: Arc::clone(&self.shared),
            seat,
            bdf,
        })
    }

    fn assign(&self, function: &mut dyn PciFunction, bar: u8, base: u64) -> Option<()> {
        let spec = function.config().bars().find(|b| b.index == bar)?;
        let inside = Range::new(base, spec.size).is_some_and(|r| self.shared.apertures.contain(&r));
        let [b0, b1, b2, b3, b4, b5, b6, b7] = base.to_le_bytes();
        function.config_write(regs::bar(bar)?, &[b0, b1, b2, b3]);
        if spec.wide {
            let high = regs::bar(bar.checked_add(1)?)?;
            function.config_write(high, &[b4, b5, b6, b7]);
        }
        (inside && function.config().bar_address(bar) == Some(base)).then_some(())
    }

    /// What answers for the segment's ECAM region: 4 KiB per function, 1 MiB per bus.
    pub fn ecam(&self) -> Arc<dyn Target> {
        Arc::new(mechanism::Ecam(self.clone()))
    }

    /// What answers at ports 0xcf8 to 0xcff.
    pub fn cf8(&self) -> Arc<dyn Target> {
        Arc::new(mechanism::Mechanism1::new(self.clone()))
    }

    /// Reads configuration space; an absent function and an access that would pass its end read
    /// all-ones.
    pub fn config_read(&self, bdf: Bdf, offset: u16, data: &mut [u8]) {
        let seat = self.shared.seat(bdf).filter(|_| fits(offset, data.len()));
        let read = seat.and_then(|seat| seat.with(|o| o.function.config_read(offset, data)));
        if read.is_none() {
            fill_absent(data);
        } else if bdf.function() == 0 && self.shared.multi_function(bdf) {
            let header = usize::from(regs::HEADER_TYPE.wrapping_sub(offset));
            if let Some(byte) = data.get_mut(header) {
                *byte |= regs::HEADER_MULTI_FUNCTION;
            }
        }
    }

    /// Writes configuration space, then moves the BAR windows that changed.
    pub fn config_write(&self, bdf: Bdf, offset: u16, data: &[u8]) {
        let Some(seat) = self.shared.seat(bdf).filter(|_| fits(offset, data.len())) else {
            return;
        };
        let closed = seat.with(|occupant| {
            occupant.function.config_write(offset, data);
            self.shared.follow(&seat, occupant)
        });
        if closed == Some(true) {
            self.shared.settle_waiting();
        }
    }

    pub(crate) fn first_window(&self) -> Option<u64> {
        self.shared.apertures.ranges.first().map(Range::base)
    }

    /// The functions present, in order of address.
    pub fn functions(&self) -> Vec<Bdf> {
        self.shared.functions().keys().copied().collect()
    }
}

impl Shared {
    fn functions(&self) -> RwLockReadGuard<'_, BTreeMap<Bdf, Seat>> {
        self.functions
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn functions_mut(&self) -> RwLockWriteGuard<'_, BTreeMap<Bdf, Seat>> {
        self.functions
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn seat(&self, bdf: Bdf) -> Option<Seat> {
        self.functions().get(&bdf).cloned()
    }

    fn multi_function(&self, bdf: Bdf) -> bool {
        let others = bdf.with_function(1)..=bdf.with_function(7);
        self.functions().range(others).next().is_some()
    }

    /// Brings an occupant's windows in step with its registers; `true` if bus space became free.
    fn follow(&self, seat: &Seat, occupant: &mut Occupant) -> bool {
        let bars: Vec<_> = occupant.function.config().bars().collect();
        let mut freed = false;
        for bar in bars {
            let decoding = occupant.function.config().decoding(bar.index);
            let was_open = occupant.windows.is_open(bar.index);
            let target = || -> Arc<dyn Target> {
                Arc::new(BarTarget {
                    seat: Arc::clone(seat),
                    bar: bar.index,
                })
            };
            let moved = occupant
                .windows
                .place(bar, decoding, &self.apertures, target);
            match moved {
                Moved::No => {}
                Moved::To(base) => occupant.function.bar_moved(bar.index, Some(base)),
                Moved::Closed => occupant.function.bar_moved(bar.index, None),
            }
            let open = occupant.windows.is_open(bar.index);
            freed |= was_open && moved != Moved::No;
            if !open && matches!(decoding, Decoding::At(_)) {
                self.waiting.store(true, Ordering::Relaxed);
            }
        }
        freed
    }

    /// Space became free: gives every BAR that decodes without a window another try.
    fn settle_waiting(&self) {
        if !self.waiting.swap(false, Ordering::Relaxed) {
            return;
        }
        let seats: Vec<_> = self.functions().values().cloned().collect();
        for seat in seats {
            seat.with(|occupant| self.follow(&seat, occupant));
        }
    }
}

fn fits(offset: u16, len: usize) -> bool {
    let len = u64::try_from(len).unwrap_or(u64::MAX);
    u64::from(offset).saturating_add(len) <= CONFIG_SIZE
}

struct BarTarget {
    seat: Seat,
    bar: u8,
}

impl Target for BarTarget {
    fn read(&self, at: Access, data: &mut [u8]) {
        let read = |o: &mut Occupant| o.function.bar_read(self.bar, at, data);
        if self.seat.with(read).is_none() {
            fill_absent(data);
        }
    }

    fn write(&self, at: Access, data: &[u8]) {
        self.seat.with(|o| o.function.bar_write(self.bar, at, data));
    }
}

impl Plugged {
    /// Where the function is.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// Has the function stop what it does by itself.
    pub fn pause(&self) {
        self.seat.with(|o| o.function.pause());
    }

    /// Has the function go on.
    pub fn resume(&self) {
        self.seat.with(|o| o.function.resume());
    }

    /// Takes the function off its bus and hands it back.
    pub fn unplug(self) -> Option<Box<dyn PciFunction>> {
        self.remove()
    }

    fn remove(&self) -> Option<Box<dyn PciFunction>> {
        let mut functions = self.shared.functions_mut();
        if functions
            .get(&self.bdf)
            .is_some_and(|seat| Arc::ptr_eq(seat, &self.seat))
        {
            functions.remove(&self.bdf);
        }
        drop(functions);
        let occupant = *self.seat.close()?;
        let Occupant {
            mut function,
            windows,
        } = occupant;
        drop(windows);
        let bars: Vec<_> = function.config().bars().collect();
        for bar in bars {
            function.bar_moved(bar.index, None);
        }
        self.shared.settle_waiting();
        Some(function)
    }
}

impl Drop for Plugged {
    fn drop(&mut self) {
        self.remove();
    }
}

#[cfg(test)]
mod tests;
