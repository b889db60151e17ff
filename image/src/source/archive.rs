//! An archive as a folder of files: where each is in it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::tar::{Kind, Reader, TarError};

/// Entries of an archive of images; it has a few for each layer.
const ENTRIES_MAX: usize = 1 << 16;
/// Links to links.
const HOPS_MAX: usize = 8;

/// Files of an archive, by name.
#[derive(Debug)]
pub(crate) struct Files {
    file: Arc<File>,
    at: HashMap<String, Place>,
}

#[derive(Debug)]
enum Place {
    /// Offset and length.
    Data(u64, u64),
    /// Another name.
    Link(String),
}

impl Files {
    /// Reads all headers of an archive that is not compressed.
    pub(crate) fn index(file: File) -> Result<Self, TarError> {
        let mut at = HashMap::new();
        let skipping = Skipping { file: &file, at: 0 };
        let mut archive = Reader::new(skipping);
        while let Some(entry) = archive.next()? {
            let name = String::from_utf8_lossy(&entry.path).into_owned();
            let name = normal("", &name);
            let target = String::from_utf8_lossy(&entry.link);
            let place = match entry.kind {
                Kind::File if entry.sparse.is_none() => Place::Data(entry.data_at, entry.size),
                // Old `docker save` has the second of two same layers as a symlink to the first.
                Kind::Symlink => Place::Link(normal(
                    name.rsplit_once('/').map_or("", |(dir, _)| dir),
                    &target,
                )),
                Kind::HardLink => Place::Link(normal("", &target)),
                _ => continue,
            };
            if at.len() >= ENTRIES_MAX {
                break;
            }
            at.insert(name, place);
        }
        Ok(Self {
            file: Arc::new(file),
            at,
        })
    }

    /// Is there one?
    pub(crate) fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// A file's bytes.
    pub(crate) fn open(&self, name: &str) -> io::Result<(Section, u64)> {
        let missing = || {
            io::Error::new(
                io::ErrorKind::NotFound,
                format!("the archive has no file `{name}`"),
            )
        };
        let (at, len) = self.find(name).ok_or_else(missing)?;
        let section = Section {
            file: Arc::clone(&self.file),
            at,
            left: len,
        };
        Ok((section, len))
    }

    fn find(&self, name: &str) -> Option<(u64, u64)> {
        let mut name = normal("", name);
        for _ in 0..HOPS_MAX {
            match self.at.get(&name)? {
                Place::Data(at, len) => return Some((*at, *len)),
                Place::Link(to) => name.clone_from(to),
            }
        }
        None
    }
}

/// Relative to `dir`, without dots.
fn normal(dir: &str, path: &str) -> String {
    let base = if path.starts_with('/') { "" } else { dir };
    let mut parts: Vec<&str> = Vec::new();
    for part in base.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// Part of a file, read without moving it.
pub(crate) struct Section {
    file: Arc<File>,
    at: u64,
    left: u64,
}

impl Section {
    /// All of a file.
    pub(crate) fn whole(file: &Arc<File>) -> io::Result<Self> {
        let left = file.metadata()?.len();
        let file = Arc::clone(file);
        Ok(Self { file, at: 0, left })
    }
}

impl Read for Section {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(buf.len());
        let n = self
            .file
            .read_at(buf.get_mut(..want).unwrap_or_default(), self.at)?;
        if n == 0 && want > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.at += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

/// Reads an archive for its headers: what is skipped is read as well, but from the page cache at worst
/// once. Seeking would save that; the reader of tar knows streams only.
struct Skipping<'f> {
    file: &'f File,
    at: u64,
}

impl Read for Skipping<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buf, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

/// Back to the first byte.
pub(crate) fn rewind(file: &mut File) -> io::Result<()> {
    file.seek(SeekFrom::Start(0)).map(|_| ())
}
