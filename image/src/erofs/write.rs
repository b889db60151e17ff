//! Writes directories, inodes and the superblock behind the data: first every inode gets its place, then
//! all are written, in one pass each.
//!
//! The same tree and the same data give the same bytes.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::data::{ContentId, DataArea, DataError, Sink};
use super::inode::Inode;
use super::{
    BLOCK, BLOCK_BITS, BLOCK_LEN, CHUNK_INDEXES, COMPAT_CHECKSUM, COMPAT_MTIME, DIRENT_LEN,
    EXTENDED_LEN, INCOMPAT_CHUNKED_FILE, Layout, MAGIC, NULL_BLOCK, S_IFBLK, S_IFCHR, S_IFDIR,
    S_IFIFO, S_IFLNK, S_IFREG, SLOT, SUPER_LEN, SUPER_OFFSET, crc, encode_device, xattr,
};
use crate::layers::tree::{Body, Node, NodeId, ROOT, Tree};

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Bytes of the image.
    pub size: u64,
    /// Files in it.
    pub inodes: u64,
}

/// Where an inode comes to be.
#[derive(Clone, Copy)]
struct Place {
    nid: u64,
    /// Order of writing and inode number.
    ino: u32,
    layout: Layout,
    /// First block of a directory or a long symlink.
    block: u32,
}

struct Writer<'t, 'f> {
    tree: &'t Tree,
    data: &'t DataArea<'f>,
    places: HashMap<NodeId, Place>,
    /// In the order of their places.
    order: Vec<(NodeId, NodeId)>,
    /// The next free byte of the metadata, and block of the directories.
    at: u64,
    block: u64,
    chunked: bool,
}

/// Turns the tree into an image whose data is in `file` already. `uuid` names it.
pub fn write(
    tree: &Tree,
    mut data: DataArea<'_>,
    file: &File,
    uuid: [u8; 16],
) -> Result<Written, DataError> {
    let first = data.finish()?;
    let mut writer = Writer {
        tree,
        data: &data,
        places: HashMap::new(),
        order: Vec::new(),
        // Inode number 0 would be no number.
        at: EXTENDED_LEN,
        block: first,
        chunked: false,
    };
    writer.place_all()?;
    let meta = writer.block;
    let size = meta
        .checked_mul(BLOCK)
        .and_then(|start| start.checked_add(writer.at.next_multiple_of(BLOCK)))
        .ok_or(DataError::TooLarge)?;
    file.set_len(size).map_err(DataError::Write)?;
    writer.write_all(file, meta)?;
    let inodes = writer.order.len() as u64;
    let blocks = u32::try_from(size / BLOCK).map_err(|_| DataError::TooLarge)?;
    let root = writer.places.get(&ROOT).map_or(0, |p| p.nid);
    let superblock = superblock(&Super {
        root: u16::try_from(root).map_err(|_| DataError::TooLarge)?,
        inodes,
        blocks,
        meta: u32::try_from(meta).map_err(|_| DataError::TooLarge)?,
        chunked: writer.chunked,
        uuid,
    });
    file.write_all_at(&superblock, 0)
        .map_err(DataError::Write)?;
    Ok(Written { size, inodes })
}

impl Writer<'_, '_> {
    /// A directory, then what is in it, then what is in the directories of that.
    fn place_all(&mut self) -> Result<(), DataError> {
        self.place(ROOT, ROOT)?;
        let mut pending = vec![ROOT];
        while let Some(dir) = pending.pop() {
            let names = self.tree.children(dir).into_iter().flatten();
            let mut dirs = Vec::new();
            for (_, name) in names {
                if self.tree.children(name.node).is_some() {
                    dirs.push(name.node);
                }
                self.place(name.node, dir)?;
            }
            pending.extend(dirs.into_iter().rev());
        }
        Ok(())
    }

