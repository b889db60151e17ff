//! Memory type range registers: what they must say, and what the processor makes of it.
//!
//! Firmware programs MTRRs; there is none here, and their reset value (all off) makes every
//! address uncacheable by the rules: Linux then leaves PAT alone, and device drivers lose
//! write-combining. The plan: default type write-back, fixed ranges off, and the hole below
//! 4 GiB uncacheable by variable ranges. The PCI window above RAM stays write-back: there the
//! guest chooses by PAT. The same registers go to every vCPU, hot-added ones too.
//!
//! All of it is SDM 3A §12.11.

use serde::{Serialize, Serializer};
use thiserror::Error;

use super::map::MemoryMap;
use crate::span::{Hex, Span};

/// IA32_MTRR_DEF_TYPE.
pub const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// IA32_MTRR_PHYSBASE0; PHYSMASK0 follows, then the next pair.
pub const MSR_MTRR_PHYS_BASE_0: u32 = 0x200;
/// IA32_PAT.
pub const MSR_PAT: u32 = 0x277;
/// IA32_PAT at power-on: WB, WT, UC−, UC, twice (SDM 3A §12.12.4).
pub const PAT_POWER_ON: u64 = 0x0007_0406_0007_0406;
/// Variable ranges KVM offers (VCNT of IA32_MTRRCAP).
pub const KVM_VARIABLE_RANGES: u8 = 8;

/// E in IA32_MTRR_DEF_TYPE: MTRRs are on.
const DEF_TYPE_ENABLE: u64 = 1 << 11;
/// V in IA32_MTRR_PHYSMASKn: the pair is in use.
const MASK_VALID: u64 = 1 << 11;
/// Granule of a variable range.
const PAGE_SHIFT: u32 = 12;

/// Memory types as MTRRs encode them (SDM 3A table 12-8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[repr(u8)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryType {
    /// UC.
    Uncacheable = 0,
    /// WC.
    WriteCombining = 1,
    /// WT.
    WriteThrough = 4,
    /// WP.
    WriteProtected = 5,
    /// WB.
    WriteBack = 6,
}

impl MemoryType {
    /// The encoding.
    pub const fn code(self) -> u64 {
        match self {
            Self::Uncacheable => 0,
            Self::WriteCombining => 1,
            Self::WriteThrough => 4,
            Self::WriteProtected => 5,
            Self::WriteBack => 6,
        }
    }

    /// What two overlapping variable ranges make of an address; `None` when the SDM leaves it
    /// undefined (SDM 3A §12.11.4.1).
    fn overlap(self, other: Self) -> Option<Self> {
        match (self, other) {
            (one, two) if one == two => Some(one),
            (Self::Uncacheable, _) | (_, Self::Uncacheable) => Some(Self::Uncacheable),
            (Self::WriteThrough, Self::WriteBack) | (Self::WriteBack, Self::WriteThrough) => {
                Some(Self::WriteThrough)
            }
            _ => None,
        }
    }
}

/// Why MTRRs cannot describe a memory map.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum MtrrError {
    /// The registers are narrower than the map, or no CPU has such a width.
    #[error(
        "MTRRs of {phys_bits} physical address bits cannot describe a guest with \
         {guest_phys_bits}: plan the map with the CPU's width (36 to 52)"
    )]
    PhysBits {
        /// Width the registers have.
        phys_bits: u8,
        /// Width the map has.
        guest_phys_bits: u8,
    },
    /// Too few pairs.
    #[error("{hole} takes {needed} MTRR pairs and the CPU has {slots}: align the hole's start")]
    Slots {
        /// What must be uncacheable.
        hole: Span,
        /// Pairs that takes.
        needed: usize,
        /// Pairs there are.
        slots: u8,
    },
    /// Not whole pages.
    #[error("{0} does not start and end on a page: MTRRs cannot describe it")]
    Unaligned(Span),
    /// Two ranges give an address two types for which the SDM defines no outcome.
    #[error("{one} and {two} overlap with types for which no outcome is defined")]
    Undefined {
        /// A range.
        one: Span,
        /// The range that overlaps it.
        two: Span,
    },
}

/// One variable range: a naturally aligned power of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct VariableRange {
    span: Span,
    kind: MemoryType,
    #[serde(serialize_with = "hex")]
    base_msr: u64,
    #[serde(serialize_with = "hex")]
    mask_msr: u64,
}

fn hex<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    Hex(*value).serialize(serializer)
}

