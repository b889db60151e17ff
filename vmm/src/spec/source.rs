//! Files named by path or handed over as descriptors.
#![expect(
    unsafe_code,
    reason = "takes over descriptors the caller handed in by number"
)]

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::OFlags;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A path, or `fd:N` for a descriptor inherited from the parent process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(
    with = "String",
    description = "A path, or `fd:N` for an inherited descriptor"
)]
pub enum Source {
    /// Opened by the VMM at start.
    Path(PathBuf),
    /// Inherited; the VMM owns it from now on.
    Fd(RawFd),
}

/// A file could not be had.
#[derive(Debug, Error)]
pub enum SourceError {
    /// `fd:` without a number.
    #[error("`{0}` is not a descriptor: write fd: and a number greater than 2")]
    NotAnFd(String),
    /// The path cannot be opened.
    #[error("cannot open {what} {}", path.display())]
    Open {
        /// What it is for: "kernel", "initrd".
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// It is a directory.
    #[error("{what} {name} is a directory; name a file in it")]
    Directory {
        /// What it is for.
        what: &'static str,
        /// Path or descriptor.
        name: String,
    },
    /// The descriptor was not opened for reading and writing.
    #[error("{what} {name} is not open for reading and writing; open it so, or ask for read-only")]
    NotWritable {
        /// What it is for.
        what: &'static str,
        /// Path or descriptor.
        name: String,
    },
    /// The descriptor is not open.
    #[error(
        "{what} fd:{fd} is not an open descriptor of this process; pass it on when starting testudo-vmm"
    )]
    Closed {
        /// What it is for.
        what: &'static str,
        /// Its number.
        fd: RawFd,
    },
}

impl Source {
    /// The descriptor behind it, opened for reading if it is a path.
    pub fn open(&self, what: &'static str) -> Result<File, SourceError> {
        let file = match self {
            Self::Path(path) => File::open(path).map_err(|source| SourceError::Open {
                what,
                path: path.clone(),
                source,
            })?,
            Self::Fd(fd) => {
                File::from(inherited(*fd).ok_or(SourceError::Closed { what, fd: *fd })?)
            }
        };
        if file.metadata().is_ok_and(|m| m.is_dir()) {
            return Err(SourceError::Directory {
                what,
                name: self.to_string(),
            });
        }
        Ok(file)
    }

    /// As [`Self::open`], for reading and writing.
    pub fn open_writable(&self, what: &'static str) -> Result<File, SourceError> {
        let file = match self {
            Self::Fd(_) => self.open(what)?,
            Self::Path(path) => {
                File::options()
                    .read(true)
                    .write(true)
                    .open(path)
                    .map_err(|source| SourceError::Open {
                        what,
                        path: path.clone(),
                        source,
                    })?
            }
        };
        let flags = rustix::fs::fcntl_getfl(&file);
        if flags.is_ok_and(|f| f & OFlags::RWMODE == OFlags::RDWR) {
            return Ok(file);
        }
        Err(SourceError::NotWritable {
            what,
            name: self.to_string(),
        })
    }

    /// The path, if it is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Path(path) => Some(path),
            Self::Fd(_) => None,
        }
    }
}

/// Takes over an inherited descriptor; `None` if it is not open. Each number may be taken once,
/// which checking the specification for duplicates ensures.
pub(crate) fn inherited(fd: RawFd) -> Option<OwnedFd> {
    // SAFETY: F_GETFD and F_SETFD take no pointers; a closed descriptor answers EBADF.
    let open = unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } >= 0;
    // SAFETY: the descriptor is open, was handed to this process for this purpose, and is named
    // once in the specification, so nobody else in the process owns it.
    open.then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

impl FromStr for Source {
    type Err = SourceError;
    fn from_str(text: &str) -> Result<Self, SourceError> {
        match text.strip_prefix("fd:") {
            None => Ok(Self::Path(PathBuf::from(text))),
            Some(number) => number
                .parse()
                .ok()
                .filter(|fd| *fd > 2)
                .map(Self::Fd)
                .ok_or_else(|| SourceError::NotAnFd(text.to_owned())),
        }
    }
}

impl TryFrom<String> for Source {
    type Error = SourceError;
    fn try_from(text: String) -> Result<Self, SourceError> {
        text.parse()
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Fd(fd) => write!(f, "fd:{fd}"),
        }
    }
}

impl From<Source> for String {
    fn from(source: Source) -> Self {
        source.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_descriptors() {
        assert_eq!("/boot/x".parse::<Source>().unwrap().to_string(), "/boot/x");
        assert_eq!("fd:7".parse::<Source>().unwrap(), Source::Fd(7));
        for bad in ["fd:", "fd:-1", "fd:1", "fd:x"] {
            assert!(
                matches!(bad.parse::<Source>(), Err(SourceError::NotAnFd(_))),
                "{bad}"
            );
        }
        let closed = Source::Fd(987_654).open("kernel").unwrap_err();
        assert!(
            closed
                .to_string()
                .contains("fd:987654 is not an open descriptor"),
            "{closed}"
        );
        let directory = Source::Path("/".into()).open("kernel").unwrap_err();
        assert_eq!(
            directory.to_string(),
            "kernel / is a directory; name a file in it"
        );
    }
}
