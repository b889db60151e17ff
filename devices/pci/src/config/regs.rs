//! Offsets and bits of the type 0 header (PCI Local Bus 3.0 §6.1).
#![allow(missing_docs, reason = "the names are the specification's")]

pub const VENDOR_ID: u16 = 0x00;
pub const DEVICE_ID: u16 = 0x02;
pub const COMMAND: u16 = 0x04;
pub const STATUS: u16 = 0x06;
pub const REVISION: u16 = 0x08;
pub const CLASS: u16 = 0x09;
pub const CACHE_LINE_SIZE: u16 = 0x0c;
pub const HEADER_TYPE: u16 = 0x0e;
pub const BAR0: u16 = 0x10;
pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
pub const SUBSYSTEM_ID: u16 = 0x2e;
pub const CAPABILITIES: u16 = 0x34;
pub const INTERRUPT_LINE: u16 = 0x3c;
pub const INTERRUPT_PIN: u16 = 0x3d;
/// First byte after the header.
pub const HEADER_END: u16 = 0x40;
/// First byte of extended configuration space.
pub const EXTENDED: u16 = 0x100;

pub const COMMAND_MEMORY: u16 = 1 << 1;
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
pub const COMMAND_PARITY: u16 = 1 << 6;
pub const COMMAND_SERR: u16 = 1 << 8;
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;

pub const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Error bits, cleared by writing 1.
pub const STATUS_ERRORS: u16 = 0xf900;

pub const HEADER_MULTI_FUNCTION: u8 = 1 << 7;

/// Low bits of a memory BAR that are flags, not address.
pub const BAR_FLAGS: u32 = 0xf;
pub const BAR_WIDE: u32 = 0b100;
pub const BAR_PREFETCHABLE: u32 = 0b1000;

/// Offset of BAR `index`; `None` past the last.
pub const fn bar(index: u8) -> Option<u16> {
    match index {
        0 => Some(BAR0),
        1 => Some(0x14),
        2 => Some(0x18),
        3 => Some(0x1c),
        4 => Some(0x20),
        5 => Some(0x24),
        _ => None,
    }
}
