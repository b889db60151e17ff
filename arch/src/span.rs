//! A range of guest-physical addresses.

use std::fmt;

use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

/// A non-empty range of guest-physical addresses, in bytes, that ends at or below 2^64 − 1.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Span {
    pub(crate) base: u64,
    pub(crate) size: u64,
}

impl Span {
    /// The span of `size` bytes from `base`; `None` when it is empty or passes the last address.
    pub const fn new(base: u64, size: u64) -> Option<Self> {
        if size == 0 || base.checked_add(size).is_none() {
            return None;
        }
        Some(Self { base, size })
    }

    /// The span from `base` up to, not including, `end`; `None` when it would be empty.
    pub const fn between(base: u64, end: u64) -> Option<Self> {
        match end.checked_sub(base) {
            Some(size) => Self::new(base, size),
            None => None,
        }
    }

    /// First address.
    pub const fn base(&self) -> u64 {
        self.base
    }

    /// Length in bytes, never 0.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The address after the last one.
    pub const fn end(&self) -> u64 {
        self.base.saturating_add(self.size)
    }

    /// The last address.
    pub const fn last(&self) -> u64 {
        self.base.saturating_add(self.size - 1)
    }

    /// Whether `gpa` lies inside.
    pub const fn contains(&self, gpa: u64) -> bool {
        self.base <= gpa && gpa <= self.last()
    }

    /// Whether all of `other` lies inside.
    pub const fn covers(&self, other: &Self) -> bool {
        self.base <= other.base && other.last() <= self.last()
    }

    /// Whether the two share an address.
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.base <= other.last() && other.base <= self.last()
    }
}

/// Base and size as hexadecimal strings: read by people, and exact where numbers are 53 bits wide.
impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Span", 2)?;
        fields.serialize_field("base", &Hex(self.base))?;
        fields.serialize_field("size", &Hex(self.size))?;
        fields.end()
    }
}

/// A number that is serialised as a hexadecimal string.
pub(crate) struct Hex(pub(crate) u64);

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:#x}", self.0))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x})", self.base, self.end())
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_and_wrapping_spans_have_no_value() {
        assert_eq!(Span::new(0x1000, 0), None);
        assert_eq!(Span::new(u64::MAX, 2), None);
        assert_eq!(Span::between(2, 2), None);
        assert_eq!(Span::between(3, 2), None);
        assert_eq!(Span::between(2, 5), Span::new(2, 3));
    }

    #[test]
    fn neighbours_do_not_overlap() {
        let low = Span::new(0x1000, 0x1000).unwrap();
        let high = Span::new(0x2000, 0x1000).unwrap();
        assert!(!low.overlaps(&high) && !high.overlaps(&low));
        assert!(low.contains(0x1fff) && !low.contains(0x2000));
        assert!(Span::new(0x1000, 0x2000).unwrap().covers(&high));
    }
}
