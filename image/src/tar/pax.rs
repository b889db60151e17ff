//! Extended header records: `LENGTH KEY=VALUE\n` (POSIX pax(1), "pax Extended Header"), with the keys
//! that SCHILY, LIBARCHIVE and GNU add.

use super::TarError;

/// What extended headers say of the next entry.
#[derive(Default, Clone)]
pub(super) struct Extended {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: Sparse,
}

/// GNU's three ways to describe a sparse file by records (GNU tar manual, "PAX Format, Version …").
#[derive(Default, Clone)]
pub(super) struct Sparse {
    /// 1.0: the map stands before the data.
    pub(super) map_in_data: bool,
    pub(super) name: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    /// 0.0 and 0.1.
    pub(super) map: Vec<(u64, u64)>,
    pub(super) seen: bool,
    offset: Option<u64>,
}

/// Extents a map may have.
pub(super) const MAP_MAX: usize = 1 << 18;
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";
const XATTR_PREFIX_LIBARCHIVE: &[u8] = b"LIBARCHIVE.xattr.";

impl Extended {
    /// Takes in the records of one header.
    pub(super) fn parse(&mut self, mut records: &[u8], at: u64) -> Result<(), TarError> {
        while !records.is_empty() {
            // Some writers pad with zeros.
            if records.iter().all(|b| *b == 0) {
                break;
            }
            let (key, value, rest) = record(records).ok_or(TarError::Record { at })?;
            self.take(key, value).ok_or_else(|| TarError::Value {
                at,
                key: String::from_utf8_lossy(key).chars().take(100).collect(),
            })?;
            records = rest;
        }
        Ok(())
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        match key {
            b"path" => self.path = filled(value),
            b"linkpath" => self.link = filled(value),
            b"size" => self.size = Some(decimal(value)?),
            b"uid" => self.uid = Some(u32::try_from(decimal(value)?).ok()?),
            b"gid" => self.gid = Some(u32::try_from(decimal(value)?).ok()?),
            b"mtime" => self.mtime = Some(time(value)?),
            b"GNU.sparse.major" => {
                self.sparse.seen = true;
                self.sparse.map_in_data = value == b"1";
            }
            b"GNU.sparse.minor" | b"GNU.sparse.numblocks" => self.sparse.seen = true,
            b"GNU.sparse.name" => self.sparse.name = filled(value),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                self.sparse.seen = true;
                self.sparse.size = Some(decimal(value)?);
            }
            b"GNU.sparse.offset" => self.sparse.offset = Some(decimal(value)?),
            b"GNU.sparse.numbytes" => {
                let offset = self.sparse.offset.take()?;
                self.sparse.push(offset, decimal(value)?)?;
            }
            b"GNU.sparse.map" => {
                let mut numbers = value.split(|b| *b == b',').filter(|n| !n.is_empty());
                while let Some(offset) = numbers.next() {
                    self.sparse
                        .push(decimal(offset)?, decimal(numbers.next()?)?)?;
                }
            }
            _ => {
                if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
                    self.xattr(name.to_vec(), value.to_vec());
                } else if let Some(name) = key.strip_prefix(XATTR_PREFIX_LIBARCHIVE) {
                    // libarchive writes both; its own has the value in base64 and the name escaped.
                    if !self.xattrs.iter().any(|(n, _)| n == name) {
                        self.xattr(name.to_vec(), base64(value)?);
                    }
                }
            }
        }
        Some(())
    }

    fn xattr(&mut self, name: Vec<u8>, value: Vec<u8>) {
        match self.xattrs.iter_mut().find(|(n, _)| *n == name) {
            Some((_, old)) => *old = value,
            None => self.xattrs.push((name, value)),
        }
    }
}

impl Sparse {
    fn push(&mut self, offset: u64, length: u64) -> Option<()> {
        self.seen = true;
        (self.map.len() < MAP_MAX).then(|| self.map.push((offset, length)))
    }
}

/// Key, value, and what follows.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|b| *b == b' ')?;
    let length = usize::try_from(decimal(bytes.get(..space)?)?).ok()?;
    let (whole, rest) = bytes.split_at_checked(length)?;
    let pair = whole.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = pair.iter().position(|b| *b == b'=')?;
    Some((pair.get(..equals)?, pair.get(equals + 1..)?, rest))
}

/// An empty value takes back what was said.
fn filled(value: &[u8]) -> Option<Vec<u8>> {
    (!value.is_empty()).then(|| value.to_vec())
}

pub(super) fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_u64, |value, digit| {
        let digit = digit.is_ascii_digit().then(|| u64::from(digit - b'0'))?;
        value.checked_mul(10)?.checked_add(digit)
    })
}

/// Seconds with a fraction, perhaps negative.
fn time(value: &[u8]) -> Option<(i64, u32)> {
    let (negative, digits) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let mut parts = digits.splitn(2, |b| *b == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let mut nanos: u32 = 0;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    for i in 0..9 {
        let digit = fraction.get(i).map_or(0, |d| u32::from(d - b'0'));
        nanos = nanos * 10 + digit;
    }
    Some(match (negative, nanos) {
        (false, _) => (seconds, nanos),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanos),
    })
}

fn base64(value: &[u8]) -> Option<Vec<u8>> {
    use base64::Engine as _;
    use base64::alphabet::STANDARD;
    use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
    let either =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    GeneralPurpose::new(&STANDARD, either).decode(value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_and_after_the_epoch() {
        assert_eq!(time(b"1.5"), Some((1, 500_000_000)));
        assert_eq!(time(b"12"), Some((12, 0)));
        assert_eq!(time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time(b"1.1234567899"), Some((1, 123_456_789)));
        assert_eq!(time(b"x"), None);
        assert_eq!(time(b"1.x"), None);
    }

    #[test]
    fn records_with_wrong_lengths_are_refused() {
        let mut seen = Extended::default();
        seen.parse(b"12 path=abc\n20 SCHILY.xattr.a=\0\n", 0)
            .unwrap();
        assert_eq!(seen.path.as_deref(), Some(&b"abc"[..]));
        assert_eq!(seen.xattrs, [(b"a".to_vec(), vec![0])]);
        for bad in [
            &b"11 path=abc\n"[..],
            b"13 path=abc\n",
            b"x",
            b"0 \n",
            b"9999999999999999999999 a=b\n",
            b"5 abc",
            b"6 abc\n",
        ] {
            assert!(Extended::default().parse(bad, 0).is_err(), "{bad:?}");
        }
    }
}
