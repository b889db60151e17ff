//! The guest's memory map in the form kernels take it: e820 entries, for the zero page and, with
//! the same type numbers, for PVH's `hvm_memmap_table_entry`.

use serde::Serialize;

use crate::Span;

/// What a range is, with e820's own numbers (ACPI 6.5 §15).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[repr(u32)]
#[serde(rename_all = "lowercase")]
pub enum E820Kind {
    /// Usable memory.
    Ram = 1,
    /// Never touch.
    Reserved = 2,
}

impl E820Kind {
    /// The number in the table.
    pub const fn code(self) -> u32 {
        match self {
            Self::Ram => 1,
            Self::Reserved => 2,
        }
    }
}

/// One range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct E820Entry {
    /// Where.
    pub span: Span,
    /// What.
    pub kind: E820Kind,
}

impl E820Entry {
    /// `struct boot_e820_entry`: address, size, type, little-endian and packed.
    pub fn to_bytes(self) -> [u8; 20] {
        let mut bytes = [0; 20];
        let fields = self
            .span
            .base()
            .to_le_bytes()
            .into_iter()
            .chain(self.span.size().to_le_bytes())
            .chain(self.kind.code().to_le_bytes());
        for (to, from) in bytes.iter_mut().zip(fields) {
            *to = from;
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_packed_little_endian() {
        let entry = E820Entry {
            span: Span::new(0x1_0000_0000, 0x4000_0000).unwrap(),
            kind: E820Kind::Reserved,
        };
        let bytes = [
            0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 2, 0, 0, 0,
        ];
        assert_eq!(entry.to_bytes(), bytes);
    }
}
