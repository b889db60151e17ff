//! Segment descriptors of the boot GDT (SDM 3A §3.4.5) and what a segment register holds after
//! loading one.

/// A segment register: selector and cached descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Segment {
    /// Selector: byte offset of the descriptor in the GDT.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, as the register holds it.
    pub limit: u32,
    /// Type field.
    pub kind: u8,
    /// S: code or data, not a system segment.
    pub code_or_data: bool,
    /// L: 64-bit code.
    pub long: bool,
    /// D/B: 32-bit operands by default.
    pub default_32: bool,
    /// G: the limit counts pages.
    pub granular: bool,
}

/// Code: execute and read, accessed.
const CODE: u8 = 0xb;
/// Data: read and write, accessed.
const DATA: u8 = 0x3;
/// Busy TSS, 32-bit or 64-bit.
const TSS_BUSY: u8 = 0xb;

/// Selector of the code segment, as the Linux boot protocol names it (`__BOOT_CS`).
const SELECTOR_CODE: u16 = 0x10;
/// Selector of the data segment (`__BOOT_DS`).
const SELECTOR_DATA: u16 = 0x18;
/// Selector of the task state segment.
const SELECTOR_TSS: u16 = 0x20;

impl Segment {
    /// Flat 64-bit code.
    pub(super) const fn code_64() -> Self {
        Self {
            long: true,
            default_32: false,
            ..Self::code_32()
        }
    }

    /// Flat 32-bit code.
    pub(super) const fn code_32() -> Self {
        Self {
            selector: SELECTOR_CODE,
            base: 0,
            limit: u32::MAX,
            kind: CODE,
            code_or_data: true,
            long: false,
            default_32: true,
            granular: true,
        }
    }

    /// Flat data.
    pub(super) const fn data() -> Self {
        Self {
            selector: SELECTOR_DATA,
            kind: DATA,
            ..Self::code_32()
        }
    }

    /// A task state segment that is never used, in the state VM entry wants it.
    pub(super) const fn tss() -> Self {
        Self {
            selector: SELECTOR_TSS,
            base: 0,
            limit: 0x67,
            kind: TSS_BUSY,
            code_or_data: false,
            long: false,
            default_32: false,
            granular: false,
        }
    }

    /// The descriptor in memory from which this register would be loaded.
    fn descriptor(self) -> u64 {
        let limit = u64::from(if self.granular {
            self.limit >> 12
        } else {
            self.limit
        });
        let flag = |set: bool, bit: u32| u64::from(set) << bit;
        (limit & 0xffff)
            | (self.base & 0xff_ffff) << 16
            | u64::from(self.kind) << 40
            | flag(self.code_or_data, 44)
            | flag(true, 47)
            | (limit >> 16 & 0xf) << 48
            | flag(self.long, 53)
            | flag(self.default_32, 54)
            | flag(self.granular, 55)
            | (self.base >> 24 & 0xff) << 56
    }
}

/// The bytes of a GDT whose entries these registers were loaded from.
pub(super) fn table(code: Segment) -> Vec<u8> {
    [
        0,
        0,
        code.descriptor(),
        Segment::data().descriptor(),
        Segment::tss().descriptor(),
    ]
    .into_iter()
    .flat_map(u64::to_le_bytes)
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_well_known_ones() {
        assert_eq!(Segment::code_64().descriptor(), 0x00af_9b00_0000_ffff);
        assert_eq!(Segment::code_32().descriptor(), 0x00cf_9b00_0000_ffff);
        assert_eq!(Segment::data().descriptor(), 0x00cf_9300_0000_ffff);
        assert_eq!(Segment::tss().descriptor(), 0x0000_8b00_0000_0067);
        assert_eq!(table(Segment::code_64()).len(), 40);
    }
}
