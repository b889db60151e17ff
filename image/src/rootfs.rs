//! What a container's root is made of.

use std::fs::File;
use std::io::Read as _;
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::erofs::read::{ReadError, Reader};
use crate::users::read_small;

/// The root file system of an image, on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rootfs {
    /// An image file, read-only: for the VM a disk or pmem.
    Erofs(PathBuf),
    /// A directory that somebody unpacked: shared with the VM.
    Directory(PathBuf),
}

/// Why a file of it cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// The image file.
    #[error("{path}")]
    Erofs {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: ReadError,
    },
    /// The directory.
    #[error("{file} in {path}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What in it.
        file: String,
        /// Why not.
        source: std::io::Error,
    },
}

impl Rootfs {
    /// Where it is.
    pub fn path(&self) -> &std::path::Path {
        match self {
            Self::Erofs(path) | Self::Directory(path) => path,
        }
    }

    /// A small file, `None` if there is none. Symlinks are followed as the container would: never out
    /// of the root.
    pub fn read(&self, file: &str, max: u64) -> Result<Option<Vec<u8>>, RootfsError> {
        match self {
            Self::Erofs(path) => {
                let wrong = |source| RootfsError::Erofs {
                    path: path.clone(),
                    source,
                };
                let image = Reader::open(path).map_err(wrong)?;
                read_small(&image, file, max).map_err(wrong)
            }
            Self::Directory(path) => {
                let wrong = |source| RootfsError::Directory {
                    path: path.clone(),
                    file: file.to_owned(),
                    source,
                };
                let root = File::open(path).map_err(wrong)?;
                // Neither a pipe nor a device may hold us up.
                let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
                let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
                let opened = rustix::fs::openat2(&root, file, flags, Mode::empty(), inside);
                let opened = match opened {
                    Ok(opened) => File::from(opened),
                    Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(None),
                    Err(error) => return Err(wrong(error.into())),
                };
                let mut bytes = Vec::new();
                opened.take(max).read_to_end(&mut bytes).map_err(wrong)?;
                Ok(Some(bytes))
            }
        }
    }
}
