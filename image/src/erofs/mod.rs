//! EROFS as Linux 5.16 and later mount it (`fs/erofs/erofs_fs.h`): what is written and what is read.
//!
//! ```text
//!  block 0         1 …                      data end             metadata
//! ┌────────────┬──────────────────────────┬──────────────────┬──────────────────────────────┐
//! │ superblock │ file data, whole blocks, │ big directories, │ inodes, xattrs, chunk maps,  │
//! │            │ as it came from layers   │ long symlinks    │ ends of small directories    │
//! └────────────┴──────────────────────────┴──────────────────┴──────────────────────────────┘
//! ```
//! Blocks of 4 KiB, nothing compressed. Regular files are FLAT_PLAIN, or CHUNK_BASED when they have
//! holes: those are the layouts that DAX serves; the ends of files are therefore never kept inline. All
//! chunks are on device 0. Inodes are the extended ones, for they have a time and 32-bit owners.
//! Directories and symlinks are inline where they fit, so that a look at one touches one block.

mod crc;
pub mod data;
mod inode;
pub mod read;
mod space;
pub mod walk;
pub mod write;
pub(crate) mod xattr;

/// Of a block and a page.
pub const BLOCK: u64 = 4096;
pub(crate) const BLOCK_BITS: u32 = 12;
const BLOCK_LEN: usize = 4096;
const SUPER_OFFSET: u64 = 1024;
const SUPER_LEN: usize = 128;
const MAGIC: u32 = 0xe0f5_e1e2;
const COMPAT_CHECKSUM: u32 = 1;
const COMPAT_MTIME: u32 = 2;
const INCOMPAT_CHUNKED_FILE: u32 = 4;
/// Inode numbers count in these.
const SLOT: u64 = 32;
const COMPACT_LEN: u64 = 32;
const EXTENDED_LEN: u64 = 64;
const DIRENT_LEN: usize = 12;
/// Longest name of a file.
pub const NAME_MAX: usize = 255;
const CHUNK_BITS_MASK: u16 = 0x1f;
const CHUNK_INDEXES: u16 = 0x20;
/// A chunk that is a hole.
const NULL_BLOCK: u32 = u32::MAX;
const XATTR_HEADER_LEN: u64 = 12;

const S_IFMT: u16 = 0o170_000;
const S_IFIFO: u16 = 0o010_000;
const S_IFCHR: u16 = 0o020_000;
const S_IFDIR: u16 = 0o040_000;
const S_IFBLK: u16 = 0o060_000;
const S_IFREG: u16 = 0o100_000;
const S_IFLNK: u16 = 0o120_000;
const S_IFSOCK: u16 = 0o140_000;

/// Where an inode's data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
enum Layout {
    FlatPlain = 0,
    FlatInline = 2,
    ChunkBased = 4,
}

/// A device number as inodes keep it (Linux `new_encode_dev`).
fn encode_device((major, minor): (u32, u32)) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

fn decode_device(raw: u32) -> (u32, u32) {
    ((raw >> 8) & 0xfff, (raw & 0xff) | ((raw >> 12) & 0xf_ff00))
}
