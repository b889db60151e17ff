//! Base address registers and the windows they open on the MMIO bus.
//!
//! ```text
//!   command.memory=0 ─────────────▶ Off    window closed
//!   address programmed ───────────▶ At(a)  window at a, if a lies in an aperture and is free;
//!                                          else closed: the guest reads all-ones there
//!   all-ones written to a half ───▶ Held   the guest is sizing: window stays as it was
//! ```
//! No address a guest can write is an error: a BAR that cannot have its window waits without one,
//! and gets it when the space becomes free or the guest moves it (a move to 0 is an ordinary case).

use testudo_bus::{Bus, Mapping, Range, Target};
use thiserror::Error;

use crate::config::regs;

use std::sync::Arc;

/// How many BARs a type 0 header has; a 64-bit BAR takes two.
pub const BAR_COUNT: u8 = 6;

/// The smallest memory BAR: its flags take the low four bits.
const SMALLEST: u64 = 16;
const LARGEST_NARROW: u64 = 1 << 31;

/// One memory BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Which one, 0 to 5; a 64-bit BAR also takes the next.
    pub index: u8,
    /// Size in bytes, a power of two.
    pub size: u64,
    /// 64-bit.
    pub wide: bool,
    /// Reads have no side effect and writes may be merged.
    pub prefetchable: bool,
}

/// A BAR that PCI does not know.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BarError {
    /// No such register, or it belongs to another BAR already.
    #[error(
        "BAR {index} is taken or does not exist; there are {BAR_COUNT} registers, a 64-bit BAR takes two"
    )]
    Index {
        /// The register asked for.
        index: u8,
    },
    /// Not a size a BAR can have.
    #[error(
        "BAR {index} cannot have {size:#x} bytes: use a power of two from 16 bytes, to 2 GiB for a 32-bit BAR"
    )]
    Size {
        /// The register.
        index: u8,
        /// The size asked for.
        size: u64,
    },
}

/// What a BAR decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decoding {
    /// Nothing.
    Off,
    /// What it decoded before: the guest is in the middle of sizing it.
    Held,
    /// Its size from this address.
    At(u64),
}

/// The BARs of one configuration space and whether a sizing write is pending on each register.
#[derive(Default)]
pub(crate) struct BarRegisters {
    bars: [Option<Bar>; 6],
    /// What the guest last wrote to each register, bits the register ignores included.
    written: [[u8; 4]; 6],
}

/// How one BAR register is laid out.
pub(crate) struct Register {
    pub(crate) offset: u16,
    pub(crate) flags: u32,
    pub(crate) mask: u32,
}

impl BarRegisters {
    pub(crate) fn get(&self, index: u8) -> Option<Bar> {
        *self.bars.get(usize::from(index))?
    }

    fn taken(&self, index: u8) -> bool {
        let below = index.checked_sub(1).and_then(|below| self.get(below));
        self.get(index).is_some() || below.is_some_and(|bar| bar.wide)
    }

    pub(crate) fn add(&mut self, bar: Bar) -> Result<[Register; 2], BarError> {
        let Bar { index, size, .. } = bar;
        if !size.is_power_of_two() || size < SMALLEST || (!bar.wide && size > LARGEST_NARROW) {
            return Err(BarError::Size { index, size });
        }
        let next = index.saturating_add(1);
        let (Some(low), false) = (regs::bar(index), self.taken(index)) else {
            return Err(BarError::Index { index });
        };
        let high = match (bar.wide, regs::bar(next)) {
            (false, _) => 0,
            (true, Some(high)) if !self.taken(next) => high,
            _ => return Err(BarError::Index { index }),
        };
        let Some(place) = self.bars.get_mut(usize::from(index)) else {
            return Err(BarError::Index { index });
        };
        *place = Some(bar);
        let mut flags = 0;
        if bar.wide {
            flags |= regs::BAR_WIDE;
        }
        if bar.prefetchable {
            flags |= regs::BAR_PREFETCHABLE;
        }
        let [b0, b1, b2, b3, b4, b5, b6, b7] = size.wrapping_neg().to_le_bytes();
        Ok([
            Register {
                offset: low,
                flags,
                mask: u32::from_le_bytes([b0, b1, b2, b3]),
            },
            Register {
                offset: high,
                flags: 0,
                mask: u32::from_le_bytes([b4, b5, b6, b7]),
            },
        ])
    }

    /// Notes a guest's write, to tell sizing from placing.
    pub(crate) fn written(&mut self, offset: u16, data: &[u8]) {
        let cells = self.written.as_flattened_mut();
        for (at, byte) in (offset..).zip(data) {
            let cell = at.checked_sub(regs::BAR0).map(usize::from);
            if let Some(cell) = cell.and_then(|cell| cells.get_mut(cell)) {
                *cell = *byte;
            }
        }
    }

    pub(crate) fn being_sized(&self, index: u8) -> bool {
        let ones = |index: u8| self.written.get(usize::from(index)) == Some(&[0xff; 4]);
        let wide = self.get(index).is_some_and(|bar| bar.wide);
        ones(index) || (wide && ones(index.saturating_add(1)))
    }
}

/// Where BARs may be: the host bridge's memory windows.
pub(crate) struct Apertures {
    pub(crate) mmio: Bus,
    pub(crate) ranges: Vec<Range>,
}

impl Apertures {
    pub(crate) fn contain(&self, wanted: &Range) -> bool {
        self.ranges
            .iter()
            .any(|a| a.base() <= wanted.base() && wanted.last() <= a.last())
    }
}

/// The windows one function has open.
#[derive(Default)]
pub(crate) struct Windows {
    open: [Option<Mapping>; 6],
}

/// What bringing one window in step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moved {
    /// Nothing changed.
    No,
    /// The window is now here.
    To(u64),
    /// The window is closed.
    Closed,
}

impl Windows {
    /// Brings BAR `bar`'s window in step with `decoding`.
    pub(crate) fn place(
        &mut self,
        bar: Bar,
        decoding: Decoding,
        apertures: &Apertures,
        target: impl FnOnce() -> Arc<dyn Target>,
    ) -> Moved {
        let Some(open) = self.open.get_mut(usize::from(bar.index)) else {
            return Moved::No;
        };
        let wanted = match decoding {
            Decoding::Held => return Moved::No,
            Decoding::Off => None,
            Decoding::At(base) => Range::new(base, bar.size).filter(|r| apertures.contain(r)),
        };
        let Some(wanted) = wanted else {
            return match open.take() {
                Some(_) => Moved::Closed,
                None => Moved::No,
            };
        };
        match open {
            Some(window) if window.range() == wanted => Moved::No,
            Some(window) => match window.relocate(wanted.base()) {
                Ok(()) => Moved::To(wanted.base()),
                Err(_) => {
                    *open = None;
                    Moved::Closed
                }
            },
            None => match apertures.mmio.map(wanted, target()) {
                Ok(window) => {
                    *open = Some(window);
                    Moved::To(wanted.base())
                }
                Err(_) => Moved::No,
            },
        }
    }

    pub(crate) fn is_open(&self, index: u8) -> bool {
        self.open
            .get(usize::from(index))
            .is_some_and(Option::is_some)
    }
}
