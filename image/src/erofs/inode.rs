//! The bytes of an inode: written extended, read extended or compact.

use super::{COMPACT_LEN, EXTENDED_LEN, Layout};

/// Linux has signed offsets.
const SIZE_MAX: u64 = i64::MAX.unsigned_abs();

/// What an inode says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inode {
    /// Its number: where it is, in units of 32 bytes.
    pub nid: u64,
    /// Kind and permissions, as `st_mode`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Names it has.
    pub nlink: u32,
    /// Bytes.
    pub size: u64,
    /// Seconds and nanoseconds.
    pub mtime: (i64, u32),
    pub(super) layout: u16,
    pub(super) extended: bool,
    pub(super) xattr_count: u16,
    pub(super) ino: u32,
    /// First block, device number or chunk format.
    pub(super) place: u32,
}

impl Inode {
    /// Bytes before the xattrs.
    pub(super) fn header_len(&self) -> u64 {
        if self.extended {
            EXTENDED_LEN
        } else {
            COMPACT_LEN
        }
    }

    pub(super) fn xattr_len(&self) -> u64 {
        match u64::from(self.xattr_count).checked_sub(1) {
            None => 0,
            Some(words) => 12 + words * 4,
        }
    }

    /// struct erofs_inode_extended
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let format = 1 | (self.layout << 1);
        for half in [format, self.xattr_count, self.mode, 0] {
            out.extend_from_slice(&half.to_le_bytes());
        }
        out.extend_from_slice(&self.size.to_le_bytes());
        for word in [self.place, self.ino, self.uid, self.gid] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&self.mtime.0.to_le_bytes());
        out.extend_from_slice(&self.mtime.1.to_le_bytes());
        out.extend_from_slice(&self.nlink.to_le_bytes());
        out.extend_from_slice(&[0; 16]);
    }

    /// From at least 64 bytes; the time of a compact one is the image's.
    pub(super) fn decode(nid: u64, bytes: &[u8; 64], time: (i64, u32)) -> Option<Self> {
        let half = |at| field(bytes, at).map(u16::from_le_bytes);
        let word = |at| field(bytes, at).map(u32::from_le_bytes);
        let format = half(0)?;
        let extended = format & 1 == 1;
        let (xattr_count, mode) = (half(2)?, half(4)?);
        let layout = (format >> 1) & 7;
        if format >> 4 != 0 {
            return None;
        }
        let inode = if extended {
            Self {
                nid,
                mode,
                uid: word(24)?,
                gid: word(28)?,
                nlink: word(44)?,
                size: field(bytes, 8).map(u64::from_le_bytes)?,
                mtime: (field(bytes, 32).map(i64::from_le_bytes)?, word(40)?),
                layout,
                extended,
                xattr_count,
                ino: word(20)?,
                place: word(16)?,
            }
        } else {
            Self {
                nid,
                mode,
                uid: half(24)?.into(),
                gid: half(26)?.into(),
                nlink: half(6)?.into(),
                size: word(8)?.into(),
                mtime: time,
                layout,
                extended,
                xattr_count,
                ino: word(20)?,
                place: word(16)?,
            }
        };
        // So that sums of offsets and addresses stay numbers.
        (inode.size <= SIZE_MAX).then_some(inode)
    }

    /// Has it this layout?
    pub(super) fn is(&self, layout: Layout) -> bool {
        self.layout == layout as u16
    }
}

/// `N` bytes at `at`.
pub(super) fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}
