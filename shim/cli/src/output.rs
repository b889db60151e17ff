//! A container's output as it is kept.
//!
//! ```text
//!  | milliseconds since 1970: u64 | stream: u8 | length: u32 | bytes |   integers little-endian
//! ```
//! Binary output stays what it was. When the file is full it becomes `log.1`, and the one before it goes.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};

/// Bytes before each piece's own.
const HEAD: usize = 13;
/// No piece is longer.
const PIECE: usize = 1 << 20;

/// Which output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// One piece of output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Milliseconds since 1970.
    pub at_ms: u64,
    /// Which output.
    pub stream: Stream,
    /// What was written.
    pub bytes: Vec<u8>,
}

/// The file a container's output is kept in.
pub struct OutputLog {
    path: PathBuf,
    file: File,
    length: u64,
    most: u64,
}

impl OutputLog {
    /// Begins a pod's.
    pub fn create(folder: &Path, most: u64) -> io::Result<Self> {
        let path = folder.join("log");
        let file = File::options().create(true).append(true).open(&path)?;
        let length = file.metadata()?.len();
        Ok(Self {
            path,
            file,
            length,
            most,
        })
    }

    /// Adds a piece.
    pub fn add(&mut self, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        if self.length > self.most {
            std::fs::rename(&self.path, self.path.with_extension("1"))?;
            self.file = File::options().create(true).append(true).open(&self.path)?;
            self.length = 0;
        }
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        let mut record = Vec::with_capacity(HEAD.saturating_add(bytes.len()));
        record.extend_from_slice(&crate::clock::now_ms().to_le_bytes());
        record.push(match stream {
            Stream::Out => 1,
            Stream::Err => 2,
        });
        record.extend_from_slice(&length.to_le_bytes());
        record.extend_from_slice(bytes);
        self.file.write_all(&record)?;
        let written = u64::try_from(record.len()).unwrap_or(u64::MAX);
        self.length = self.length.saturating_add(written);
        Ok(())
    }
}

/// Reads a file of output; `None` at its present end, of which there may be more later.
pub struct OutputReader {
    file: BufReader<File>,
    /// The beginning of a piece that was not complete.
    rest: Vec<u8>,
}

impl OutputReader {
    /// From its beginning.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self {
            file: BufReader::new(File::open(path)?),
            rest: Vec::new(),
        })
    }

    /// The next piece.
    pub fn next_piece(&mut self) -> io::Result<Option<Piece>> {
        if !self.fill(HEAD)? {
            return Ok(None);
        }
        let bad = || {
            io::Error::new(
                io::ErrorKind::InvalidData,
                "this is no log of a container's output",
            )
        };
        let (at, rest) = self.rest.split_first_chunk::<8>().ok_or_else(bad)?;
        let (stream, rest) = rest.split_first().ok_or_else(bad)?;
        let length = rest.first_chunk::<4>().ok_or_else(bad)?;
        let (at_ms, length) = (u64::from_le_bytes(*at), u32::from_le_bytes(*length));
        let stream = match stream {
            1 => Stream::Out,
            2 => Stream::Err,
            _ => return Err(bad()),
        };
        let length = usize::try_from(length)
            .ok()
            .filter(|length| *length <= PIECE)
            .ok_or_else(bad)?;
        if !self.fill(HEAD.saturating_add(length))? {
            return Ok(None);
        }
        let bytes = std::mem::take(&mut self.rest).split_off(HEAD);
        Ok(Some(Piece {
            at_ms,
            stream,
            bytes,
        }))
    }

    /// Whether there are so many bytes.
    fn fill(&mut self, wanted: usize) -> io::Result<bool> {
        let missing = wanted.saturating_sub(self.rest.len());
        let missing = u64::try_from(missing).unwrap_or(u64::MAX);
        self.file
            .by_ref()
            .take(missing)
            .read_to_end(&mut self.rest)?;
        Ok(self.rest.len() >= wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_growing_files_are_followed() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = OutputLog::create(dir.path(), 1 << 20).unwrap();
        log.add(Stream::Out, b"\0\xff\n").unwrap();
        let mut reader = OutputReader::open(&dir.path().join("log")).unwrap();
        let piece = reader.next_piece().unwrap().unwrap();
        assert_eq!(
            (piece.stream, piece.bytes.as_slice()),
            (Stream::Out, b"\0\xff\n".as_slice())
        );
        assert_eq!(reader.next_piece().unwrap(), None);
        log.add(Stream::Err, b"more").unwrap();
        assert_eq!(reader.next_piece().unwrap().unwrap().bytes, b"more");
    }

    #[test]
    fn a_full_file_makes_room_and_garbage_is_no_log() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = OutputLog::create(dir.path(), 10).unwrap();
        for text in ["one", "two", "three"] {
            log.add(Stream::Out, text.as_bytes()).unwrap();
        }
        let read = |name: &str| {
            OutputReader::open(&dir.path().join(name))
                .unwrap()
                .next_piece()
                .unwrap()
                .unwrap()
        };
        assert_eq!(
            (read("log.1").bytes, read("log").bytes),
            (b"two".to_vec(), b"three".to_vec())
        );
        std::fs::write(dir.path().join("bad"), [9; 40]).unwrap();
        assert!(
            OutputReader::open(&dir.path().join("bad"))
                .unwrap()
                .next_piece()
                .is_err()
        );
    }
}
