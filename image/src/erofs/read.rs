//! Reads uncompressed EROFS images without mounting them: ours, and those of mkfs.erofs without
//! compression. An image is untrusted: every number is checked where it is used, nothing is kept that
//! the image could make large.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::inode::{Inode, field};
use super::{
    BLOCK, BLOCK_BITS, BLOCK_LEN, CHUNK_BITS_MASK, CHUNK_INDEXES, DIRENT_LEN,
    INCOMPAT_CHUNKED_FILE, Layout, MAGIC, NULL_BLOCK, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK,
    S_IFMT, S_IFREG, S_IFSOCK, SLOT, SUPER_LEN, SUPER_OFFSET, decode_device, xattr,
};

/// Bytes of a symlink's text.
const SYMLINK_MAX: u64 = 16 << 10;
/// Bytes of xattrs of one inode.
const XATTRS_MAX: u64 = 300 << 10;

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The disk, or an address beyond the image's end.
    #[error("the image cannot be read at byte {at}")]
    Io {
        /// Where.
        at: u64,
        /// Why.
        source: io::Error,
    },
    /// Something else.
    #[error("this is not an EROFS image")]
    NotErofs,
    /// Compression, other block sizes, several devices.
    #[error("the image uses a feature of EROFS that is not read here: {0}")]
    Unsupported(&'static str),
    /// Damaged.
    #[error("the image is damaged: {what} of inode {nid}")]
    Damaged {
        /// What makes no sense.
        what: &'static str,
        /// Where.
        nid: u64,
    },
}

/// Name and value of an extended attribute.
pub type Pair = (Vec<u8>, Vec<u8>);

/// What an image is read from.
pub trait ReadAt {
    /// Fills `buf` or fails.
    fn read_exact_at(&self, buf: &mut [u8], at: u64) -> io::Result<()>;
}

impl ReadAt for File {
    fn read_exact_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buf, at)
    }
}

impl ReadAt for [u8] {
    fn read_exact_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        let source = usize::try_from(at)
            .ok()
            .and_then(|at| self.get(at..)?.get(..buf.len()));
        match source {
            Some(bytes) => {
                buf.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl<T: ReadAt + ?Sized> ReadAt for &T {
    fn read_exact_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        (**self).read_exact_at(buf, at)
    }
}

/// What kind of file an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileType {
    /// With data.
    File,
    /// With names.
    Directory,
    /// With a text.
    Symlink,
    /// Character device.
    Char,
    /// Block device.
    Block,
    /// Named pipe.
    Fifo,
    /// Unix socket.
    Socket,
}

impl Inode {
    /// From the mode.
    pub fn file_type(&self) -> Result<FileType, ReadError> {
        Ok(match self.mode & S_IFMT {
            S_IFREG => FileType::File,
            S_IFDIR => FileType::Directory,
            S_IFLNK => FileType::Symlink,
            S_IFCHR => FileType::Char,
            S_IFBLK => FileType::Block,
            S_IFIFO => FileType::Fifo,
            S_IFSOCK => FileType::Socket,
            _ => return Err(damaged(self.nid, "the mode")),
        })
    }

    /// Major and minor number of a device.
    pub fn device(&self) -> (u32, u32) {
        decode_device(self.place)
    }
}

/// An open image.
#[derive(Debug)]
pub struct Reader<S> {
    source: S,
    meta: u64,
    xattrs: u64,
    root: u64,
    time: (i64, u32),
    inodes: u64,
}

impl Reader<File> {
    /// Opens an image file.
    pub fn open(path: &Path) -> Result<Self, ReadError> {
        let file = File::open(path).map_err(|source| ReadError::Io { at: 0, source })?;
        Self::new(file)
    }
}

impl<S: ReadAt> Reader<S> {
    /// Checks the superblock.
    pub fn new(source: S) -> Result<Self, ReadError> {
        let mut s = [0; SUPER_LEN];
        source
            .read_exact_at(&mut s, SUPER_OFFSET)
            .map_err(|_| ReadError::NotErofs)?;
        let half = |at| field(&s, at).map_or(0, u16::from_le_bytes);
        let word = |at| field(&s, at).map_or(0, u32::from_le_bytes);
        if word(0) != MAGIC {
            return Err(ReadError::NotErofs);
        }
        if s.get(12).map(|b| u32::from(*b)) != Some(BLOCK_BITS) {
            return Err(ReadError::Unsupported("blocks that are not 4 KiB"));
        }
        if word(80) & !INCOMPAT_CHUNKED_FILE != 0 {
            return Err(ReadError::Unsupported("compression, or what came after it"));
        }
        if half(86) != 0 {
            return Err(ReadError::Unsupported("several devices"));
        }
        let seconds = field(&s, 24).map_or(0, i64::from_le_bytes);
        Ok(Self {
            meta: u64::from(word(40)) * BLOCK,
            xattrs: u64::from(word(44)) * BLOCK,
            root: half(14).into(),
            time: (seconds, word(32)),
            inodes: field(&s, 16).map_or(0, u64::from_le_bytes),
            source,
        })
    }

