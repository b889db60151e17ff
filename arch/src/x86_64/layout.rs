//! The fixed addresses, ports and interrupt lines of the machine; [`super::map`] places RAM and
//! windows among them.
//!
//! ```text
//! 0                       low RAM                                  up to 2 GiB
//! 0x8000_0000             32-bit PCI window, 1.5 GiB               ┐
//! 0xe000_0000             ECAM, 256 MiB: segment 0, buses 0–255    │ the 32-bit hole:
//! 0xfe00_0000             platform devices, 1 MiB                  │ uncacheable
//! 0xfec0_0000             IOAPIC                                   │
//! 0xfee0_0000             LAPIC and MSI                            │
//! 0xfffb_c000             KVM's identity map page and TSS          ┘
//! 4 GiB                   high RAM
//! next GiB boundary       room for hot-plugged RAM (may be empty)
//! next GiB boundary       64-bit PCI window, up to 2^guest_phys_bits
//! ```
//!
//! The hole starts at 2 GiB whatever the RAM size: one naturally aligned power of two, so that
//! one MTRR pair describes it and a BAR of 1 GiB fits below 4 GiB.

use crate::Span;

pub(super) const KIB: u64 = 1 << 10;
pub(super) const MIB: u64 = 1 << 20;
pub(super) const GIB: u64 = 1 << 30;
pub(super) const FOUR_GIB: u64 = 4 * GIB;

/// Least RAM a guest may have.
pub const RAM_MIN: u64 = 32 * MIB;
/// Most RAM a guest may have at boot.
pub const RAM_MAX: u64 = 1 << 40;
/// RAM sizes are multiples of this, so that huge pages can back all of it.
pub const RAM_GRANULE: u64 = 2 * MIB;
/// RAM below 4 GiB ends here at the latest; the 32-bit hole starts here.
pub const LOW_RAM_MAX: u64 = 2 * GIB;
/// Addresses that are never RAM below 4 GiB: uncacheable.
pub const MMIO_HOLE: Span = Span {
    base: LOW_RAM_MAX,
    size: FOUR_GIB - LOW_RAM_MAX,
};
/// Memory window of the PCI host bridge for 32-bit BARs.
pub const MMIO32: Span = Span {
    base: 0x8000_0000,
    size: 0x6000_0000,
};
/// PCI Express enhanced configuration space: segment 0, 256 buses.
pub const ECAM: Span = Span {
    base: 0xe000_0000,
    size: 256 * MIB,
};
/// Registers of platform devices that are not PCI.
pub const PLATFORM: Span = Span {
    base: 0xfe00_0000,
    size: MIB,
};
/// The IOAPIC's registers (KVM emulates it here).
pub const IOAPIC: Span = Span {
    base: 0xfec0_0000,
    size: 4 * KIB,
};
/// The LAPIC page and the MSI address window.
pub const LAPIC: Span = Span {
    base: 0xfee0_0000,
    size: MIB,
};
/// Where KVM keeps the page table it uses for guests in real mode on older Intel CPUs.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Where KVM keeps the three TSS pages it needs for the same reason.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// End of the RAM that starts at 0: the extended BIOS data area and the legacy video and ROM
/// windows follow, up to 1 MiB.
pub const LEGACY_HOLE: Span = Span {
    base: 0x9_fc00,
    size: MIB - 0x9_fc00,
};
/// Where a PC has its firmware, and a kernel looks for the RSDP (ACPI 6.5 §5.2.5.1). Reserved.
pub const ACPI_AREA: Span = Span {
    base: 0xe_0000,
    size: 0x1_fff0,
};
/// Where a processor would start the firmware: f000:fff0 in real mode.
pub const RESET_VECTOR: u64 = 0xf_fff0;

/// Global descriptor table at boot.
pub const GDT: u64 = 0x500;
/// PVH `hvm_start_info`, with its module list and memory map behind it, one page in all.
pub const PVH_START_INFO: Span = Span {
    base: 0x6000,
    size: 0x1000,
};
/// The Linux zero page (`struct boot_params`).
pub const ZERO_PAGE: Span = Span {
    base: 0x7000,
    size: 0x1000,
};
/// Top of the stack a kernel finds at its 64-bit entry.
pub const BOOT_STACK_TOP: u64 = 0x8ff0;
/// Page tables at boot.
pub const PAGE_TABLES: Span = Span {
    base: 0x9000,
    size: 0x6000,
};
/// The command line, with its terminating zero.
pub const CMDLINE: Span = Span {
    base: 0x2_0000,
    size: 64 * KIB,
};
/// Kernels and initial RAM disks go at or above this address.
pub const HIGH_MEMORY: u64 = MIB;

