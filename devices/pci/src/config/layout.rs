//! Laying out a configuration space before the guest sees it.

use thiserror::Error;

use super::{CONVENTIONAL, Cell, ConfigSpace, EXTENDED, regs};
use crate::bar::{Bar, BarError, BarRegisters};
use crate::capability::Capability;

/// Base class, subclass and programming interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClassCode {
    /// Base class.
    pub base: u8,
    /// Subclass.
    pub sub: u8,
    /// Programming interface.
    pub interface: u8,
}

/// What a function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class code.
    pub class: ClassCode,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// A device asked for a configuration space that cannot be.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LayoutError {
    /// The capabilities together are larger than the space for them.
    #[error("capability {id:#x} of {size} bytes does not fit: {free} bytes are left")]
    Full {
        /// Capability id.
        id: u16,
        /// Its size in bytes.
        size: usize,
        /// Bytes left.
        free: usize,
    },
    /// The BAR is not one PCI knows.
    #[error(transparent)]
    Bar(#[from] BarError),
}

/// The growing end of a capability list.
pub(super) struct Cursor {
    /// Where the next capability's offset is to be written.
    link: u16,
    free: u16,
    end: u16,
}

impl Cursor {
    fn take(&mut self, id: u16, size: usize) -> Result<u16, LayoutError> {
        let at = self.free;
        let free = usize::from(self.end.saturating_sub(at));
        let full = LayoutError::Full { id, size, free };
        // Capabilities are aligned to four bytes.
        let next = size
            .checked_next_multiple_of(4)
            .and_then(|size| u16::try_from(size).ok())
            .and_then(|size| at.checked_add(size))
            .filter(|next| *next <= self.end);
        let Some(next) = next else {
            return Err(full);
        };
        self.free = next;
        Ok(at)
    }
}

impl ConfigSpace {
    /// A type 0 header with `identity`, no BARs and no capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            cells: vec![Cell::default(); CONVENTIONAL],
            bars: BarRegisters::default(),
            list: Cursor {
                link: regs::CAPABILITIES,
                free: regs::HEADER_END,
                end: regs::EXTENDED,
            },
            extended: Cursor {
                link: 0,
                free: regs::EXTENDED,
                end: 0x1000,
            },
        };
        let class = identity.class;
        space.set(regs::VENDOR_ID, &identity.vendor.to_le_bytes());
        space.set(regs::DEVICE_ID, &identity.device.to_le_bytes());
        space.set(regs::REVISION, &[identity.revision]);
        space.set(regs::CLASS, &[class.interface, class.sub, class.base]);
        space.set(
            regs::SUBSYSTEM_VENDOR_ID,
            &identity.subsystem_vendor.to_le_bytes(),
        );
        space.set(regs::SUBSYSTEM_ID, &identity.subsystem.to_le_bytes());
        let command = regs::COMMAND_MEMORY
            | regs::COMMAND_BUS_MASTER
            | regs::COMMAND_PARITY
            | regs::COMMAND_SERR
            | regs::COMMAND_INTX_DISABLE;
        space.allow(regs::COMMAND, &command.to_le_bytes());
        space.clear_on_one(regs::STATUS, &regs::STATUS_ERRORS.to_le_bytes());
        space.allow(regs::CACHE_LINE_SIZE, &[0xff]);
        space.allow(regs::INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Gives the guest the set bits of `mask`, from `offset`, to write.
    pub fn allow(&mut self, offset: u16, mask: &[u8]) {
        let cells = self.cells.iter_mut().skip(usize::from(offset));
        for (cell, bits) in cells.zip(mask) {
            cell.writable |= bits;
        }
    }

    /// Lets the guest clear the set bits of `mask`, from `offset`, by writing 1.
    pub fn clear_on_one(&mut self, offset: u16, mask: &[u8]) {
        let cells = self.cells.iter_mut().skip(usize::from(offset));
        for (cell, bits) in cells.zip(mask) {
            cell.clears |= bits;
        }
    }

    /// Wires the function to interrupt pin `pin` (1 is INTA).
    pub fn set_interrupt_pin(&mut self, pin: u8) {
        self.set(regs::INTERRUPT_PIN, &[pin]);
    }

    /// Adds a BAR. It holds address 0 until somebody places it.
    pub fn add_bar(&mut self, bar: Bar) -> Result<(), LayoutError> {
        let [low, high] = self.bars.add(bar)?;
        self.set(low.offset, &low.flags.to_le_bytes());
        self.allow(low.offset, &low.mask.to_le_bytes());
        if bar.wide {
            self.allow(high.offset, &high.mask.to_le_bytes());
        }
        Ok(())
    }

    /// Appends a capability to the list; returns its offset.
    pub fn add_capability(&mut self, capability: &Capability) -> Result<u16, LayoutError> {
        let size = capability.body.len().saturating_add(2);
        let at = self.list.take(u16::from(capability.id), size)?;
        let body = at.saturating_add(2);
        self.set(at, &[capability.id, 0]);
        self.set(body, &capability.body);
        self.allow(body, &capability.writable);
        let [low, _] = at.to_le_bytes();
        self.set(self.list.link, &[low]);
        self.list.link = at.saturating_add(1);
        let status = self.get_u16(regs::STATUS) | regs::STATUS_CAPABILITIES;
        self.set(regs::STATUS, &status.to_le_bytes());
        Ok(at)
    }

    /// Appends an extended capability (PCIe 6.0 §7.9.3); returns its offset. `body` follows the
    /// four bytes of the header; `writable` is its write mask.
    pub fn add_extended_capability(
        &mut self,
        id: u16,
        version: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u16, LayoutError> {
        let at = self.extended.take(id, body.len().saturating_add(4))?;
        self.cells.resize(EXTENDED, Cell::default());
        let header = u32::from(id) | (u32::from(version & 0xf) << 16);
        let start = at.saturating_add(4);
        self.set(at, &header.to_le_bytes());
        self.set(start, body);
        self.allow(start, writable);
        if self.extended.link != 0 {
            let previous = self.get_u32(self.extended.link);
            let linked = (previous & 0x000f_ffff) | (u32::from(at) << 20);
            self.set(self.extended.link, &linked.to_le_bytes());
        }
        self.extended.link = at;
        Ok(at)
    }
}
