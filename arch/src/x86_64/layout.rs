//! The guest-physical address space and the fixed ports, lines and addresses of the machine.
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

use serde::Serialize;
use thiserror::Error;

use super::boot_params::{E820Entry, E820Kind};
use crate::Span;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const FOUR_GIB: u64 = 4 * GIB;

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
/// Read-only firmware area, where a kernel looks for the RSDP (ACPI 6.5 §5.2.5.1).
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

/// Why there is no memory map.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum MapError {
    /// Too little or too much.
    #[error(
        "memory of {ram_bytes} bytes is out of range: give between {} MiB and {} GiB",
        RAM_MIN / MIB,
        RAM_MAX / GIB
    )]
    RamSize {
        /// What was asked for.
        ram_bytes: u64,
    },
    /// Not a multiple of the granule.
    #[error("memory of {ram_bytes} bytes is not a multiple of {} MiB: round it up", RAM_GRANULE / MIB)]
    RamGranule {
        /// What was asked for.
        ram_bytes: u64,
    },
    /// No such CPU.
    #[error("{guest_phys_bits} physical address bits: give between 36 and 52")]
    PhysBits {
        /// What was asked for.
        guest_phys_bits: u8,
    },
    /// RAM, hot-plug room and a useful PCI window do not fit.
    #[error(
        "memory up to {end:#x} leaves less than 1 GiB for PCI below 2^{guest_phys_bits}: \
         give less memory or hot-plug room, or use a host with wider physical addresses"
    )]
    NoRoom {
        /// End of RAM and of the room for more.
        end: u64,
        /// Width of a guest-physical address.
        guest_phys_bits: u8,
    },
}

/// What a memory map is planned from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapRequest {
    /// RAM at boot, in bytes.
    pub ram_bytes: u64,
    /// Width of a guest-physical address: the least of host, KVM, IOMMU and configuration.
    pub guest_phys_bits: u8,
    /// Room kept for hot-plugged RAM, in bytes; rounded up to 1 GiB.
    pub hotplug_bytes: u64,
}

/// Where everything is. Made by [`MemoryMap::plan`]; its spans never overlap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MemoryMap {
    guest_phys_bits: u8,
    ram: Vec<Span>,
    hotplug_ram: Option<Span>,
    mmio_hole: Span,
    mmio32: Span,
    ecam: Span,
    platform: Span,
    mmio64: Span,
    e820: Vec<E820Entry>,
}

impl MemoryMap {
    /// The map of a guest with `ram_bytes` of RAM and no room for hot-plugged memory.
    pub fn plan(ram_bytes: u64, guest_phys_bits: u8) -> Result<Self, MapError> {
        Self::plan_with(&MapRequest {
            ram_bytes,
            guest_phys_bits,
            hotplug_bytes: 0,
        })
    }

    /// The map of a guest.
    pub fn plan_with(request: &MapRequest) -> Result<Self, MapError> {
        let MapRequest {
            ram_bytes,
            guest_phys_bits,
            hotplug_bytes,
        } = *request;
        if !(RAM_MIN..=RAM_MAX).contains(&ram_bytes) {
            return Err(MapError::RamSize { ram_bytes });
        }
        if !ram_bytes.is_multiple_of(RAM_GRANULE) {
            return Err(MapError::RamGranule { ram_bytes });
        }
        if !(36..=52).contains(&guest_phys_bits) {
            return Err(MapError::PhysBits { guest_phys_bits });
        }

        let low = Span {
            base: 0,
            size: ram_bytes.min(LOW_RAM_MAX),
        };
        let high = Span::new(FOUR_GIB, ram_bytes - low.size);
        let high_end = high
            .map_or(FOUR_GIB, |span| span.end())
            .next_multiple_of(GIB);
        let room = hotplug_bytes.checked_next_multiple_of(GIB);
        let end = room
            .and_then(|room| high_end.checked_add(room))
            .unwrap_or(u64::MAX);
        let no_room = MapError::NoRoom {
            end,
            guest_phys_bits,
        };
        let mmio64 = Span::between(end, 1 << guest_phys_bits).ok_or(no_room)?;

        let ram: Vec<Span> = [Some(low), high].into_iter().flatten().collect();
        Ok(Self {
            guest_phys_bits,
            e820: e820(low, high),
            ram,
            hotplug_ram: Span::between(high_end, end),
            mmio_hole: MMIO_HOLE,
            mmio32: MMIO32,
            ecam: ECAM,
            platform: PLATFORM,
            mmio64,
        })
    }

    /// Width of a guest-physical address.
    pub fn guest_phys_bits(&self) -> u8 {
        self.guest_phys_bits
    }

    /// RAM at boot, ascending. The first span starts at 0; its pages between 640 KiB and 1 MiB
    /// are RAM too, only not told to the guest as such.
    pub fn ram(&self) -> &[Span] {
        &self.ram
    }

    /// RAM at boot, in bytes.
    pub fn ram_bytes(&self) -> u64 {
        self.ram.iter().map(Span::size).sum()
    }

    /// End of the RAM below 4 GiB: kernels and initial RAM disks end below it.
    pub fn low_ram_end(&self) -> u64 {
        self.ram.first().map_or(0, Span::end)
    }

