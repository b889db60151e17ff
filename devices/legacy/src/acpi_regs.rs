//! The block of I/O ports behind hardware-reduced ACPI: sleep, reset and the GED's event word.
//!
//! | offset | width | register | effect |
//! |---|---|---|---|
//! | 0 | 1 | SLEEP_CONTROL (ACPI 6.5 §4.8.3.7) | `SLP_EN` with `SLP_TYP` 5 powers off |
//! | 1 | 1 | SLEEP_STATUS | `WAK_STS`, written 1 to clear |
//! | 2 | 1 | RESET (FADT `RESET_REG`) | value 1 resets |
//! | 4–7 | 4 | GED pending events | what is read is cleared |
//!
//! The control thread raises events through a [`GedHandle`]; the guest's GED handler (AML) reads
//! the word on the interrupt. A bit is set before the edge, and a read takes the bits atomically,
//! so an event raised while the handler runs brings a new edge and is never lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use testudo_bus::{Access, Device, GuestEvent, IrqLine, Mailbox};

/// Bits of the GED's pending-event word.
pub mod ged {
    /// The power button was pressed.
    pub const POWER_BUTTON: u32 = 1 << 0;
    /// A CPU came or wants to go.
    pub const CPU: u32 = 1 << 1;
    /// Memory came or wants to go.
    pub const MEMORY: u32 = 1 << 2;
    /// A PCI function came or wants to go.
    pub const PCI: u32 = 1 << 3;
}

/// Value that powers off through SLEEP_CONTROL: the first element of the `\_S5` package.
pub const SLP_TYP_S5: u8 = 5;
/// Value that resets through the RESET register: the FADT's `RESET_VALUE`.
pub const RESET_VALUE: u8 = 1;

const SLP_EN: u8 = 1 << 5;
const SLP_TYP_SHIFT: u32 = 2;
const SLP_TYP_MASK: u8 = 0b111;
const WAK_STS: u8 = 1 << 7;

/// The register block. Offsets are public so that the tables can name them.
pub struct AcpiRegisters {
    mailbox: Arc<dyn Mailbox>,
    pending: Arc<AtomicU32>,
    status: u8,
}

/// Raises GED events; any thread, never blocks.
#[derive(Clone)]
pub struct GedHandle {
    pending: Arc<AtomicU32>,
    line: Arc<dyn IrqLine>,
}

impl GedHandle {
    /// Adds `bits` (see [`ged`]) to the pending events and delivers the interrupt.
    pub fn raise(&self, bits: u32) {
        self.pending.fetch_or(bits, Ordering::SeqCst);
        self.line.trigger();
    }
}

impl AcpiRegisters {
    /// Bytes of the port range.
    pub const LEN: u64 = 16;
    /// Offset of SLEEP_CONTROL.
    pub const SLEEP_CONTROL: u64 = 0;
    /// Offset of SLEEP_STATUS.
    pub const SLEEP_STATUS: u64 = 1;
    /// Offset of RESET.
    pub const RESET: u64 = 2;
    /// Offset of the pending-event word.
    pub const GED_EVENTS: u64 = 4;

    /// The block, and the handle that raises GED events on `line`.
    pub fn new(mailbox: Arc<dyn Mailbox>, line: Arc<dyn IrqLine>) -> (Self, GedHandle) {
        let pending = Arc::new(AtomicU32::new(0));
        let handle = GedHandle {
            pending: Arc::clone(&pending),
            line,
        };
        let block = Self {
            mailbox,
            pending,
            status: 0,
        };
        (block, handle)
    }

    fn read_byte(&mut self, offset: u64) -> u8 {
        match offset {
            Self::SLEEP_STATUS => self.status,
            Self::GED_EVENTS..=7 => {
                let lane = u32::try_from(offset & 3).unwrap_or(0) << 3;
                let byte = 0xff_u32.wrapping_shl(lane);
                let taken = self.pending.fetch_and(!byte, Ordering::SeqCst) & byte;
                let [low, ..] = taken.wrapping_shr(lane).to_le_bytes();
                low
            }
            _ => 0,
        }
    }

    fn write_byte(&mut self, offset: u64, value: u8) {
        match offset {
            Self::SLEEP_CONTROL => {
                let sleep_type = (value >> SLP_TYP_SHIFT) & SLP_TYP_MASK;
                if value & SLP_EN != 0 && sleep_type == SLP_TYP_S5 {
                    self.mailbox.post(GuestEvent::PowerOff);
                }
            }
            Self::SLEEP_STATUS => self.status &= !(value & WAK_STS),
            Self::RESET if value == RESET_VALUE => self.mailbox.post(GuestEvent::Reset),
            _ => {}
        }
    }
}

impl Device for AcpiRegisters {
    fn read(&mut self, at: Access, data: &mut [u8]) {
        if at.offset == Self::GED_EVENTS
            && let Ok(word) = <&mut [u8; 4]>::try_from(&mut *data)
        {
            *word = self.pending.swap(0, Ordering::SeqCst).to_le_bytes();
            return;
        }
        for (offset, byte) in (at.offset..).zip(data) {
            *byte = self.read_byte(offset);
        }
    }

    fn write(&mut self, at: Access, data: &[u8]) {
        for (offset, byte) in (at.offset..).zip(data) {
            self.write_byte(offset, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Edges, Letters, read, write};

    fn block() -> (AcpiRegisters, GedHandle, Arc<Letters>, Arc<Edges>) {
        let (letters, edges) = (Letters::new(), Edges::new());
        let (block, handle) = AcpiRegisters::new(letters.clone(), edges.clone());
        (block, handle, letters, edges)
    }

    #[test]
    fn only_s5_with_enable_powers_off() {
        let (mut regs, _, letters, _) = block();
        for value in 0..=0xff_u8 {
            write(&mut regs, AcpiRegisters::SLEEP_CONTROL, value);
            let wanted = value & SLP_EN != 0 && (value >> 2) & 7 == 5;
            assert_eq!(
                letters.take() == [GuestEvent::PowerOff],
                wanted,
                "{value:#x}"
            );
        }
    }

    #[test]
    fn reset_takes_its_value_only() {
        let (mut regs, _, letters, _) = block();
        write(&mut regs, AcpiRegisters::RESET, 0xff);
        assert!(letters.take().is_empty());
        write(&mut regs, AcpiRegisters::RESET, RESET_VALUE);
        assert_eq!(letters.take(), [GuestEvent::Reset]);
    }

    #[test]
    fn pending_events_are_cleared_by_the_read_that_saw_them() {
        let (mut regs, handle, _, edges) = block();
        handle.raise(ged::CPU);
        handle.raise(ged::PCI);
        assert_eq!(edges.count(), 2);
        let mut word = [0; 4];
        let at = Access { offset: 4 };
        regs.read(at, &mut word);
        assert_eq!(u32::from_le_bytes(word), ged::CPU | ged::PCI);
        regs.read(at, &mut word);
        assert_eq!(word, [0; 4]);

        handle.raise(ged::POWER_BUTTON | 0x0300);
        assert_eq!(read(&mut regs, 4), 1);
        assert_eq!(read(&mut regs, 4), 0);
        assert_eq!(read(&mut regs, 5), 3, "the other lanes keep their bits");
    }

    #[test]
    fn every_offset_and_width_answers() {
        let (mut regs, _, _, _) = block();
        for offset in 0..AcpiRegisters::LEN {
            for width in [1, 2, 4] {
                let mut data = vec![0xff; width];
                regs.read(Access { offset }, &mut data);
                regs.write(Access { offset }, &data);
            }
        }
    }
}
