//! The data area: contents of files, written once each as they come. What is written is at once where
//! it stays; only where it is is remembered.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};
use sha2::{Digest as _, Sha256};

use super::space::{Space, Span};
use super::{BLOCK, BLOCK_BITS, BLOCK_LEN};

/// Read at once, looked at for zeros at once; files up to it are written only if nobody has written
/// the same before.
const PIECE: usize = 256 << 10;
/// Holes are looked for in units of no less (1 MiB), so that ordinary files are one run.
const CHUNK_BITS_MIN: u32 = 20;
/// A file has no more chunks than so.
const CHUNKS_MAX: u64 = 1 << 16;
const SINK: usize = 1 << 20;

/// Which content; of a [`DataArea`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentId(u32);

/// Chunks that follow each other in the file and on the disk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub(super) chunk: u64,
    pub(super) block: u32,
    pub(super) chunks: u64,
}

#[derive(Debug)]
pub(super) struct Content {
    pub(super) size: u64,
    pub(super) chunk_bits: u32,
    pub(super) runs: Vec<Run>,
    span: Span,
    refs: u32,
    hash: Option<[u8; 32]>,
}

impl Content {
    pub(super) fn chunks(&self) -> u64 {
        self.size.div_ceil(1 << self.chunk_bits)
    }

    /// The first block, if it is one run without holes.
    pub(super) fn plain(&self) -> Option<u32> {
        match self.runs.as_slice() {
            _ if self.size == 0 => Some(0),
            [run] if run.chunk == 0 && run.chunks == self.chunks() => Some(run.block),
            _ => None,
        }
    }
}

/// Why content could not be stored.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The layer's stream.
    #[error("the data of the file cannot be read")]
    Read(#[source] io::Error),
    /// The disk.
    #[error("the image file cannot be written")]
    Write(#[source] io::Error),
    /// 16 TiB.
    #[error("the image would be larger than 16 TiB")]
    TooLarge,
}

/// Contents and their places in the file that becomes the image.
pub struct DataArea<'a> {
    sink: Sink<'a>,
    space: Space,
    contents: Vec<Content>,
    known: HashMap<[u8; 32], ContentId>,
    piece: Vec<u8>,
    shared: u64,
}

impl<'a> DataArea<'a> {
    /// In an empty file.
    pub fn new(file: &'a File) -> Self {
        Self {
            sink: Sink::new(file),
            space: Space::new(),
            contents: Vec::new(),
            known: HashMap::new(),
            piece: vec![0; PIECE],
            shared: 0,
        }
    }

    /// Bytes that did not have to be stored because the same content was there.
    pub fn shared(&self) -> u64 {
        self.shared
    }

    /// Stores `size` bytes, which `data` gives: all of them, or those of the extents of `map`, which is
    /// ascending and within `size`.
    pub fn add(
        &mut self,
        size: u64,
        map: Option<&[(u64, u64)]>,
        data: &mut dyn Read,
    ) -> Result<ContentId, DataError> {
        match map {
            None if size <= PIECE as u64 => self.add_small(size, data),
            None => self.add_large(size, &[(0, size)], true, data),
            Some(map) => self.add_large(size, map, false, data),
        }
    }

    /// One more file has this content.
    pub fn share(&mut self, id: ContentId) {
        if let Some(content) = self.get_mut(id) {
            content.refs = content.refs.saturating_add(1);
        }
    }

    /// One file less has this content; with the last one its blocks are free.
    pub fn release(&mut self, id: ContentId) -> Result<(), DataError> {
        let Some(content) = self.get_mut(id) else {
            return Ok(());
        };
        content.refs = content.refs.saturating_sub(1);
        if content.refs > 0 {
            return Ok(());
        }
        let (span, hash) = (content.span, content.hash.take());
        content.runs = Vec::new();
        if let Some(hash) = hash {
            self.known.remove(&hash);
        }
        self.free(span)
    }

    pub(super) fn get(&self, id: ContentId) -> Option<&Content> {
        self.contents.get(usize::try_from(id.0).ok()?)
    }

    /// No more data: everything is in the file, nothing is where nothing is used. The first block after.
    pub(super) fn finish(&mut self) -> Result<u64, DataError> {
        self.sink.flush().map_err(DataError::Write)?;
        Ok(self.space.end())
    }

    fn get_mut(&mut self, id: ContentId) -> Option<&mut Content> {
        self.contents.get_mut(usize::try_from(id.0).ok()?)
    }

