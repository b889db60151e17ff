//! Reads archives from a stream: ustar, pax and GNU, with long names, sparse files and extended
//! attributes. Owns the bytes' meaning only; what an entry does to a tree is `layers`' business.
//!
//! Everything is untrusted. Memory is bounded: extended headers and names have limits, data is handed
//! on as it comes.

mod header;
mod pax;

use std::io::{self, Read};

use header::{BLOCK, Header};
use pax::Extended;

/// Bytes that extended headers of one entry may have together.
const EXTENDED_MAX: u64 = 4 << 20;
/// Bytes of a name: more than any kernel takes in one call.
const NAME_MAX: usize = 16 << 10;

/// What an archive cannot be read for.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The stream itself: truncated, a broken compression, a cut connection.
    #[error("the archive cannot be read at byte {at}")]
    Read {
        /// Of the archive, unpacked.
        at: u64,
        /// What the stream said.
        source: io::Error,
    },
    /// Not a header.
    #[error(
        "the header at byte {at} has a wrong checksum: this is not a tar archive, or it is damaged"
    )]
    Checksum {
        /// Of the archive.
        at: u64,
    },
    /// A field that should be a number.
    #[error("the {what} in the header at byte {at} is not a number that fits")]
    Number {
        /// Of the archive.
        at: u64,
        /// The field.
        what: &'static str,
    },
    /// An extended header that does not parse.
    #[error("the extended header at byte {at} has a malformed record")]
    Record {
        /// Of the archive.
        at: u64,
    },
    /// A record whose value is nonsense.
    #[error("the extended header at byte {at} has a value for `{key}` that makes no sense")]
    Value {
        /// Of the archive.
        at: u64,
        /// The record's.
        key: String,
    },
    /// More than we are ready to keep.
    #[error(
        "the extended headers at byte {at} are longer than {EXTENDED_MAX} bytes, or a name is longer than {NAME_MAX}"
    )]
    TooLong {
        /// Of the archive.
        at: u64,
    },
    /// Overlapping, unordered, beyond the end, too many extents.
    #[error("the sparse file at byte {at} has a map that makes no sense")]
    SparseMap {
        /// Of the archive.
        at: u64,
    },
    /// Continuations of other volumes and what nobody knows.
    #[error("the entry at byte {at} is of the unknown kind `{kind}`")]
    Kind {
        /// Of the archive.
        at: u64,
        /// As the archive says.
        kind: char,
    },
}

/// What kind of file an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// With data.
    File,
    /// `link` is a path in the archive's tree.
    HardLink,
    /// `link` is its text.
    Symlink,
    /// Character device.
    Char,
    /// Block device.
    Block,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// One member of an archive.
#[derive(Debug, Clone)]
pub struct Entry {
    /// As the archive says; anything at all.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Target of a link.
    pub link: Vec<u8>,
    /// Permission bits, set-id and sticky bits; nothing else.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds and nanoseconds since the epoch.
    pub mtime: (i64, u32),
    /// Bytes, holes included.
    pub size: u64,
    /// Of devices: major and minor number.
    pub device: (u32, u32),
    /// Name and value.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Extents that have data (offset, length), ascending. Without: all of it.
    pub sparse: Option<Vec<(u64, u64)>>,
    /// Where its data begins in the archive.
    pub data_at: u64,
}

/// An archive that is being read. Call [`next`](Self::next), read the entry's data from the reader
/// (which is [`Read`] and ends where the data ends; for a sparse file the extents follow each other),
/// call `next` again.
pub struct Reader<R> {
    input: R,
    at: u64,
    /// Of the current entry: data not read yet, and the zeros after it.
    left: u64,
    padding: u64,
    globals: Extended,
}

impl<R: Read> Reader<R> {
    /// At an archive's first byte.
    pub fn new(input: R) -> Self {
        Self {
            input,
            at: 0,
            left: 0,
            padding: 0,
            globals: Extended::default(),
        }
    }

    /// The input, wherever it is: for what follows the archive's end.
    pub fn into_inner(self) -> R {
        self.input
    }

