//! One 512-byte header: numbers, checksum, dialect (POSIX pax(1), "ustar Interchange Format"; GNU tar
//! manual, "Basic Tar Format").

use super::TarError;

/// What everything in an archive is a multiple of.
pub(super) const BLOCK: usize = 512;

/// Extents: offset and length.
pub(super) type Map = Vec<(u64, u64)>;

/// A header whose checksum is right.
pub(super) struct Header<'a> {
    bytes: &'a [u8; BLOCK],
    at: u64,
}

const NAME: (usize, usize) = (0, 100);
const MODE: (usize, usize) = (100, 8);
const UID: (usize, usize) = (108, 8);
const GID: (usize, usize) = (116, 8);
const SIZE: (usize, usize) = (124, 12);
const MTIME: (usize, usize) = (136, 12);
const CHECKSUM: (usize, usize) = (148, 8);
const TYPE: (usize, usize) = (156, 1);
const LINK: (usize, usize) = (157, 100);
const MAGIC: (usize, usize) = (257, 8);
const MAJOR: (usize, usize) = (329, 8);
const MINOR: (usize, usize) = (337, 8);
const PREFIX: (usize, usize) = (345, 155);
/// GNU only, where ustar has the prefix: a map of four extents, whether more follow, the true size.
const SPARSE: (usize, usize) = (386, 96);
const SPARSE_MORE: (usize, usize) = (482, 1);
const REAL_SIZE: (usize, usize) = (483, 12);

impl<'a> Header<'a> {
    /// `None` for a block of zeros.
    pub(super) fn parse(bytes: &'a [u8; BLOCK], at: u64) -> Result<Option<Self>, TarError> {
        if bytes.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let header = Self { bytes, at };
        let stated = number(header.field(CHECKSUM)).ok_or(TarError::Checksum { at })?;
        let blank = CHECKSUM.0..CHECKSUM.0 + CHECKSUM.1;
        let sum = |value: fn(u8) -> i64| -> i64 {
            let bytes = bytes.iter().enumerate();
            bytes
                .map(|(i, b)| if blank.contains(&i) { 32 } else { value(*b) })
                .sum()
        };
        // Some old writers summed signed characters.
        if stated != sum(i64::from) && stated != sum(|b| i64::from(b.cast_signed())) {
            return Err(TarError::Checksum { at });
        }
        Ok(Some(header))
    }

    pub(super) fn kind(&self) -> u8 {
        self.field(TYPE).first().copied().unwrap_or(0)
    }

    /// Prefix and name.
    pub(super) fn path(&self) -> Vec<u8> {
        let name = text(self.field(NAME));
        let prefix = text(self.field(PREFIX));
        if self.is_gnu() || !self.field(MAGIC).starts_with(b"ustar") || prefix.is_empty() {
            return name.to_vec();
        }
        [prefix, b"/", name].concat()
    }

    pub(super) fn link(&self) -> Vec<u8> {
        text(self.field(LINK)).to_vec()
    }

    pub(super) fn mode(&self) -> Result<u32, TarError> {
        self.number32(MODE, "mode")
    }

    pub(super) fn uid(&self) -> Result<u32, TarError> {
        self.number32(UID, "owner")
    }

    pub(super) fn gid(&self) -> Result<u32, TarError> {
        self.number32(GID, "group")
    }

    pub(super) fn size(&self) -> Result<u64, TarError> {
        self.length(SIZE, "size")
    }

    pub(super) fn mtime(&self) -> Result<i64, TarError> {
        self.number(MTIME, "time")
    }

    pub(super) fn device(&self) -> Result<(u32, u32), TarError> {
        Ok((
            self.number32(MAJOR, "major number")?,
            self.number32(MINOR, "minor number")?,
        ))
    }

    /// Of a GNU sparse file: true size, first part of its map, whether blocks with more of it follow.
    pub(super) fn sparse(&self) -> Result<(u64, Map, bool), TarError> {
        let mut map = Vec::new();
        sparse_entries(self.field(SPARSE), self.at, &mut map)?;
        let more = self.field(SPARSE_MORE).first().is_some_and(|b| *b != 0);
        Ok((self.length(REAL_SIZE, "true size")?, map, more))
    }

    fn is_gnu(&self) -> bool {
        self.field(MAGIC) == b"ustar  \0"
    }

    fn field(&self, (start, len): (usize, usize)) -> &'a [u8] {
        self.bytes.get(start..start + len).unwrap_or_default()
    }

    fn number(&self, field: (usize, usize), what: &'static str) -> Result<i64, TarError> {
        number(self.field(field)).ok_or(TarError::Number { at: self.at, what })
    }

    fn number32(&self, field: (usize, usize), what: &'static str) -> Result<u32, TarError> {
        let wrong = |_| TarError::Number { at: self.at, what };
        u32::try_from(self.number(field, what)?).map_err(wrong)
    }

    fn length(&self, field: (usize, usize), what: &'static str) -> Result<u64, TarError> {
        let wrong = |_| TarError::Number { at: self.at, what };
        u64::try_from(self.number(field, what)?).map_err(wrong)
    }
}

/// Adds offset and length pairs of twelve digits each, until one is empty. Says whether there was none
/// empty.
pub(super) fn sparse_entries(bytes: &[u8], at: u64, map: &mut Map) -> Result<(), TarError> {
    for pair in bytes.chunks_exact(24) {
        let (offset, length) = pair.split_at(12);
        if offset.first() == Some(&0) {
            break;
        }
        let read = |field| number(field).and_then(|n| u64::try_from(n).ok());
        match (read(offset), read(length)) {
            (Some(offset), Some(length)) => map.push((offset, length)),
            _ => return Err(TarError::SparseMap { at }),
        }
    }
    Ok(())
}

/// Up to the first NUL.
fn text(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or_default()
}

/// Octal digits, or base 256 if the highest bit of the first byte is set (GNU).
fn number(field: &[u8]) -> Option<i64> {
    let (&first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        // The next bit is the sign: two's complement.
        let start = i128::from(first & 0x3f) - i128::from(first & 0x40);
        let mut value = start;
        for byte in rest {
            value = (value << 8) | i128::from(*byte);
            // Twelve bytes of sign and zeros are a small number; one that has grown large stays so.
            if value.unsigned_abs() > 1 << 100 {
                return None;
            }
        }
        return i64::try_from(value).ok();
    }
    let digits = text(field).trim_ascii();
    let mut value: i64 = 0;
    for digit in digits {
        let digit = match digit {
            b'0'..=b'7' => i64::from(digit - b'0'),
            _ => return None,
        };
        value = value.checked_mul(8)?.checked_add(digit)?;
    }
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn numbers_of_all_dialects() {
        for (field, value) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"", None),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"0000648\0", None),
            (b"-000001\0", None),
            (b"777777777777", Some(0o777_777_777_777)),
            (b"\x80\0\0\0\0\0\0\x02\0\0\0\0", Some(1 << 33)),
            (
                b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe",
                Some(-2),
            ),
            (b"\x80\x7f\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (
                b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff",
                Some(i64::MAX),
            ),
            (b"\xbf\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
        ] {
            assert_eq!(number(field), value, "{field:x?}");
        }
    }
}
