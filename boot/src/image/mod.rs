//! What kind of kernel a file is, and the facts in its headers that placing it needs.

mod bzimage;
mod elf;
mod looks;

pub use bzimage::Bzimage;
pub(crate) use bzimage::ENTRY_64;
pub use elf::Elf;
use thiserror::Error;

use crate::source::{Source, SourceError};

/// Enough of a file for the setup header of a bzImage (ends below 0x290) and for `looks`.
const HEAD: usize = 4096;

/// A file is not a kernel this VMM can start. Each message names the file.
#[derive(Debug, Error)]
pub enum KernelError {
    /// The file could not be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Neither bzImage nor x86_64 ELF.
    #[error("{name} is not a kernel for x86_64: it looks like {looks}")]
    Unknown {
        /// The file.
        name: Box<str>,
        /// What it looks like and, where there is one, the remedy.
        looks: &'static str,
    },
    /// A bzImage from before the 64-bit entry was described.
    #[error(
        "{name} speaks boot protocol {}.{:02}, and 2.12 (Linux 3.8) is the oldest with the 64-bit entry; use a newer kernel",
        version >> 8, version & 0xff
    )]
    Protocol {
        /// The file.
        name: Box<str>,
        /// Version in the header, major in the high byte.
        version: u16,
    },
    /// A 32-bit kernel.
    #[error("{name} is a 32-bit kernel; use one built for x86_64")]
    Not64 {
        /// The file.
        name: Box<str>,
    },
    /// Less of it than its header says.
    #[error("{name} is truncated: {what} ends at byte {end} and the file has {size}")]
    Truncated {
        /// The file.
        name: Box<str>,
        /// The part that is cut off.
        what: &'static str,
        /// Where it would end.
        end: u64,
        /// Bytes of the file.
        size: u64,
    },
    /// A header contradicts itself or passes a bound.
    #[error("{name} is damaged: {what}")]
    Damaged {
        /// The file.
        name: Box<str>,
        /// What is wrong.
        what: &'static str,
    },
}

/// A file known to be a kernel.
#[derive(Debug)]
pub struct Image {
    source: Source,
    kind: ImageKind,
}

/// Which kind of kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageKind {
    /// Compressed kernel with a setup header; decompresses itself.
    Bzimage(Bzimage),
    /// `vmlinux`.
    Elf(Elf),
}

impl Image {
    /// Reads the headers of `source`.
    pub fn identify(source: Source) -> Result<Self, KernelError> {
        let head = source.head(HEAD)?;
        let kind = if bzimage::has_magic(&head) {
            ImageKind::Bzimage(Bzimage::parse(&source, &head)?)
        } else if elf::has_magic(&head) {
            ImageKind::Elf(Elf::parse(&source, &head)?)
        } else {
            return Err(KernelError::Unknown {
                name: source.name().into(),
                looks: looks::like(&head),
            });
        };
        Ok(Self { source, kind })
    }

    /// The file.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// What it is.
    pub fn kind(&self) -> &ImageKind {
        &self.kind
    }
}

/// Fails unless the first `end` bytes are there.
fn reaches(source: &Source, what: &'static str, end: u64) -> Result<(), KernelError> {
    if end <= source.size() {
        return Ok(());
    }
    Err(KernelError::Truncated {
        name: source.name().into(),
        what,
        end,
        size: source.size(),
    })
}

fn damaged(source: &Source, what: &'static str) -> KernelError {
    KernelError::Damaged {
        name: source.name().into(),
        what,
    }
}
