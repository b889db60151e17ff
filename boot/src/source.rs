//! The file an image comes from, whatever kind of file it is.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use thiserror::Error;

/// Bytes taken from a pipe or socket before it is called endless.
const STREAM_LIMIT: u64 = 1 << 30;

/// A file could not be read. Each message names the file as the caller named it.
#[derive(Debug, Error)]
pub enum SourceError {
    /// The host refused.
    #[error("cannot {action} {name}")]
    Io {
        /// Path or `fd:N`.
        name: Box<str>,
        /// What was tried, as a verb.
        action: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// It is a directory.
    #[error("{name} is a directory; name a file in it")]
    Directory {
        /// Path or `fd:N`.
        name: Box<str>,
    },
    /// It has no bytes.
    #[error("{name} is empty")]
    Empty {
        /// Path or `fd:N`.
        name: Box<str>,
    },
    /// A stream that does not end.
    #[error("{name} is a stream of more than {STREAM_LIMIT} bytes; give a regular file")]
    Endless {
        /// Path or `fd:N`.
        name: Box<str>,
    },
}

#[derive(Debug)]
enum Bytes {
    /// Regular file or block device: read at offsets, perhaps mapped.
    File(File),
    /// What a stream had to say.
    Memory(Vec<u8>),
}

/// A readable image: a regular file, a block device, or the whole of a stream, never empty.
#[derive(Debug)]
pub struct Source {
    name: Box<str>,
    bytes: Bytes,
    size: u64,
}

impl Source {
    /// Opens the file at `path` for reading.
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        let name = path.display().to_string();
        match File::open(path) {
            Ok(file) => Self::from_file(&name, file),
            Err(source) => Err(SourceError::Io {
                name: name.into(),
                action: "open",
                source,
            }),
        }
    }

    /// Wraps an open file; `name` is what errors call it. A pipe or socket is read to its end.
    pub fn from_file(name: &str, file: File) -> Result<Self, SourceError> {
        let io_error = |action| {
            move |source| SourceError::Io {
                name: name.into(),
                action,
                source,
            }
        };
        let metadata = file.metadata().map_err(io_error("stat"))?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            return Err(SourceError::Directory { name: name.into() });
        }
        let (bytes, size) = if kind.is_file() {
            (Bytes::File(file), metadata.len())
        } else if kind.is_block_device() {
            let size =
                io::Seek::seek(&mut &file, io::SeekFrom::End(0)).map_err(io_error("seek in"))?;
            (Bytes::File(file), size)
        } else {
            let mut bytes = Vec::new();
            let mut bounded = file.take(STREAM_LIMIT.saturating_add(1));
            let read = bounded.read_to_end(&mut bytes).map_err(io_error("read"))?;
            let size = u64::try_from(read).unwrap_or(u64::MAX);
            if size > STREAM_LIMIT {
                return Err(SourceError::Endless { name: name.into() });
            }
            (Bytes::Memory(bytes), size)
        };
        Self::new(name, bytes, size)
    }

    /// An image that is in memory already.
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<Self, SourceError> {
        let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        Self::new(name, Bytes::Memory(bytes), size)
    }

    fn new(name: &str, bytes: Bytes, size: u64) -> Result<Self, SourceError> {
        if size == 0 {
            return Err(SourceError::Empty { name: name.into() });
        }
        Ok(Self {
            name: name.into(),
            bytes,
            size,
        })
    }

    /// Path or `fd:N`, as errors call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes in it when it was opened.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Fills `buffer` from `offset`; the end of the file inside the buffer is an error.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        let result = match &self.bytes {
            Bytes::File(file) => file.read_exact_at(buffer, offset),
            Bytes::Memory(bytes) => match part(bytes, offset, buffer.len()) {
                Some(from) => {
                    buffer.copy_from_slice(from);
                    Ok(())
                }
                None => Err(io::ErrorKind::UnexpectedEof.into()),
            },
        };
        result.map_err(|source| self.error("read", source))
    }

    /// The first bytes, up to `limit`.
    pub(crate) fn head(&self, limit: usize) -> Result<Vec<u8>, SourceError> {
        let size = usize::try_from(self.size).unwrap_or(usize::MAX).min(limit);
        let mut head = vec![0; size];
        self.read_at(0, &mut head)?;
        Ok(head)
    }

    /// The file behind it, unless it is in memory.
    pub(crate) fn file(&self) -> Option<&File> {
        match &self.bytes {
            Bytes::File(file) => Some(file),
            Bytes::Memory(_) => None,
        }
    }

    /// The bytes, if they are in memory.
    pub(crate) fn memory(&self) -> Option<&[u8]> {
        match &self.bytes {
            Bytes::File(_) => None,
            Bytes::Memory(bytes) => Some(bytes),
        }
    }

    pub(crate) fn error(&self, action: &'static str, source: io::Error) -> SourceError {
        SourceError::Io {
            name: self.name.clone(),
            action,
            source,
        }
    }
}

/// `size` bytes of `bytes` at `offset`, if there are so many.
pub(crate) fn part(bytes: &[u8], offset: u64, size: usize) -> Option<&[u8]> {
    bytes.get(usize::try_from(offset).ok()?..)?.get(..size)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_pipe_is_read_to_its_end() {
        let (reader, mut writer) = io::pipe().unwrap();
        let feeder = std::thread::spawn(move || writer.write_all(&[7; 200_000]).unwrap());
        let source =
            Source::from_file("fd:9", File::from(std::os::fd::OwnedFd::from(reader))).unwrap();
        feeder.join().unwrap();
        assert_eq!(source.size(), 200_000);
        let mut tail = [0; 4];
        source.read_at(199_996, &mut tail).unwrap();
        assert_eq!(tail, [7; 4]);
        let error = source.read_at(199_997, &mut tail).unwrap_err();
        assert_eq!(error.to_string(), "cannot read fd:9");
    }

    #[test]
    fn what_is_no_image_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Source::open(dir.path()).unwrap_err().to_string();
        assert!(
            error.ends_with("is a directory; name a file in it"),
            "{error}"
        );
        let empty = dir.path().join("empty");
        File::create(&empty).unwrap();
        assert!(
            Source::open(&empty)
                .unwrap_err()
                .to_string()
                .ends_with("is empty")
        );
        let absent = Source::open(&dir.path().join("absent"))
            .unwrap_err()
            .to_string();
        assert!(absent.starts_with("cannot open "), "{absent}");
    }
}