    /// Files there are, by the superblock.
    pub fn inodes(&self) -> u64 {
        self.inodes
    }

    /// The root directory.
    pub fn root(&self) -> Result<Inode, ReadError> {
        self.inode(self.root)
    }

    /// The inode of this number.
    pub fn inode(&self, nid: u64) -> Result<Inode, ReadError> {
        let at = self.at(nid)?;
        let mut bytes = [0; 64];
        let (head, tail) = bytes.split_at_mut(32);
        self.read(head, at)?;
        // A compact inode may be the last thing in an image.
        if head.first().is_some_and(|b| b & 1 == 1) {
            self.read(tail, at + 32)?;
        }
        Inode::decode(nid, &bytes, self.time).ok_or(damaged(nid, "the format"))
    }

    /// Reads a file's bytes from `offset`; fewer than asked for at its end only.
    pub fn read_file(
        &self,
        inode: &Inode,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<usize, ReadError> {
        let left = inode.size.saturating_sub(offset);
        let want = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        let buf = buf.get_mut(..want).unwrap_or_default();
        let mut done = 0;
        while done < want {
            let at = offset + done as u64;
            let rest = buf.get_mut(done..).unwrap_or_default();
            let (source, run) = self.map(inode, at)?;
            let step = usize::try_from(run).unwrap_or(usize::MAX).min(rest.len());
            let part = rest.get_mut(..step).unwrap_or_default();
            match source {
                Some(address) => self.read(part, address)?,
                None => part.fill(0),
            }
            if step == 0 {
                return Err(damaged(inode.nid, "the map"));
            }
            done += step;
        }
        Ok(done)
    }

    /// A whole file, if it has no more than `max` bytes.
    pub fn read_whole(&self, inode: &Inode, max: u64) -> Result<Vec<u8>, ReadError> {
        if inode.size > max {
            return Err(damaged(inode.nid, "the size"));
        }
        let mut bytes =
            vec![0; usize::try_from(inode.size).map_err(|_| damaged(inode.nid, "the size"))?];
        let n = self.read_file(inode, 0, &mut bytes)?;
        bytes.truncate(n);
        Ok(bytes)
    }

    /// The text of a symlink.
    pub fn read_link(&self, inode: &Inode) -> Result<Vec<u8>, ReadError> {
        match inode.file_type()? {
            FileType::Symlink => self.read_whole(inode, SYMLINK_MAX),
            _ => Err(damaged(inode.nid, "the kind")),
        }
    }

    /// Calls back with the name and the inode number of everything in a directory but `.` and `..`,
    /// until told to stop by `false`.
    pub fn read_dir(
        &self,
        inode: &Inode,
        each: &mut dyn FnMut(&[u8], u64) -> bool,
    ) -> Result<(), ReadError> {
        if inode.file_type()? != FileType::Directory {
            return Err(damaged(inode.nid, "the kind"));
        }
        let mut block = [0; BLOCK_LEN];
        let mut at = 0;
        while at < inode.size {
            let n = self.read_file(inode, at, &mut block)?;
            let bytes = block.get(..n).unwrap_or_default();
            for (name, nid) in dirents(bytes).ok_or(damaged(inode.nid, "the directory"))? {
                if name != b"." && name != b".." && !each(name, nid) {
                    return Ok(());
                }
            }
            at += BLOCK;
        }
        Ok(())
    }

    /// What a directory has under a name.
    pub fn child(&self, dir: &Inode, name: &[u8]) -> Result<Option<Inode>, ReadError> {
        let mut found = None;
        self.read_dir(dir, &mut |n, nid| {
            if n == name {
                found = Some(nid);
            }
            found.is_none()
        })?;
        found.map(|nid| self.inode(nid)).transpose()
    }

    /// Names and values of extended attributes.
    pub fn xattrs(&self, inode: &Inode) -> Result<Vec<Pair>, ReadError> {
        let len = inode.xattr_len();
        if len == 0 {
            return Ok(Vec::new());
        }
        let wrong = || damaged(inode.nid, "the attributes");
        if len > XATTRS_MAX {
            return Err(wrong());
        }
        let at = self.at(inode.nid)? + inode.header_len();
        let mut area = vec![0; usize::try_from(len).map_err(|_| wrong())?];
        self.read(&mut area, at)?;
        let shared = usize::from(*area.get(4).ok_or_else(wrong)?);
        let mut out = Vec::new();
        let (ids, mut rest) = area
            .get(12..)
            .and_then(|a| a.split_at_checked(shared * 4))
            .ok_or_else(wrong)?;
        for id in ids.chunks_exact(4) {
            let id = field(id, 0).map_or(0, u32::from_le_bytes);
            // Name and value are no longer than that.
            let mut entry = vec![0; 4 + 255];
            let at = self.xattrs + u64::from(id) * 4;
            self.read(entry.get_mut(..4).unwrap_or_default(), at)?;
            let total = entry_len(&entry).ok_or_else(wrong)?;
            entry.resize(total, 0);
            self.read(&mut entry, at)?;
            out.push(xattr_entry(&entry).ok_or_else(wrong)?.0);
        }
        while rest.len() >= 4 {
            let (pair, used) = xattr_entry(rest).ok_or_else(wrong)?;
            out.push(pair);
            rest = rest.get(used.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(out)
    }

    /// Where a file's byte is, or that it is in a hole, and for how many bytes that holds.
    fn map(&self, inode: &Inode, offset: u64) -> Result<(Option<u64>, u64), ReadError> {
        let left = inode.size.saturating_sub(offset);
        let flat = u64::from(inode.place) * BLOCK;
        if inode.is(Layout::FlatPlain) {
            return Ok((Some(flat + offset), left));
        }
        let head = self.at(inode.nid)? + inode.header_len() + inode.xattr_len();
        if inode.is(Layout::FlatInline) {
            let whole = inode.size - inode.size % BLOCK;
            return Ok(match offset.checked_sub(whole) {
                None => (Some(flat + offset), whole - offset),
                Some(in_tail) => (Some(head + in_tail), left),
            });
        }
        if !inode.is(Layout::ChunkBased) {
            return Err(ReadError::Unsupported("compressed files"));
        }
        let format = u16::try_from(inode.place & 0xffff).unwrap_or(0);
        let bits = BLOCK_BITS + u32::from(format & CHUNK_BITS_MASK);
        let unit: u64 = if format & CHUNK_INDEXES != 0 { 8 } else { 4 };
        let chunk = offset >> bits;
        let inside = offset - (chunk << bits);
        let run = left.min((1_u64 << bits) - inside);
        let entry = chunk
            .checked_mul(unit)
            .and_then(|at| at.checked_add(head.next_multiple_of(unit)))
            .ok_or(damaged(inode.nid, "the map"))?;
        let mut bytes = [0; 4];
        // In an index the address stands after advice and device.
        self.read(&mut bytes, entry + unit - 4)?;
        Ok(match u32::from_le_bytes(bytes) {
            NULL_BLOCK => (None, run),
            block => (Some(u64::from(block) * BLOCK + inside), run),
        })
    }

    fn at(&self, nid: u64) -> Result<u64, ReadError> {
        nid.checked_mul(SLOT)
            .and_then(|offset| offset.checked_add(self.meta))
            .filter(|at| *at < 1 << 56)
            .ok_or(damaged(nid, "the number"))
    }

    fn read(&self, buf: &mut [u8], at: u64) -> Result<(), ReadError> {
        self.source
            .read_exact_at(buf, at)
            .map_err(|source| ReadError::Io { at, source })
    }
}

fn damaged(nid: u64, what: &'static str) -> ReadError {
    ReadError::Damaged { what, nid }
}

/// Names and numbers in one block of a directory: the first name begins where the entries end.
fn dirents(block: &[u8]) -> Option<Vec<(&[u8], u64)>> {
    let offset =
        |i: usize| field(block, i * DIRENT_LEN + 8).map(|b| usize::from(u16::from_le_bytes(b)));
    let first = offset(0)?;
    if first == 0 || first % DIRENT_LEN != 0 || first > block.len() {
        return None;
    }
    let count = first / DIRENT_LEN;
    let mut out = Vec::with_capacity(count);
    for i in 0..count {
        let nid = field(block, i * DIRENT_LEN).map(u64::from_le_bytes)?;
        let end = if i + 1 < count {
            offset(i + 1)?
        } else {
            block.len()
        };
        let name = block.get(offset(i)?..end)?;
        // The last name ends at a NUL, or with the block.
        let name = name.split(|b| *b == 0).next().unwrap_or_default();
        if name.is_empty() || name.len() > super::NAME_MAX || name.contains(&b'/') {
            return None;
        }
        out.push((name, nid));
    }
    Some(out)
}

fn entry_len(entry: &[u8]) -> Option<usize> {
    let name = usize::from(*entry.first()?);
    let value = usize::from(field(entry, 2).map(u16::from_le_bytes)?);
    Some(4 + name + value)
}

/// Name and value, and how long the entry is.
fn xattr_entry(bytes: &[u8]) -> Option<(Pair, usize)> {
    let len = entry_len(bytes)?;
    let name_len = usize::from(*bytes.first()?);
    let index = *bytes.get(1)?;
    let (name, value) = bytes.get(4..len)?.split_at_checked(name_len)?;
    Some(((xattr::join(index, name)?, value.to_vec()), len))
}
