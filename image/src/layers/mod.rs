//! Layers to one EROFS file: what `tar` and the image specification say is applied to a tree in memory
//! (`tree`), data goes straight to where it stays.
//!
//! ```text
//!  reader thread                         caller's thread
//!  layer ─▶ gunzip/zstd ─▶ pieces ══▶ digest ─▶ tar ─┬▶ names, attributes ─▶ Tree ──┐
//!                                                    └▶ data ─▶ DataArea ═▶ file ◀──┴─ at the end
//! ```

mod apply;
mod stream;
pub mod tree;

use std::fs::File;
use std::io::{self, Read};

use crate::digest::{Digest, Hasher};
use crate::erofs::data::{DataArea, DataError};
use crate::erofs::write::{Written, write};
use crate::tar::{self, TarError};
use apply::apply;
use stream::Stream;
pub(crate) use stream::{is_packed, unpacked};
use tree::Tree;
pub use tree::TreeError;

/// What an image may cost. Beyond it, unpacking ends with an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all layers, unpacked.
    pub unpacked: u64,
    /// Entries of all layers.
    pub entries: u64,
    /// Bytes of names, links, attributes and maps, which are kept in memory.
    pub metadata: u64,
}

impl Default for Limits {
    /// 128 GiB unpacked, four million entries, 512 MiB of metadata.
    fn default() -> Self {
        Self {
            unpacked: 128 << 30,
            entries: 4 << 20,
            metadata: 512 << 20,
        }
    }
}

/// Where one layer comes from.
pub struct Layer {
    /// As messages should name it.
    pub name: String,
    /// The bytes: tar, or that compressed by gzip or zstd; they are looked at to see which.
    pub input: Box<dyn Read + Send>,
    /// Of the tar.
    pub diff_id: Digest,
}

/// Why layers could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The layer could not be opened.
    #[error("layer {layer} cannot be opened")]
    Open {
        /// Which.
        layer: String,
        /// Why.
        source: io::Error,
    },
    /// The archive is broken.
    #[error("layer {layer}")]
    Tar {
        /// Which.
        layer: String,
        /// How.
        source: TarError,
    },
    /// An entry that cannot be what it wants to be.
    #[error("layer {layer}: the entry `{path}` cannot be unpacked")]
    Entry {
        /// Which layer.
        layer: String,
        /// Which entry.
        path: String,
        /// Why not.
        source: TreeError,
    },
    /// An entry's attributes do not fit.
    #[error(
        "layer {layer}: the extended attributes of `{path}` are larger than a file system can keep"
    )]
    Xattrs {
        /// Which layer.
        layer: String,
        /// Which entry.
        path: String,
    },
    /// Reading an entry's data or writing it.
    #[error("layer {layer}: the entry `{path}` cannot be stored")]
    Data {
        /// Which layer.
        layer: String,
        /// Which entry.
        path: String,
        /// Why not.
        source: DataError,
    },
    /// Not what the image's configuration says.
    #[error(
        "layer {layer} unpacks to {found}, and should to {wanted}: it is damaged, or not what it is said to be"
    )]
    Digest {
        /// Which layer.
        layer: String,
        /// What the configuration says.
        wanted: Digest,
        /// What it is.
        found: Digest,
    },
    /// Larger than allowed.
    #[error(
        "layer {layer}: the image has more than {limit} {what} unpacked; the limit is there to stop compression bombs, raise it if the image is meant to be so"
    )]
    Limit {
        /// Where it was seen.
        layer: String,
        /// Of what.
        what: &'static str,
        /// How many.
        limit: u64,
    },
    /// Everything behind the data.
    #[error("the image file cannot be completed")]
    Write(#[source] DataError),
}

/// Unpacks layers, lowest first, to `file`, which is empty. `progress` hears how many bytes were
/// unpacked, now and then; `uuid` is the file system's.
pub fn unpack(
    layers: impl IntoIterator<Item = Result<Layer, UnpackError>>,
    file: &File,
    uuid: [u8; 16],
    limits: Limits,
    progress: &mut dyn FnMut(usize, u64),
) -> Result<Written, UnpackError> {
    let mut tree = Tree::new();
    let mut data = DataArea::new(file);
    let mut left = limits;
    for (index, layer) in layers.into_iter().enumerate() {
        tree.next_layer();
        one(
            index, layer?, &mut tree, &mut data, &mut left, limits, progress,
        )?;
    }
    log::debug!(
        "{} bytes of files are there twice or more and were stored once",
        data.shared()
    );
    write(&tree, data, file, uuid).map_err(UnpackError::Write)
}

fn one(
    index: usize,
    layer: Layer,
    tree: &mut Tree,
    data: &mut DataArea<'_>,
    left: &mut Limits,
    limits: Limits,
    progress: &mut dyn FnMut(usize, u64),
) -> Result<(), UnpackError> {
    let Layer {
        name,
        input,
        diff_id,
    } = layer;
    std::thread::scope(|scope| {
        let open = |source| UnpackError::Open {
            layer: name.clone(),
            source,
        };
        let stream = Stream::start(scope, input).map_err(open)?;
        let hashed = Hashed {
            stream,
            hasher: Hasher::new(diff_id.algorithm()),
            left: left.unpacked,
            seen: 0,
            told: 0,
            progress: &mut |bytes| progress(index, bytes),
            exceeded: false,
        };
        let mut archive = tar::Reader::new(hashed);
        let applied = apply(&mut archive, &name, tree, data, left, limits);
        let mut hashed = archive.into_inner();
        // What follows the archive's end counts for the digest.
        let drained = applied.and_then(|()| {
            io::copy(&mut hashed, &mut io::sink()).map_err(|source| UnpackError::Tar {
                layer: name.clone(),
                source: TarError::Read {
                    at: hashed.seen,
                    source,
                },
            })
        });
        if hashed.exceeded {
            let (what, limit) = ("bytes", limits.unpacked);
            return Err(UnpackError::Limit {
                layer: name.clone(),
                what,
                limit,
            });
        }
        drained?;
        left.unpacked = hashed.left;
        (hashed.progress)(hashed.seen);
        let found = hashed.hasher.finish();
        if found != diff_id {
            return Err(UnpackError::Digest {
                layer: name.clone(),
                wanted: diff_id,
                found,
            });
        }
        Ok(())
    })
}

/// Hashes, counts and limits what comes out of a layer.
struct Hashed<'p> {
    stream: Stream,
    hasher: Hasher,
    left: u64,
    seen: u64,
    told: u64,
    progress: &'p mut dyn FnMut(u64),
    exceeded: bool,
}

/// Bytes between two words of progress.
const TELL_EVERY: u64 = 4 << 20;

impl Read for Hashed<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.stream.read(buf)?;
        self.hasher.update(buf.get(..n).unwrap_or_default());
        self.seen += n as u64;
        match self.left.checked_sub(n as u64) {
            Some(left) => self.left = left,
            None => {
                self.exceeded = true;
                return Err(io::Error::other("it is larger than the limit"));
            }
        }
        if self.seen - self.told >= TELL_EVERY {
            self.told = self.seen;
            (self.progress)(self.seen);
        }
        Ok(n)
    }
}