    /// The next entry, skipping what is left of the data of the one before.
    #[expect(
        clippy::should_implement_trait,
        reason = "it lends nothing, but it is no iterator: data is read in between"
    )]
    pub fn next(&mut self) -> Result<Option<Entry>, TarError> {
        self.skip()?;
        let mut extended = self.globals.clone();
        let mut budget = EXTENDED_MAX;
        loop {
            let at = self.at;
            let mut block = [0; BLOCK];
            if !self.block(&mut block)? {
                return Ok(None);
            }
            let Some(header) = Header::parse(&block, at)? else {
                // One block of zeros ends it; that there should be two is nobody's loss.
                return Ok(None);
            };
            let kind = header.kind();
            match kind {
                b'x' | b'X' | b'g' | b'L' | b'K' => {
                    let bytes = self.short(header.size()?, &mut budget)?;
                    match kind {
                        b'g' => {
                            self.globals.parse(&bytes, at)?;
                            extended.parse(&bytes, at)?;
                        }
                        b'L' => extended.path = Some(name(&bytes)),
                        b'K' => extended.link = Some(name(&bytes)),
                        _ => extended.parse(&bytes, at)?,
                    }
                }
                // The label of a volume.
                b'V' => {
                    self.left = header.size()?;
                    self.padding = padding(self.left);
                    self.skip()?;
                }
                _ => return self.entry(&header, extended, at).map(Some),
            }
        }
    }

    fn entry(
        &mut self,
        header: &Header<'_>,
        extended: Extended,
        at: u64,
    ) -> Result<Entry, TarError> {
        let path = match extended.sparse.name.clone().or(extended.path) {
            Some(path) => path,
            None => header.path(),
        };
        let link = extended.link.unwrap_or_else(|| header.link());
        if path.len() > NAME_MAX || link.len() > NAME_MAX {
            return Err(TarError::TooLong { at });
        }
        let kind = match header.kind() {
            // Before POSIX a directory was a file whose name ends so.
            0 | b'0' if path.ends_with(b"/") => Kind::Directory,
            0 | b'0' | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::Char,
            b'4' => Kind::Block,
            b'5' | b'D' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                return Err(TarError::Kind {
                    at,
                    kind: char::from(other),
                });
            }
        };
        let has_data = kind == Kind::File || header.kind() == b'D';
        let stored = match (has_data, extended.size) {
            (false, _) => 0,
            (true, Some(size)) => size,
            (true, None) => header.size()?,
        };
        if stored
            .checked_add(at)
            .is_none_or(|end| end > i64::MAX.unsigned_abs())
        {
            return Err(TarError::Number { at, what: "size" });
        }
        let mut entry = Entry {
            path,
            kind,
            link,
            mode: u16::try_from(header.mode()? & 0o7777).unwrap_or(0),
            uid: match extended.uid {
                Some(uid) => uid,
                None => header.uid()?,
            },
            gid: match extended.gid {
                Some(gid) => gid,
                None => header.gid()?,
            },
            mtime: match extended.mtime {
                Some(mtime) => mtime,
                None => (header.mtime()?, 0),
            },
            size: if kind == Kind::File { stored } else { 0 },
            device: match kind {
                Kind::Char | Kind::Block => header.device()?,
                _ => (0, 0),
            },
            xattrs: extended.xattrs,
            sparse: None,
            data_at: 0,
        };
        let old_sparse = match header.kind() {
            b'S' => Some(header.sparse()?),
            _ => None,
        };
        self.left = stored;
        self.padding = padding(stored);
        if let Some((size, map, more)) = old_sparse {
            let map = self.rest_of_map(map, more, at)?;
            entry.size = size;
            entry.sparse = Some(map);
        } else if kind == Kind::File && extended.sparse.seen {
            let map = match extended.sparse.map_in_data {
                true => self.map_before_data(at)?,
                false => extended.sparse.map,
            };
            entry.size = extended.sparse.size.ok_or(TarError::SparseMap { at })?;
            entry.sparse = Some(map);
        }
        if let Some(map) = &entry.sparse {
            check_map(map, entry.size, self.left).ok_or(TarError::SparseMap { at })?;
        }
        entry.data_at = self.at;
        Ok(entry)
    }

    /// GNU's old form: blocks of 21 extents after the header, which its size does not count.
    fn rest_of_map(
        &mut self,
        mut map: Vec<(u64, u64)>,
        mut more: bool,
        at: u64,
    ) -> Result<Vec<(u64, u64)>, TarError> {
        while more {
            let mut block = [0; BLOCK];
            self.exact(&mut block)?;
            let (entries, flag) = block.split_at(504);
            header::sparse_entries(entries, at, &mut map)?;
            more = flag.first().is_some_and(|b| *b != 0);
            if map.len() > pax::MAP_MAX {
                return Err(TarError::SparseMap { at });
            }
        }
        Ok(map)
    }

    /// GNU's form 1.0: decimal numbers, one a line, in whole blocks before the data.
    fn map_before_data(&mut self, at: u64) -> Result<Vec<(u64, u64)>, TarError> {
        let wrong = || TarError::SparseMap { at };
        let mut numbers = Vec::new();
        let mut wanted = 1;
        let mut digits = Vec::new();
        while numbers.len() < wanted {
            let mut block = [0; BLOCK];
            self.left = self.left.checked_sub(BLOCK as u64).ok_or_else(wrong)?;
            self.exact(&mut block)?;
            for byte in block {
                if numbers.len() == wanted {
                    break;
                }
                if byte != b'\n' {
                    digits.push(byte);
                    continue;
                }
                numbers.push(pax::decimal(&digits).ok_or_else(wrong)?);
                digits.clear();
                if let [count] = numbers.as_slice() {
                    let count = usize::try_from(*count).ok().filter(|c| *c <= pax::MAP_MAX);
                    wanted = count.ok_or_else(wrong)? * 2 + 1;
                }
            }
        }
        let pairs = numbers.get(1..).unwrap_or_default().chunks_exact(2);
        Ok(pairs
            .filter_map(|pair| Some((*pair.first()?, *pair.last()?)))
            .collect())
    }

    /// The data of an extended header.
    fn short(&mut self, size: u64, budget: &mut u64) -> Result<Vec<u8>, TarError> {
        *budget = budget
            .checked_sub(size)
            .ok_or(TarError::TooLong { at: self.at })?;
        let padded = size + padding(size);
        let mut bytes = Vec::new();
        let at = self.at;
        let read = (&mut self.input).take(padded).read_to_end(&mut bytes);
        let read = read.map_err(|source| TarError::Read { at, source })? as u64;
        self.at += read;
        if read < padded {
            return Err(truncated(self.at));
        }
        bytes.truncate(usize::try_from(size).unwrap_or(usize::MAX));
        Ok(bytes)
    }

    fn skip(&mut self) -> Result<(), TarError> {
        let mut left = self.left + self.padding;
        (self.left, self.padding) = (0, 0);
        let mut buffer = [0; 16 << 10];
        while left > 0 {
            let want = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            let part = buffer.get_mut(..want).unwrap_or_default();
            self.exact(part)?;
            left -= want as u64;
        }
        Ok(())
    }

    /// A block, or false at the end of the stream.
    fn block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, TarError> {
        let mut filled = 0;
        while filled < BLOCK {
            let rest = block.get_mut(filled..).unwrap_or_default();
            match self.input.read(rest) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(truncated(self.at)),
                Ok(n) => {
                    filled += n;
                    self.at += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(TarError::Read {
                        at: self.at,
                        source,
                    });
                }
            }
        }
        Ok(true)
    }

    fn exact(&mut self, buf: &mut [u8]) -> Result<(), TarError> {
        let at = self.at;
        self.input
            .read_exact(buf)
            .map_err(|source| TarError::Read { at, source })?;
        self.at += buf.len() as u64;
        Ok(())
    }
}

impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(buf.len());
        if want == 0 {
            return Ok(0);
        }
        let n = self.input.read(buf.get_mut(..want).unwrap_or_default())?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= n as u64;
        self.at += n as u64;
        Ok(n)
    }
}

fn truncated(at: u64) -> TarError {
    TarError::Read {
        at,
        source: io::ErrorKind::UnexpectedEof.into(),
    }
}

fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

fn name(bytes: &[u8]) -> Vec<u8> {
    bytes.split(|b| *b == 0).next().unwrap_or_default().to_vec()
}

/// Ascending, within the file, as much as is stored.
fn check_map(map: &[(u64, u64)], size: u64, stored: u64) -> Option<()> {
    let mut end = 0_u64;
    let mut sum = 0_u64;
    for (offset, length) in map {
        if *offset < end {
            return None;
        }
        end = offset.checked_add(*length)?;
        sum = sum.checked_add(*length)?;
    }
    (end <= size && size <= i64::MAX.unsigned_abs() && sum == stored).then_some(())
}