    fn place(&mut self, id: NodeId, parent: NodeId) -> Result<(), DataError> {
        let Some(node) = self.tree.node(id) else {
            return Ok(());
        };
        if self.places.contains_key(&id) {
            return Ok(());
        }
        let head = EXTENDED_LEN + xattr::size(&node.meta.xattrs).0;
        let (layout, after) = match &node.body {
            Body::Directory(_) => inline_tail(head, dir_size(self.tree, id)),
            Body::Symlink(text) => match text.len() as u64 {
                len if head + len <= BLOCK => (Layout::FlatInline, len),
                _ => (Layout::FlatPlain, 0),
            },
            Body::File(content) => self.map_of(*content, head),
            _ => (Layout::FlatPlain, 0),
        };
        // Neither the fixed part nor an inline end may lie in two blocks.
        let offset = self.at % BLOCK;
        let together = if layout == Layout::FlatInline {
            head + after
        } else {
            EXTENDED_LEN
        };
        if offset + together > BLOCK {
            self.at = self.at.next_multiple_of(BLOCK);
        }
        let block = u32::try_from(self.block).map_err(|_| DataError::TooLarge)?;
        let whole = match &node.body {
            Body::Directory(_) if layout == Layout::FlatInline => dir_size(self.tree, id) / BLOCK,
            Body::Directory(_) => dir_size(self.tree, id).div_ceil(BLOCK),
            Body::Symlink(text) if layout == Layout::FlatPlain => {
                (text.len() as u64).div_ceil(BLOCK)
            }
            _ => 0,
        };
        self.block += whole;
        let ino = u32::try_from(self.order.len() + 1).map_err(|_| DataError::TooLarge)?;
        let place = Place {
            nid: self.at / SLOT,
            ino,
            layout,
            block,
        };
        self.at = (self.at + head + after).next_multiple_of(SLOT);
        self.places.insert(id, place);
        self.order.push((id, parent));
        Ok(())
    }

    /// The layout of a file, and bytes after its head.
    fn map_of(&mut self, id: ContentId, head: u64) -> (Layout, u64) {
        match self.data.get(id) {
            Some(content) if content.plain().is_none() => {
                self.chunked = true;
                let aligned = head.next_multiple_of(8) - head;
                (Layout::ChunkBased, aligned + content.chunks() * 8)
            }
            _ => (Layout::FlatPlain, 0),
        }
    }

    fn write_all(&self, file: &File, meta: u64) -> Result<(), DataError> {
        let mut inodes = Sink::new(file);
        let mut blocks = Sink::new(file);
        let mut bytes = Vec::new();
        for (id, parent) in &self.order {
            let (Some(node), Some(place)) = (self.tree.node(*id), self.places.get(id)) else {
                continue;
            };
            bytes.clear();
            self.inode(node, *id, place).encode(&mut bytes);
            xattr::encode(&node.meta.xattrs, &mut bytes);
            let content = match &node.body {
                Body::Directory(_) => self.dir(*id, *parent),
                Body::Symlink(text) => text.to_vec(),
                Body::File(content) if place.layout == Layout::ChunkBased => {
                    self.chunks(*content, &mut bytes);
                    Vec::new()
                }
                _ => Vec::new(),
            };
            let split = match place.layout {
                Layout::FlatInline => content.len() - content.len() % BLOCK_LEN,
                _ => content.len(),
            };
            let (whole, end) = content.split_at_checked(split).unwrap_or_default();
            bytes.extend_from_slice(end);
            let at = meta * BLOCK + place.nid * SLOT;
            inodes.write(at, &bytes).map_err(DataError::Write)?;
            if !whole.is_empty() {
                let at = u64::from(place.block) * BLOCK;
                blocks.write(at, whole).map_err(DataError::Write)?;
            }
        }
        inodes.flush().map_err(DataError::Write)?;
        blocks.flush().map_err(DataError::Write)
    }