/// Fixed I/O ports.
pub mod port {
    /// i8042 data port; the command and status port is at +4. Only the reset command works.
    pub const I8042: u16 = 0x60;
    /// CMOS RTC: index; data at +1.
    pub const CMOS: u16 = 0x70;
    /// Debug (POST code) port.
    pub const DEBUG: u16 = 0x80;
    /// First serial port, a 16550: eight ports.
    pub const SERIAL: u16 = 0x3f8;
    /// Ports of the serial device.
    pub const SERIAL_SIZE: u16 = 8;
    /// pvpanic: one 8-bit port.
    pub const PVPANIC: u16 = 0x505;
    /// ACPI register block; the registers below lie in it.
    pub const ACPI: u16 = 0x600;
    /// Ports of the ACPI register block.
    pub const ACPI_SIZE: u16 = 16;
    /// SLEEP_CONTROL_REG, 8-bit, read and write: SLP_EN is bit 5, SLP_TYP bits 4:2
    /// (ACPI 6.5 §4.8.3.7). Writing SLP_EN with [`super::S5_SLEEP_TYPE`] powers the machine off.
    pub const SLEEP_CONTROL: u16 = ACPI;
    /// SLEEP_STATUS_REG, 8-bit: WAK_STS is bit 7, write 1 to clear; reads 0 here.
    pub const SLEEP_STATUS: u16 = ACPI + 1;
    /// RESET_REG, 8-bit: writing [`super::RESET_VALUE`] resets the machine.
    pub const RESET: u16 = ACPI + 2;
    /// Pending events of the generic event device, 32-bit, cleared by reading: the bits are in
    /// [`super::ged_event`].
    pub const GED_EVENTS: u16 = ACPI + 4;
    /// PCI configuration mechanism 1: address, then data at +4.
    pub const PCI_CONFIG: u16 = 0xcf8;
    /// Ports of PCI configuration mechanism 1.
    pub const PCI_CONFIG_SIZE: u16 = 8;
}

/// SLP_TYP of S5, soft off.
pub const S5_SLEEP_TYPE: u8 = 5;
/// SLP_EN in SLEEP_CONTROL.
pub const SLEEP_ENABLE: u8 = 1 << 5;
/// What the FADT tells the guest to write to the reset register.
pub const RESET_VALUE: u8 = 1;

/// Bits of the generic event device's pending-events register.
pub mod ged_event {
    /// The power button was pressed.
    pub const POWER_BUTTON: u32 = 1 << 0;
    /// A CPU came or must go.
    pub const CPU: u32 = 1 << 1;
    /// Memory came or must go.
    pub const MEMORY: u32 = 1 << 2;
    /// A PCI slot changed.
    pub const PCI: u32 = 1 << 3;
}

/// Fixed interrupt lines: pins of the one IOAPIC.
pub mod gsi {
    use std::ops::Range;

    /// Serial port; edge, active high.
    pub const SERIAL: u32 = 4;
    /// Generic event device; edge, active high.
    pub const GED: u32 = 9;
    /// INTA–INTD of PCI devices, by `(slot + pin) % 8`; level, active low.
    pub const PCI_INTX: Range<u32> = 16..24;
    /// Pins of the IOAPIC: message-signalled routes are numbered from here on.
    pub const IOAPIC_PINS: u32 = 24;

    /// The line of pin `pin` (0 = INTA … 3 = INTD) of the device in `slot` of bus 0.
    pub const fn pci_intx(slot: u8, pin: u8) -> u32 {
        PCI_INTX.start + (slot as u32 + pin as u32) % (PCI_INTX.end - PCI_INTX.start)
    }
}

/// Slots of PCI bus 0.
pub const PCI_SLOTS: u8 = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_low_structures_are_disjoint_and_in_ram() {
        let spans = [
            Span {
                base: GDT,
                size: 64,
            },
            PVH_START_INFO,
            ZERO_PAGE,
            Span {
                base: BOOT_STACK_TOP - 0xff0,
                size: 0xff0,
            },
            PAGE_TABLES,
            CMDLINE,
        ];
        for (index, one) in spans.iter().enumerate() {
            assert!(one.end() <= LEGACY_HOLE.base);
            assert!(
                spans
                    .iter()
                    .skip(index + 1)
                    .all(|other| !one.overlaps(other))
            );
        }
        assert!(LEGACY_HOLE.covers(&ACPI_AREA));
    }
}
