//! Byte sizes as people write them.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A number of bytes: `256M`, `5G`, `1T`, `65536`. Suffixes are powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "String")]
pub struct ByteSize(pub u64);

/// What was written is not a size.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("`{0}` is not a size: write a whole number of bytes, or one with the suffix K, M, G or T")]
pub struct SizeError(String);

#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(
    rename = "ByteSize",
    description = "Bytes as a number, or a string such as `256M`"
)]
enum Written {
    Bytes(u64),
    Text(String),
}

impl JsonSchema for ByteSize {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        Written::schema_name()
    }
    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        Written::json_schema(generator)
    }
}

impl TryFrom<Written> for ByteSize {
    type Error = SizeError;
    fn try_from(written: Written) -> Result<Self, SizeError> {
        match written {
            Written::Bytes(bytes) => Ok(Self(bytes)),
            Written::Text(text) => text.parse(),
        }
    }
}

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let error = || SizeError(text.to_owned());
        let (digits, shift) = match text.char_indices().last().ok_or_else(error)? {
            (at, 'k' | 'K') => (text.get(..at), 10),
            (at, 'm' | 'M') => (text.get(..at), 20),
            (at, 'g' | 'G') => (text.get(..at), 30),
            (at, 't' | 'T') => (text.get(..at), 40),
            _ => (Some(text), 0),
        };
        let digits = digits.ok_or_else(error)?;
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(error());
        }
        digits
            .parse::<u64>()
            .ok()
            .and_then(|n| n.checked_mul(1 << shift))
            .map(Self)
            .ok_or_else(error)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, suffix) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            let unit = 1u64 << shift;
            if self.0 >= unit && self.0.is_multiple_of(unit) {
                return write!(f, "{}{suffix}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> Self {
        size.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_and_write() {
        for (text, bytes, back) in [
            ("256M", 256 << 20, "256M"),
            ("5g", 5 << 30, "5G"),
            ("65536", 65536, "64K"),
            ("1T", 1 << 40, "1T"),
            ("1025", 1025, "1025"),
            ("0", 0, "0"),
        ] {
            let size: ByteSize = text.parse().unwrap();
            assert_eq!(size.0, bytes);
            assert_eq!(size.to_string(), back);
        }
        for text in [
            "",
            "M",
            "-1",
            "1.5G",
            "1 G",
            "1GiB",
            "99999999T",
            "0x10",
            "１G",
        ] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        assert_eq!(
            serde_json::from_str::<ByteSize>("\"2M\"").unwrap().0,
            2 << 20
        );
        assert_eq!(serde_json::from_str::<ByteSize>("4096").unwrap().0, 4096);
    }
}