    fn inode(&self, node: &Node, id: NodeId, place: &Place) -> Inode {
        let (kind, size, at, nlink) = match &node.body {
            Body::Directory(names) => {
                let dirs = names
                    .values()
                    .filter(|n| self.tree.children(n.node).is_some());
                let nlink = u32::try_from(dirs.count() + 2).unwrap_or(u32::MAX);
                (S_IFDIR, dir_size(self.tree, id), place.block, nlink)
            }
            Body::File(content) => {
                let content = self.data.get(*content);
                let at = match content.and_then(super::data::Content::plain) {
                    Some(block) => block,
                    None => {
                        let bits = content.map_or(0, |c| c.chunk_bits - BLOCK_BITS);
                        bits | u32::from(CHUNK_INDEXES)
                    }
                };
                (S_IFREG, content.map_or(0, |c| c.size), at, node.links)
            }
            Body::Symlink(text) => (S_IFLNK, text.len() as u64, place.block, node.links),
            Body::Char(device) => (S_IFCHR, 0, encode_device(*device), node.links),
            Body::Block(device) => (S_IFBLK, 0, encode_device(*device), node.links),
            Body::Fifo => (S_IFIFO, 0, 0, node.links),
        };
        Inode {
            nid: place.nid,
            mode: kind | (node.meta.mode & 0o7777),
            uid: node.meta.uid,
            gid: node.meta.gid,
            nlink,
            size,
            mtime: node.meta.mtime,
            layout: place.layout as u16,
            extended: true,
            xattr_count: xattr::size(&node.meta.xattrs).1,
            ino: place.ino,
            place: at,
        }
    }

    /// A chunk's index: no advice, device 0, its first block.
    fn chunks(&self, id: ContentId, out: &mut Vec<u8>) {
        out.resize(out.len().next_multiple_of(8), 0);
        let Some(content) = self.data.get(id) else {
            return;
        };
        let per_chunk = 1_u32 << (content.chunk_bits - BLOCK_BITS);
        let mut runs = content.runs.iter().peekable();
        for chunk in 0..content.chunks() {
            while runs
                .peek()
                .is_some_and(|run| run.chunk + run.chunks <= chunk)
            {
                runs.next();
            }
            let block = match runs.peek() {
                Some(run) if run.chunk <= chunk => u32::try_from(chunk - run.chunk)
                    .map_or(NULL_BLOCK, |n| {
                        run.block.wrapping_add(n.wrapping_mul(per_chunk))
                    }),
                _ => NULL_BLOCK,
            };
            out.extend_from_slice(&[0; 4]);
            out.extend_from_slice(&block.to_le_bytes());
        }
    }

    /// Blocks of entries, each sorted, with the names after the entries.
    fn dir(&self, id: NodeId, parent: NodeId) -> Vec<u8> {
        let entries = entries(self.tree, id, parent);
        let mut out = Vec::new();
        for block in dir_blocks(&entries) {
            out.resize(out.len().next_multiple_of(BLOCK_LEN), 0);
            let mut name_at = block.len() * DIRENT_LEN;
            for (name, node) in block {
                let nid = self.places.get(node).map_or(0, |p| p.nid);
                let offset = u16::try_from(name_at).unwrap_or(u16::MAX);
                out.extend_from_slice(&nid.to_le_bytes());
                out.extend_from_slice(&offset.to_le_bytes());
                out.extend_from_slice(&[file_type(self.tree.node(*node)), 0]);
                name_at += name.len();
            }
            for (name, _) in block {
                out.extend_from_slice(name);
            }
        }
        out
    }
}

/// EROFS_FT_*
fn file_type(node: Option<&Node>) -> u8 {
    match node.map(|n| &n.body) {
        Some(Body::File(_)) => 1,
        Some(Body::Directory(_)) => 2,
        Some(Body::Char(_)) => 3,
        Some(Body::Block(_)) => 4,
        Some(Body::Fifo) => 5,
        Some(Body::Symlink(_)) => 7,
        None => 0,
    }
}

