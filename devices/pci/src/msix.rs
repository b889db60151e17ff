//! MSI-X: the table, the pending bits and the vectors behind them (PCI Local Bus 3.0 §6.8.2).
//!
//! A data path fires a vector by writing its eventfd and never looks at masks. A vector is routed
//! to the guest only while MSI-X is enabled and neither the function nor the vector is masked:
//!
//! ```text
//!              enable=1, function mask=0, vector mask=0
//!   dormant ────────────────────────────────────────────▶ live: eventfd ─▶ guest
//!      ▲ ◀──────────────────────────────────────────────
//!      └ eventfd keeps what is written: that is the pending bit, delivered on the way to live
//! ```
//! So a route costs nothing before the guest unmasks it, and no signal is lost by masking.
//!
//! Called under the function's lock; [`MsixVectors`] is what other threads hold.

use std::sync::Arc;

use testudo_bus::{IrqError, Msi, MsiMessage, MsiVector, fill_absent};

use crate::{Capability, ConfigSpace, LayoutError};

const ENTRY: usize = 16;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
const ENTRY_MASKED: u32 = 1;
/// The most vectors a function can have.
const LIMIT: u16 = 2048;

/// A place inside a BAR. The offset is a multiple of 8.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarOffset {
    /// Which BAR, 0 to 5.
    pub bar: u8,
    /// Offset in bytes.
    pub offset: u32,
}

/// The vectors of one function, for those who fire them; any thread.
#[derive(Clone)]
pub struct MsixVectors(Arc<[Box<dyn MsiVector>]>);

impl MsixVectors {
    /// Vector `index`, if there is one.
    pub fn get(&self, index: u16) -> Option<&dyn MsiVector> {
        self.0.get(usize::from(index)).map(AsRef::as_ref)
    }

    /// Fires vector `index`; a vector that does not exist fires nothing.
    pub fn fire(&self, index: u16) {
        // An eventfd refuses a write only if it is signalled already.
        if let Some(vector) = self.get(index)
            && let Err(e) = vector.eventfd().write(1)
        {
            log::debug!("MSI-X vector {index}: {e}");
        }
    }

    /// How many there are.
    pub fn count(&self) -> u16 {
        u16::try_from(self.0.len()).unwrap_or(u16::MAX)
    }
}

#[derive(Clone, Copy)]
struct Entry {
    bytes: [u8; ENTRY],
    /// What the vector is routed to while it is live.
    live: Option<MsiMessage>,
}

impl Entry {
    fn masked_at_reset() -> Self {
        let mut bytes = [0; ENTRY];
        if let Some(control) = bytes.last_chunk_mut::<4>() {
            *control = ENTRY_MASKED.to_le_bytes();
        }
        Self { bytes, live: None }
    }

    fn message(&self) -> MsiMessage {
        let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, ..] = self.bytes;
        MsiMessage {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            data: u32::from_le_bytes([d0, d1, d2, d3]),
        }
    }

    fn masked(&self) -> bool {
        let [.., c0, c1, c2, c3] = self.bytes;
        u32::from_le_bytes([c0, c1, c2, c3]) & ENTRY_MASKED != 0
    }
}

/// A function's MSI-X state.
pub struct Msix {
    entries: Vec<Entry>,
    vectors: MsixVectors,
    /// Offset of the capability in configuration space; 0 before there is one.
    capability: u16,
    control: u16,
    /// A refused route has been reported; a guest can bring about many.
    refused: bool,
}

impl Msix {
    /// `count` vectors (1 to 2048), all masked, from `msi`, whose eventfds must be non-blocking.
    pub fn new(count: u16, msi: &dyn Msi) -> Result<Self, IrqError> {
        let count = count.clamp(1, LIMIT);
        let vectors: Result<Vec<_>, _> = (0..count).map(|_| msi.vector()).collect();
        Ok(Self {
            entries: vec![Entry::masked_at_reset(); usize::from(count)],
            vectors: MsixVectors(vectors?.into()),
            capability: 0,
            control: 0,
            refused: false,
        })
    }

    /// Bytes of the table.
    pub fn table_len(&self) -> u64 {
        u64::from(self.vectors.count()).saturating_mul(16)
    }

    /// Bytes of the pending-bit array.
    pub fn pba_len(&self) -> u64 {
        u64::from(self.vectors.count().div_ceil(64)).saturating_mul(8)
    }

    /// What fires the vectors.
    pub fn vectors(&self) -> MsixVectors {
        self.vectors.clone()
    }

