//! The memory map: RAM, the room for more of it and the 64-bit PCI window, placed around the
//! [fixed addresses](super::layout).

use serde::Serialize;
use thiserror::Error;

use super::boot_params::{E820Entry, E820Kind};
use super::layout::{
    ECAM, FOUR_GIB, GIB, HIGH_MEMORY, LEGACY_HOLE, LOW_RAM_MAX, MIB, MMIO_HOLE, MMIO32, PLATFORM,
    RAM_GRANULE, RAM_MAX, RAM_MIN,
};
use crate::Span;

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
    use crate::x86_64::layout::{IOAPIC, LAPIC};

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
}