/// Names with `.` and `..`, sorted as bytes.
fn entries(tree: &Tree, id: NodeId, parent: NodeId) -> Vec<(&[u8], NodeId)> {
    let names = tree.children(id).into_iter().flatten();
    let mut entries: Vec<(&[u8], NodeId)> = names.map(|(name, at)| (&**name, at.node)).collect();
    entries.push((b".", id));
    entries.push((b"..", parent));
    entries.sort_unstable_by_key(|(name, _)| *name);
    entries
}

/// As many entries to a block as fit.
fn dir_blocks<'e, 'n>(
    entries: &'e [(&'n [u8], NodeId)],
) -> impl Iterator<Item = &'e [(&'n [u8], NodeId)]> {
    let mut rest = entries;
    std::iter::from_fn(move || {
        let mut used = 0;
        let fits = |(name, _): &&(&[u8], NodeId)| {
            used += DIRENT_LEN + name.len();
            used <= BLOCK_LEN
        };
        let count = rest.iter().take_while(fits).count();
        let (block, after) = rest.split_at_checked(count)?;
        rest = after;
        (!block.is_empty()).then_some(block)
    })
}

fn dir_size(tree: &Tree, id: NodeId) -> u64 {
    let entries = entries(tree, id, id);
    let mut size = 0_u64;
    for block in dir_blocks(&entries) {
        let bytes: usize = block.iter().map(|(name, _)| DIRENT_LEN + name.len()).sum();
        size = size.next_multiple_of(BLOCK) + bytes as u64;
    }
    size
}

/// The end of a directory stands behind its inode if there is room in the block.
fn inline_tail(head: u64, size: u64) -> (Layout, u64) {
    let tail = size % BLOCK;
    match tail > 0 && head + tail <= BLOCK {
        true => (Layout::FlatInline, tail),
        false => (Layout::FlatPlain, 0),
    }
}

struct Super {
    root: u16,
    inodes: u64,
    blocks: u32,
    meta: u32,
    chunked: bool,
    uuid: [u8; 16],
}

/// Block 0: struct erofs_super_block at byte 1024, whose checksum is of what follows it as well.
fn superblock(of: &Super) -> Vec<u8> {
    let mut s = Vec::with_capacity(BLOCK_LEN);
    s.extend_from_slice(&MAGIC.to_le_bytes());
    s.extend_from_slice(&[0; 4]);
    s.extend_from_slice(&(COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
    s.extend_from_slice(&[u8::try_from(BLOCK_BITS).unwrap_or(12), 0]);
    s.extend_from_slice(&of.root.to_le_bytes());
    s.extend_from_slice(&of.inodes.to_le_bytes());
    // The image's time is the epoch: inodes have their own.
    s.extend_from_slice(&[0; 12]);
    // No shared xattrs.
    for word in [of.blocks, of.meta, 0] {
        s.extend_from_slice(&word.to_le_bytes());
    }
    s.extend_from_slice(&of.uuid);
    s.extend_from_slice(b"testudo\0\0\0\0\0\0\0\0\0");
    let incompatible = if of.chunked { INCOMPAT_CHUNKED_FILE } else { 0 };
    s.extend_from_slice(&incompatible.to_le_bytes());
    s.resize(SUPER_LEN, 0);
    s.resize(BLOCK_LEN - usize::try_from(SUPER_OFFSET).unwrap_or(0), 0);
    let checksum = crc::crc32c(!0, &s);
    if let Some(field) = s.get_mut(4..8) {
        field.copy_from_slice(&checksum.to_le_bytes());
    }
    let mut block = vec![0; usize::try_from(SUPER_OFFSET).unwrap_or(0)];
    block.append(&mut s);
    block
}

impl From<DataError> for io::Error {
    fn from(error: DataError) -> Self {
        io::Error::other(error)
    }
}
