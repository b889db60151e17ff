//! Configuration space as data: a register file with write masks.
//!
//! Each byte has a mask of the bits the guest may write and a mask of the bits it clears by
//! writing 1. BARs are registers whose address bits are writable, so the sizing protocol (PCI
//! Local Bus 3.0 §6.2.5.1) and accesses of any width and alignment need no special case. The
//! first 256 bytes always exist; the extended 3840 appear with the first extended capability and
//! read as zero before (an empty list, PCIe 6.0 §7.9.1).
//!
//! Owned by one [`PciFunction`](crate::PciFunction) and touched under its lock only.

mod layout;
pub mod regs;

pub use layout::{ClassCode, Identity, LayoutError};

use crate::bar::{BarRegisters, Decoding};
use crate::{BAR_COUNT, Bar};

const CONVENTIONAL: usize = 256;
const EXTENDED: usize = 4096;

/// One function's configuration registers.
pub struct ConfigSpace {
    cells: Vec<Cell>,
    bars: BarRegisters,
    /// Where the offset of the next capability is to be linked from, and the next free byte.
    list: layout::Cursor,
    extended: layout::Cursor,
}

#[derive(Clone, Copy, Default)]
struct Cell {
    value: u8,
    writable: u8,
    clears: u8,
}

impl ConfigSpace {
    /// Reads `data.len()` bytes from `offset`; what is not implemented reads as zero.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let cells = self.cells.iter().skip(usize::from(offset)).map(|c| c.value);
        for (byte, value) in data.iter_mut().zip(cells.chain(std::iter::repeat(0))) {
            *byte = value;
        }
    }

    /// A guest's write: changes the writable bits, clears the write-1-to-clear bits.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let cells = self.cells.iter_mut().skip(usize::from(offset));
        for (cell, byte) in cells.zip(data) {
            cell.value = (cell.value & !cell.writable) | (byte & cell.writable);
            cell.value &= !(byte & cell.clears);
        }
        self.bars.written(offset, data);
    }

    /// The device's own view: one byte, zero where nothing is implemented.
    pub fn get_u8(&self, offset: u16) -> u8 {
        let mut data = [0; 1];
        self.read(offset, &mut data);
        u8::from_le_bytes(data)
    }

    /// The device's own view: 16 bits.
    pub fn get_u16(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// The device's own view: 32 bits.
    pub fn get_u32(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// The device changes a register of its own, whatever the guest may write to it.
    pub fn set(&mut self, offset: u16, data: &[u8]) {
        let cells = self.cells.iter_mut().skip(usize::from(offset));
        for (cell, byte) in cells.zip(data) {
            cell.value = *byte;
        }
    }

    /// The BARs this function has, lowest first.
    pub fn bars(&self) -> impl Iterator<Item = Bar> + '_ {
        (0..BAR_COUNT).filter_map(|index| self.bars.get(index))
    }

    /// The address in BAR `index`, whether or not it decodes; `None` if there is no such BAR.
    pub fn bar_address(&self, index: u8) -> Option<u64> {
        let bar = self.bars.get(index)?;
        let low = u64::from(self.get_u32(regs::bar(index)?)) & !u64::from(regs::BAR_FLAGS);
        if !bar.wide {
            return Some(low);
        }
        let high = self.get_u32(regs::bar(index.checked_add(1)?)?);
        Some((u64::from(high) << 32) | low)
    }

    /// What BAR `index` decodes now.
    pub fn decoding(&self, index: u8) -> Decoding {
        if self.get_u16(regs::COMMAND) & regs::COMMAND_MEMORY == 0 {
            return Decoding::Off;
        }
        match self.bar_address(index) {
            Some(_) if self.bars.being_sized(index) => Decoding::Held,
            Some(address) => Decoding::At(address),
            None => Decoding::Off,
        }
    }

    /// `true` if the guest lets the function start DMA and send MSIs.
    pub fn bus_master(&self) -> bool {
        self.get_u16(regs::COMMAND) & regs::COMMAND_BUS_MASTER != 0
    }
}

#[cfg(test)]
mod tests;