    fn add_small(&mut self, size: u64, data: &mut dyn Read) -> Result<ContentId, DataError> {
        let len = usize::try_from(size).map_err(|_| DataError::TooLarge)?;
        let piece = self.piece.get_mut(..len).unwrap_or_default();
        data.read_exact(piece).map_err(DataError::Read)?;
        let hash: [u8; 32] = Sha256::digest(&*piece).into();
        if let Some(id) = self.same(&hash, size) {
            return Ok(id);
        }
        let span = self
            .space
            .take(size.div_ceil(BLOCK))
            .ok_or(DataError::TooLarge)?;
        let piece = self.piece.get(..len).unwrap_or_default();
        self.sink
            .write(u64::from(span.start) * BLOCK, piece)
            .map_err(DataError::Write)?;
        let run = Run {
            chunk: 0,
            block: span.start,
            chunks: 1,
        };
        self.remember(Content {
            size,
            chunk_bits: CHUNK_BITS_MIN,
            runs: vec![run],
            span,
            refs: 1,
            hash: Some(hash),
        })
    }

    fn add_large(
        &mut self,
        size: u64,
        map: &[(u64, u64)],
        hashed: bool,
        data: &mut dyn Read,
    ) -> Result<ContentId, DataError> {
        let chunk_bits = chunk_bits(size);
        let wanted = blocks_touched(map, size, chunk_bits).ok_or(DataError::TooLarge)?;
        let span = self.space.take(wanted).ok_or(DataError::TooLarge)?;
        let mut placed = Placed {
            size,
            chunk_bits,
            span,
            used: 0,
            runs: Vec::new(),
            current: None,
        };
        let mut hasher = hashed.then(Sha256::new);
        let written = self.copy(map, &mut placed, hasher.as_mut(), data);
        let used = Span {
            start: span.start,
            blocks: placed.used,
        };
        let unused = Span {
            start: span.start.saturating_add(placed.used),
            blocks: span.blocks - placed.used,
        };
        self.space.give_back(unused);
        written?;
        let hash = hasher.map(|h| h.finalize().into());
        if let Some(hash) = &hash
            && let Some(id) = self.same(hash, size)
        {
            self.free(used)?;
            return Ok(id);
        }
        self.remember(Content {
            size,
            chunk_bits,
            runs: placed.runs,
            span: used,
            refs: 1,
            hash,
        })
    }

    fn copy(
        &mut self,
        map: &[(u64, u64)],
        placed: &mut Placed,
        mut hasher: Option<&mut Sha256>,
        data: &mut dyn Read,
    ) -> Result<(), DataError> {
        for (offset, length) in map {
            let (mut at, mut left) = (*offset, *length);
            while left > 0 {
                // Up to the next multiple of a piece, so that no piece is in two chunks.
                let room = PIECE as u64 - at % PIECE as u64;
                let want = usize::try_from(left.min(room)).map_err(|_| DataError::TooLarge)?;
                let piece = self.piece.get_mut(..want).unwrap_or_default();
                data.read_exact(piece).map_err(DataError::Read)?;
                if let Some(hasher) = hasher.as_mut() {
                    hasher.update(&*piece);
                }
                if !is_zero(piece) {
                    let place = placed.place(at).ok_or(DataError::TooLarge)?;
                    self.sink.write(place, piece).map_err(DataError::Write)?;
                }
                at += want as u64;
                left -= want as u64;
            }
        }
        Ok(())
    }

    fn same(&mut self, hash: &[u8; 32], size: u64) -> Option<ContentId> {
        let id = self.known.get(hash).copied()?;
        self.share(id);
        self.shared = self.shared.saturating_add(size);
        Some(id)
    }

    fn remember(&mut self, content: Content) -> Result<ContentId, DataError> {
        let id = ContentId(u32::try_from(self.contents.len()).map_err(|_| DataError::TooLarge)?);
        if let Some(hash) = content.hash {
            self.known.insert(hash, id);
        }
        self.contents.push(content);
        Ok(id)
    }

    /// Free blocks read as zeros: whoever gets them need not write what is zero.
    fn free(&mut self, span: Span) -> Result<(), DataError> {
        let start = u64::from(span.start) * BLOCK;
        let length = u64::from(span.blocks) * BLOCK;
        self.sink.clear(start, length).map_err(DataError::Write)?;
        self.space.give_back(span);
        Ok(())
    }
}

/// Where the chunks of one file come to be.
struct Placed {
    size: u64,
    chunk_bits: u32,
    span: Span,
    used: u32,
    runs: Vec<Run>,
    current: Option<(u64, u32)>,
}