impl VariableRange {
    /// `span` must be a naturally aligned power of two of at least a page.
    fn new(span: Span, kind: MemoryType, phys_bits: u8) -> Self {
        let width = (1 << phys_bits) - 1;
        Self {
            span,
            kind,
            base_msr: span.base() | kind.code(),
            mask_msr: (width & !(span.size() - 1)) | MASK_VALID,
        }
    }

    /// The range described.
    pub fn span(&self) -> Span {
        self.span
    }

    /// Its type.
    pub fn kind(&self) -> MemoryType {
        self.kind
    }

    /// The processor's own test: address AND mask equals base AND mask (SDM 3A §12.11.2.3).
    fn matches(&self, gpa: u64) -> bool {
        let mask = self.mask_msr >> PAGE_SHIFT;
        self.mask_msr & MASK_VALID != 0
            && (gpa >> PAGE_SHIFT) & mask == (self.base_msr >> PAGE_SHIFT) & mask
    }
}

/// What the MTRRs and PAT of every vCPU hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MtrrPlan {
    default: MemoryType,
    variable: Vec<VariableRange>,
    slots: u8,
}

/// Plans MTRRs with `phys_bits` wide masks and `slots` variable pairs, under which RAM and all
/// above 4 GiB is write-back and exactly the hole below 4 GiB is uncacheable.
pub fn plan(map: &MemoryMap, phys_bits: u8, slots: u8) -> Result<MtrrPlan, MtrrError> {
    let guest_phys_bits = map.guest_phys_bits();
    if !(36..=52).contains(&phys_bits) || phys_bits < guest_phys_bits {
        return Err(MtrrError::PhysBits {
            phys_bits,
            guest_phys_bits,
        });
    }
    let hole = map.mmio_hole();
    let variable: Vec<_> = powers_of_two(hole)?
        .into_iter()
        .map(|span| VariableRange::new(span, MemoryType::Uncacheable, phys_bits))
        .collect();
    if variable.len() > usize::from(slots) {
        return Err(MtrrError::Slots {
            hole,
            needed: variable.len(),
            slots,
        });
    }
    MtrrPlan::new(MemoryType::WriteBack, variable, slots)
}

impl MtrrPlan {
    fn new(
        default: MemoryType,
        variable: Vec<VariableRange>,
        slots: u8,
    ) -> Result<Self, MtrrError> {
        for (index, one) in variable.iter().enumerate() {
            for two in variable.iter().skip(index + 1) {
                if one.span.overlaps(&two.span) && one.kind.overlap(two.kind).is_none() {
                    return Err(MtrrError::Undefined {
                        one: one.span,
                        two: two.span,
                    });
                }
            }
        }
        Ok(Self {
            default,
            variable,
            slots,
        })
    }

    /// Variable ranges in use, ascending.
    pub fn variable(&self) -> &[VariableRange] {
        &self.variable
    }

    /// IA32_MTRR_DEF_TYPE: the default type, MTRRs on, fixed ranges off.
    pub fn def_type(&self) -> u64 {
        self.default.code() | DEF_TYPE_ENABLE
    }

    /// Index and value of every register, unused pairs zero, the one that turns MTRRs on last.
    pub fn msrs(&self) -> Vec<(u32, u64)> {
        let pairs = self
            .variable
            .iter()
            .map(|range| (range.base_msr, range.mask_msr));
        let unused = std::iter::repeat((0, 0));
        let mut msrs: Vec<_> = pairs
            .chain(unused)
            .zip(0..u32::from(self.slots))
            .flat_map(|((base, mask), index)| {
                let register = MSR_MTRR_PHYS_BASE_0 + 2 * index;
                [(register, base), (register + 1, mask)]
            })
            .collect();
        msrs.push((MSR_PAT, PAT_POWER_ON));
        msrs.push((MSR_MTRR_DEF_TYPE, self.def_type()));
        msrs
    }

    /// The type the MTRRs give `gpa` (SDM 3A §12.11.4.1).
    pub fn effective_type(&self, gpa: u64) -> MemoryType {
        self.variable
            .iter()
            .filter(|range| range.matches(gpa))
            .map(VariableRange::kind)
            .reduce(|one, two| one.overlap(two).unwrap_or(MemoryType::Uncacheable))
            .unwrap_or(self.default)
    }
}