    /// Room for hot-plugged RAM.
    pub fn hotplug_ram(&self) -> Option<Span> {
        self.hotplug_ram
    }

    /// All addresses below 4 GiB that are never RAM.
    pub fn mmio_hole(&self) -> Span {
        self.mmio_hole
    }

    /// PCI window for 32-bit BARs.
    pub fn mmio32(&self) -> Span {
        self.mmio32
    }

    /// PCI window for 64-bit BARs.
    pub fn mmio64(&self) -> Span {
        self.mmio64
    }

    /// PCI configuration space.
    pub fn ecam(&self) -> Span {
        self.ecam
    }

    /// Registers of platform devices.
    pub fn platform(&self) -> Span {
        self.platform
    }

    /// The memory map as the guest is told it, ascending.
    pub fn e820(&self) -> &[E820Entry] {
        &self.e820
    }
}

fn e820(low: Span, high: Option<Span>) -> Vec<E820Entry> {
    let ram = |span| E820Entry {
        span,
        kind: E820Kind::Ram,
    };
    let reserved = |span| E820Entry {
        span,
        kind: E820Kind::Reserved,
    };
    [
        Some(ram(Span {
            base: 0,
            size: LEGACY_HOLE.base,
        })),
        Some(reserved(LEGACY_HOLE)),
        Span::between(HIGH_MEMORY, low.end()).map(ram),
        Some(reserved(ECAM)),
        high.map(ram),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_outside_the_range_are_refused() {
        let plan = MemoryMap::plan;
        assert_eq!(
            plan(16 * MIB, 40),
            Err(MapError::RamSize {
                ram_bytes: 16 * MIB
            })
        );
        assert_eq!(
            plan(2 << 40, 48),
            Err(MapError::RamSize { ram_bytes: 2 << 40 })
        );
        assert_eq!(
            plan(33 * MIB, 48),
            Err(MapError::RamGranule {
                ram_bytes: 33 * MIB
            })
        );
        assert_eq!(
            plan(GIB, 35),
            Err(MapError::PhysBits {
                guest_phys_bits: 35
            })
        );
        let full = plan(62 * GIB, 36);
        assert_eq!(
            full,
            Err(MapError::NoRoom {
                end: 64 * GIB,
                guest_phys_bits: 36
            })
        );
        assert!(full.unwrap_err().to_string().contains("give less memory"));
    }

    #[test]
    fn a_huge_hotplug_request_is_refused_not_wrapped() {
        let request = MapRequest {
            ram_bytes: GIB,
            guest_phys_bits: 48,
            hotplug_bytes: u64::MAX,
        };
        assert!(matches!(
            MemoryMap::plan_with(&request),
            Err(MapError::NoRoom { .. })
        ));
    }

    #[test]
    fn five_gib_straddle_the_hole() {
        let map = MemoryMap::plan(5 * GIB, 40).unwrap();
        assert_eq!(
            map.ram(),
            [
                Span {
                    base: 0,
                    size: 2 * GIB
                },
                Span {
                    base: 4 * GIB,
                    size: 3 * GIB
                }
            ]
        );
        assert_eq!(map.mmio64(), Span::between(7 * GIB, 1 << 40).unwrap());
        assert!(map.mmio32().size() >= GIB);
    }

    proptest! {
        #[test]
        fn spans_never_overlap(
            granules in RAM_MIN / RAM_GRANULE..=RAM_MAX / RAM_GRANULE,
            guest_phys_bits in 36u8..=52,
            hotplug_bytes in prop_oneof![Just(0), 0u64..1 << 50],
        ) {
            let ram_bytes = granules * RAM_GRANULE;
            let request = MapRequest { ram_bytes, guest_phys_bits, hotplug_bytes };
            let Ok(map) = MemoryMap::plan_with(&request) else { return Ok(()) };
            prop_assert_eq!(map.ram_bytes(), ram_bytes);
            prop_assert_eq!(map.mmio64().end(), 1 << guest_phys_bits);
            if let Some(room) = map.hotplug_ram() {
                prop_assert!(room.size() >= hotplug_bytes);
            } else {
                prop_assert_eq!(hotplug_bytes, 0);
            }

            let mut spans = map.ram().to_vec();
            spans.extend(map.hotplug_ram());
            spans.extend([map.mmio32(), map.ecam(), map.platform(), IOAPIC, LAPIC, map.mmio64()]);
            for (index, one) in spans.iter().enumerate() {
                prop_assert!(one.end() <= 1 << guest_phys_bits);
                for other in spans.iter().skip(index + 1) {
                    prop_assert!(!one.overlaps(other), "{} and {}", one, other);
                }
            }
            let told: u64 = map.e820().iter().filter(|e| e.kind == E820Kind::Ram).map(|e| e.span.size()).sum();
            prop_assert_eq!(told + LEGACY_HOLE.size(), ram_bytes);
            prop_assert!(map.e820().iter().zip(map.e820().iter().skip(1)).all(|(a, b)| a.span.end() <= b.span.base()));
        }
    }

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