impl Placed {
    /// Where the byte at `offset` of the file goes; offsets ascend.
    fn place(&mut self, offset: u64) -> Option<u64> {
        let chunk = offset >> self.chunk_bits;
        let block = match self.current {
            Some((current, block)) if current == chunk => block,
            _ => {
                let block = self.span.start.checked_add(self.used)?;
                let start = chunk << self.chunk_bits;
                let bytes = self.size.checked_sub(start)?.min(1 << self.chunk_bits);
                let blocks = u32::try_from(bytes.div_ceil(BLOCK)).ok()?;
                self.used = self
                    .used
                    .checked_add(blocks)
                    .filter(|u| *u <= self.span.blocks)?;
                match self.runs.last_mut() {
                    Some(run) if run.chunk + run.chunks == chunk => run.chunks += 1,
                    _ => self.runs.push(Run {
                        chunk,
                        block,
                        chunks: 1,
                    }),
                }
                self.current = Some((chunk, block));
                block
            }
        };
        Some(u64::from(block) * BLOCK + (offset - (chunk << self.chunk_bits)))
    }
}

/// Holes are found in larger units in larger files.
fn chunk_bits(size: u64) -> u32 {
    let mut bits = CHUNK_BITS_MIN;
    while size.div_ceil(1 << bits) > CHUNKS_MAX && bits < BLOCK_BITS + 31 {
        bits += 1;
    }
    bits
}

/// Blocks of the chunks in which there is data.
fn blocks_touched(map: &[(u64, u64)], size: u64, chunk_bits: u32) -> Option<u64> {
    let mut blocks = 0_u64;
    let mut next = 0;
    for (offset, length) in map.iter().filter(|(_, length)| *length > 0) {
        let last = offset.checked_add(length - 1)? >> chunk_bits;
        let first = (offset >> chunk_bits).max(next);
        if first <= last {
            let start = first << chunk_bits;
            let end = size.min((last + 1) << chunk_bits);
            blocks = blocks.checked_add((end - start).div_ceil(BLOCK))?;
            next = last + 1;
        }
    }
    Some(blocks)
}

/// In steps that compilers make wide.
fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(512)
        .all(|step| step.iter().fold(0, |any, byte| any | byte) == 0)
}

/// Gathers writes that follow each other. Whatever was not written reads as zeros.
pub(super) struct Sink<'a> {
    file: &'a File,
    at: u64,
    buffer: Vec<u8>,
    /// Beyond it nothing was ever written.
    written: u64,
}

impl<'a> Sink<'a> {
    pub(super) fn new(file: &'a File) -> Self {
        Self {
            file,
            at: 0,
            buffer: Vec::with_capacity(SINK),
            written: 0,
        }
    }

    pub(super) fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let end = self.at + self.buffer.len() as u64;
        // From the end of a file to the next block nothing is missing but zeros.
        let gap = at
            .checked_sub(end)
            .and_then(|gap| usize::try_from(gap).ok());
        match gap.filter(|gap| *gap < BLOCK_LEN && !self.buffer.is_empty()) {
            Some(gap) => self.buffer.resize(self.buffer.len() + gap, 0),
            None => {
                self.flush()?;
                self.at = at;
            }
        }
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= SINK {
            self.flush()?;
        }
        Ok(())
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.buffer, self.at)?;
        self.at += self.buffer.len() as u64;
        self.written = self.written.max(self.at);
        self.buffer.clear();
        Ok(())
    }

    fn clear(&mut self, start: u64, length: u64) -> io::Result<()> {
        let kept = start
            .checked_sub(self.at)
            .and_then(|n| usize::try_from(n).ok());
        match kept {
            Some(kept) if start + length >= self.at + self.buffer.len() as u64 => {
                self.buffer.truncate(kept);
            }
            _ => self.flush()?,
        }
        let length = length.min(self.written.saturating_sub(start));
        if length == 0 {
            return Ok(());
        }
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(self.file, punch, start, length) {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                self.zeros(start, length)
            }
            other => Ok(other?),
        }
    }

    fn zeros(&mut self, start: u64, length: u64) -> io::Result<()> {
        let zeros = [0; 16 << 10];
        let mut done = 0;
        while done < length {
            let step = usize::try_from(length - done)
                .unwrap_or(usize::MAX)
                .min(zeros.len());
            self.file
                .write_all_at(zeros.get(..step).unwrap_or_default(), start + done)?;
            done += step as u64;
        }
        Ok(())
    }
}