/// The fewest naturally aligned powers of two that make up `span`, ascending.
fn powers_of_two(span: Span) -> Result<Vec<Span>, MtrrError> {
    let page = 1 << PAGE_SHIFT;
    if !span.base().is_multiple_of(page) || !span.size().is_multiple_of(page) {
        return Err(MtrrError::Unaligned(span));
    }
    let mut pieces = Vec::new();
    let mut rest = Some(span);
    while let Some(left) = rest {
        let largest = 1 << left.size().ilog2();
        let alignment = match left.base() {
            0 => largest,
            base => 1 << base.trailing_zeros(),
        };
        let piece = Span {
            base: left.base(),
            size: alignment.min(largest),
        };
        pieces.push(piece);
        rest = Span::between(piece.end(), left.end());
    }
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::x86_64::layout::{MMIO_HOLE, RAM_GRANULE, RAM_MAX, RAM_MIN};

    #[test]
    fn one_pair_describes_the_hole() {
        let map = MemoryMap::plan(256 << 20, 40).unwrap();
        let msrs = plan(&map, 40, 8).unwrap().msrs();
        assert_eq!(msrs[0], (0x200, 0x8000_0000));
        assert_eq!(msrs[1], (0x201, 0xff_8000_0800));
        assert!(msrs[2..16].iter().all(|(_, value)| *value == 0));
        assert_eq!(msrs[16..], [(0x277, 0x0007_0406_0007_0406), (0x2ff, 0x806)]);
    }

    #[test]
    fn narrow_registers_and_missing_slots_are_refused() {
        let map = MemoryMap::plan(256 << 20, 46).unwrap();
        assert!(matches!(plan(&map, 40, 8), Err(MtrrError::PhysBits { .. })));
        assert!(matches!(plan(&map, 53, 8), Err(MtrrError::PhysBits { .. })));
        assert!(matches!(
            plan(&map, 46, 0),
            Err(MtrrError::Slots { needed: 1, .. })
        ));
    }

    #[test]
    fn overlaps_follow_the_manual() {
        use MemoryType::*;
        let range = |base, size, kind| VariableRange::new(Span { base, size }, kind, 40);
        let all = range(0, 1 << 30, WriteBack);
        let through = range(1 << 20, 1 << 20, WriteThrough);
        let none = range(1 << 20, 1 << 12, Uncacheable);
        let plan = MtrrPlan::new(Uncacheable, vec![all, through, none], 8).unwrap();
        assert_eq!(plan.effective_type(0), WriteBack);
        assert_eq!(plan.effective_type((1 << 20) + 4096), WriteThrough);
        assert_eq!(plan.effective_type(1 << 20), Uncacheable);
        assert_eq!(plan.effective_type(1 << 30), Uncacheable);
        let combining = range(1 << 20, 1 << 20, WriteCombining);
        let undefined = MtrrPlan::new(Uncacheable, vec![all, combining], 8);
        assert!(matches!(undefined, Err(MtrrError::Undefined { .. })));
    }

    proptest! {
        #[test]
        fn every_address_has_the_wanted_type(
            granules in RAM_MIN / RAM_GRANULE..=RAM_MAX / RAM_GRANULE,
            phys_bits in 36u8..=52,
            narrower in 0u8..16,
            random in any::<u64>(),
            near in prop::sample::select(vec![0u64, 1 << 20, 1 << 31, 0xe000_0000, 1 << 32, 1 << 33, 1 << 36]),
            off in -8192i64..8192,
        ) {
            let guest_phys_bits = phys_bits.saturating_sub(narrower).max(36);
            let Ok(map) = MemoryMap::plan(granules * RAM_GRANULE, guest_phys_bits) else { return Ok(()) };
            let plan = plan(&map, phys_bits, KVM_VARIABLE_RANGES).unwrap();
            let limit = 1u64 << phys_bits;
            for gpa in [random, near.wrapping_add_signed(off)] {
                let gpa = gpa % limit;
                let wanted = if MMIO_HOLE.contains(gpa) { MemoryType::Uncacheable } else { MemoryType::WriteBack };
                prop_assert_eq!(plan.effective_type(gpa), wanted, "at {:#x}", gpa);
            }
            for (register, value) in plan.msrs() {
                if register != MSR_PAT {
                    prop_assert!(value < limit, "{:#x} = {:#x} has reserved bits", register, value);
                }
            }
        }

        #[test]
        fn pieces_are_aligned_powers_of_two_and_add_up(base in 0u64..1 << 24, pages in 1u64..1 << 24) {
            let span = Span::new(base << 12, pages << 12).unwrap();
            let pieces = powers_of_two(span).unwrap();
            let mut next = span.base();
            for piece in pieces {
                prop_assert_eq!(piece.base(), next);
                prop_assert!(piece.size().is_power_of_two());
                prop_assert!(piece.base().is_multiple_of(piece.size()));
                next = piece.end();
            }
            prop_assert_eq!(next, span.end());
        }
    }
}