    /// Announces the table at `table` and the pending bits at `pba` in `config`.
    pub fn add_capability(
        &mut self,
        config: &mut ConfigSpace,
        table: BarOffset,
        pba: BarOffset,
    ) -> Result<(), LayoutError> {
        let place = |at: BarOffset| ((at.offset & !7) | u32::from(at.bar & 7)).to_le_bytes();
        let size = self.vectors.count().saturating_sub(1);
        let mut body = size.to_le_bytes().to_vec();
        body.extend(place(table));
        body.extend(place(pba));
        let writable = (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes();
        self.capability = config.add_capability(&Capability {
            id: Capability::MSIX,
            body,
            writable: writable.to_vec(),
        })?;
        Ok(())
    }

    /// To be called after every configuration write: takes up a changed message control.
    pub fn config_written(&mut self, config: &ConfigSpace) {
        if self.capability == 0 {
            return;
        }
        let control = config.get_u16(self.capability.saturating_add(2))
            & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        if std::mem::replace(&mut self.control, control) != control {
            for index in 0..self.vectors.count() {
                self.settle(index);
            }
        }
    }

    /// A read of the table. Widths other than aligned 4 and 8 read all-ones.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        let Some((index, start)) = locate(offset, data.len()) else {
            return fill_absent(data);
        };
        let entry = self.entries.get(usize::from(index));
        match entry.and_then(|e| e.bytes.get(start..)?.get(..data.len())) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => fill_absent(data),
        }
    }

    /// A write to the table. Widths other than aligned 4 and 8 are ignored.
    pub fn table_write(&mut self, offset: u64, data: &[u8]) {
        let Some((index, start)) = locate(offset, data.len()) else {
            return;
        };
        let entry = self.entries.get_mut(usize::from(index));
        let Some(bytes) = entry.and_then(|e| e.bytes.get_mut(start..)?.get_mut(..data.len()))
        else {
            return;
        };
        bytes.copy_from_slice(data);
        self.settle(index);
    }

    /// A read of the pending-bit array, same widths as the table; writes have no effect.
    pub fn pba_read(&self, offset: u64, data: &mut [u8]) {
        if locate(offset, data.len()).is_none() || offset >= self.pba_len() {
            return fill_absent(data);
        }
        let first = offset.saturating_mul(8);
        for (byte_index, byte) in (0_u64..).zip(data) {
            let base = first.saturating_add(byte_index.saturating_mul(8));
            *byte = (0..8_u8)
                .filter(|bit| self.pending(base.saturating_add(u64::from(*bit))))
                .fold(0, |bits, bit| bits | (1 << bit));
        }
    }

    /// Back to the state after power-on: disabled, every vector masked. What was pending is gone.
    pub fn reset(&mut self) {
        self.control = 0;
        for index in 0..self.vectors.count() {
            if let Some(entry) = self.entries.get_mut(usize::from(index)) {
                entry.bytes = Entry::masked_at_reset().bytes;
            }
            self.settle(index);
            if let Some(vector) = self.vectors.get(index) {
                let _ = vector.eventfd().read();
            }
        }
    }

    fn pending(&self, index: u64) -> bool {
        let Ok(index) = u16::try_from(index) else {
            return false;
        };
        let dormant = self
            .entries
            .get(usize::from(index))
            .is_some_and(|e| e.live.is_none());
        let Some(vector) = self.vectors.get(index).filter(|_| dormant) else {
            return false;
        };
        // Nobody else reads the eventfd of a dormant vector, so taking the count and putting it
        // back loses nothing.
        match vector.eventfd().read() {
            Ok(count) => {
                let _ = vector.eventfd().write(count);
                true
            }
            Err(_) => false,
        }
    }

    /// Brings one vector in step with its entry and the message control.
    fn settle(&mut self, index: u16) {
        let open = self.control & CONTROL_ENABLE != 0 && self.control & CONTROL_FUNCTION_MASK == 0;
        let entry = self.entries.get_mut(usize::from(index));
        let (Some(entry), Some(vector)) = (entry, self.vectors.get(index)) else {
            return;
        };
        let wanted = (open && !entry.masked()).then(|| entry.message());
        if entry.live == wanted {
            return;
        }
        match wanted {
            Some(message) => match vector.enable(message) {
                Ok(()) => entry.live = wanted,
                Err(e) => {
                    if !std::mem::replace(&mut self.refused, true) {
                        log::warn!("MSI-X vector {index} stays silent: {e}");
                    }
                    vector.disable();
                    entry.live = None;
                }
            },
            None => {
                vector.disable();
                entry.live = None;
            }
        }
    }
}

/// Entry and byte within it of an access the specification defines: 4 or 8 bytes, aligned.
fn locate(offset: u64, len: usize) -> Option<(u16, usize)> {
    let width = u64::try_from(len).ok()?;
    if !(width == 4 || width == 8) || offset & (width.wrapping_sub(1)) != 0 {
        return None;
    }
    let index = u16::try_from(offset / 16).ok()?;
    let start = usize::try_from(offset % 16).ok()?;
    Some((index, start))
}

#[cfg(test)]
mod tests;
