//! The FUSE protocol as it is on the wire (`linux/fuse.h`, 7.31 to 7.40), in the host's byte order.
//!
//! Only what this server reads or writes. Structures are copied out of guest memory before they
//! are looked at; every bit pattern is a value of each of them.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub(super) const VERSION_MAJOR: u32 = 7;
/// What is spoken at most.
pub(super) const VERSION_MINOR: u32 = 38;
/// Older clients have other layouts; virtio-fs began with this one.
pub(super) const VERSION_MINOR_LEAST: u32 = 31;

/// The node the tree hangs on.
pub(super) const ROOT: u64 = 1;

pub(super) mod opcode {
    pub(in crate::fs) const LOOKUP: u32 = 1;
    pub(in crate::fs) const FORGET: u32 = 2;
    pub(in crate::fs) const GETATTR: u32 = 3;
    pub(in crate::fs) const SETATTR: u32 = 4;
    pub(in crate::fs) const READLINK: u32 = 5;
    pub(in crate::fs) const SYMLINK: u32 = 6;
    pub(in crate::fs) const MKNOD: u32 = 8;
    pub(in crate::fs) const MKDIR: u32 = 9;
    pub(in crate::fs) const UNLINK: u32 = 10;
    pub(in crate::fs) const RMDIR: u32 = 11;
    pub(in crate::fs) const RENAME: u32 = 12;
    pub(in crate::fs) const LINK: u32 = 13;
    pub(in crate::fs) const OPEN: u32 = 14;
    pub(in crate::fs) const READ: u32 = 15;
    pub(in crate::fs) const WRITE: u32 = 16;
    pub(in crate::fs) const STATFS: u32 = 17;
    pub(in crate::fs) const RELEASE: u32 = 18;
    pub(in crate::fs) const FSYNC: u32 = 20;
    pub(in crate::fs) const SETXATTR: u32 = 21;
    pub(in crate::fs) const GETXATTR: u32 = 22;
    pub(in crate::fs) const LISTXATTR: u32 = 23;
    pub(in crate::fs) const REMOVEXATTR: u32 = 24;
    pub(in crate::fs) const INIT: u32 = 26;
    pub(in crate::fs) const OPENDIR: u32 = 27;
    pub(in crate::fs) const READDIR: u32 = 28;
    pub(in crate::fs) const RELEASEDIR: u32 = 29;
    pub(in crate::fs) const FSYNCDIR: u32 = 30;
    pub(in crate::fs) const CREATE: u32 = 35;
    pub(in crate::fs) const INTERRUPT: u32 = 36;
    pub(in crate::fs) const DESTROY: u32 = 38;
    pub(in crate::fs) const BATCH_FORGET: u32 = 42;
    pub(in crate::fs) const FALLOCATE: u32 = 43;
    pub(in crate::fs) const READDIRPLUS: u32 = 44;
    pub(in crate::fs) const RENAME2: u32 = 45;
    pub(in crate::fs) const LSEEK: u32 = 46;
    pub(in crate::fs) const COPY_FILE_RANGE: u32 = 47;
    pub(in crate::fs) const SETUPMAPPING: u32 = 48;
    pub(in crate::fs) const REMOVEMAPPING: u32 = 49;
    pub(in crate::fs) const SYNCFS: u32 = 50;
    pub(in crate::fs) const TMPFILE: u32 = 51;
}

/// Bits of `FUSE_INIT`; those above 31 travel in `flags2`.
pub(super) mod init {
    pub(in crate::fs) const ASYNC_READ: u64 = 1 << 0;
    pub(in crate::fs) const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub(in crate::fs) const BIG_WRITES: u64 = 1 << 5;
    pub(in crate::fs) const DONT_MASK: u64 = 1 << 6;
    pub(in crate::fs) const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub(in crate::fs) const DO_READDIRPLUS: u64 = 1 << 13;
    pub(in crate::fs) const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub(in crate::fs) const ASYNC_DIO: u64 = 1 << 15;
    pub(in crate::fs) const WRITEBACK_CACHE: u64 = 1 << 16;
    pub(in crate::fs) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(in crate::fs) const POSIX_ACL: u64 = 1 << 20;
    pub(in crate::fs) const MAX_PAGES: u64 = 1 << 22;
    pub(in crate::fs) const CACHE_SYMLINKS: u64 = 1 << 23;
    pub(in crate::fs) const MAP_ALIGNMENT: u64 = 1 << 26;
    pub(in crate::fs) const SUBMOUNTS: u64 = 1 << 27;
    pub(in crate::fs) const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub(in crate::fs) const INIT_EXT: u64 = 1 << 30;
    pub(in crate::fs) const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
}

pub(super) mod fattr {
    pub(in crate::fs) const MODE: u32 = 1 << 0;
    pub(in crate::fs) const UID: u32 = 1 << 1;
    pub(in crate::fs) const GID: u32 = 1 << 2;
    pub(in crate::fs) const SIZE: u32 = 1 << 3;
    pub(in crate::fs) const ATIME: u32 = 1 << 4;
    pub(in crate::fs) const MTIME: u32 = 1 << 5;
    pub(in crate::fs) const FH: u32 = 1 << 6;
    pub(in crate::fs) const ATIME_NOW: u32 = 1 << 7;
    pub(in crate::fs) const MTIME_NOW: u32 = 1 << 8;
    pub(in crate::fs) const KILL_SUIDGID: u32 = 1 << 11;
}

pub(super) mod fopen {
    pub(in crate::fs) const DIRECT_IO: u32 = 1 << 0;
    pub(in crate::fs) const KEEP_CACHE: u32 = 1 << 1;
    pub(in crate::fs) const CACHE_DIR: u32 = 1 << 3;
    pub(in crate::fs) const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
}

pub(super) const OPEN_KILL_SUIDGID: u32 = 1 << 0;
pub(super) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
pub(super) const FSYNC_DATA_ONLY: u32 = 1 << 0;
pub(super) const ATTR_SUBMOUNT: u32 = 1 << 0;
pub(super) const MAPPING_WRITE: u64 = 1 << 0;
pub(super) const MAPPING_READ: u64 = 1 << 1;

macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* $(,)? })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
            #[repr(C)]
            pub(super) struct $name { $(pub(super) $field: $type),* }
        )*
    };
}

wire! {
    InHeader { len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32, extra: u32 }
    OutHeader { len: u32, error: i32, unique: u64 }
    /// The part of it that every client sends.
    InitIn { major: u32, minor: u32, max_readahead: u32, flags: u32 }
    InitOut {
        major: u32, minor: u32, max_readahead: u32, flags: u32,
        max_background: u16, congestion_threshold: u16, max_write: u32, time_gran: u32,
        max_pages: u16, map_alignment: u16, flags2: u32, unused: [u32; 7],
    }
    Attr {
        ino: u64, size: u64, blocks: u64, atime: i64, mtime: i64, ctime: i64,
        atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, nlink: u32,
        uid: u32, gid: u32, rdev: u32, blksize: u32, flags: u32,
    }
    EntryOut {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64,
        entry_valid_nsec: u32, attr_valid_nsec: u32, attr: Attr,
    }
    AttrOut { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr }
    GetattrIn { flags: u32, dummy: u32, fh: u64 }
    SetattrIn {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64,
        atime: i64, mtime: i64, ctime: i64, atimensec: u32, mtimensec: u32, ctimensec: u32,
        mode: u32, unused4: u32, uid: u32, gid: u32, unused5: u32,
    }
    MknodIn { mode: u32, rdev: u32, umask: u32, padding: u32 }
    MkdirIn { mode: u32, umask: u32 }
    RenameIn { newdir: u64 }
    Rename2In { newdir: u64, flags: u32, padding: u32 }
    LinkIn { oldnodeid: u64 }
    OpenIn { flags: u32, open_flags: u32 }
    CreateIn { flags: u32, mode: u32, umask: u32, open_flags: u32 }
    OpenOut { fh: u64, open_flags: u32, padding: u32 }
    ReleaseIn { fh: u64, flags: u32, release_flags: u32, lock_owner: u64 }
    ReadIn { fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32 }
    WriteIn { fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32 }
    WriteOut { size: u32, padding: u32 }
    FsyncIn { fh: u64, fsync_flags: u32, padding: u32 }
    SetxattrIn { size: u32, flags: u32 }
    GetxattrIn { size: u32, padding: u32 }
    GetxattrOut { size: u32, padding: u32 }
    ForgetIn { nlookup: u64 }
    BatchForgetIn { count: u32, dummy: u32 }
    ForgetOne { nodeid: u64, nlookup: u64 }
    FallocateIn { fh: u64, offset: u64, length: u64, mode: u32, padding: u32 }
    LseekIn { fh: u64, offset: u64, whence: u32, padding: u32 }
    LseekOut { offset: u64 }
    CopyFileRangeIn { fh_in: u64, off_in: u64, nodeid_out: u64, fh_out: u64, off_out: u64, len: u64, flags: u64 }
    SetupmappingIn { fh: u64, foffset: u64, len: u64, flags: u64, moffset: u64 }
    RemovemappingIn { count: u32 }
    RemovemappingOne { moffset: u64, len: u64 }
    StatfsOut {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64,
        bsize: u32, namelen: u32, frsize: u32, padding: u32, spare: [u32; 6],
    }
    Dirent { ino: u64, off: u64, namelen: u32, kind: u32 }
}

/// Bytes of the header of each request and reply.
pub(super) const IN_HEADER: u32 = 40;
pub(super) const OUT_HEADER: u32 = 16;

const _: () = {
    assert!(size_of::<InHeader>() == 40 && size_of::<OutHeader>() == 16);
    assert!(size_of::<InitIn>() == 16 && size_of::<InitOut>() == 64);
    assert!(size_of::<Attr>() == 88 && size_of::<EntryOut>() == 128 && size_of::<AttrOut>() == 104);
    assert!(size_of::<SetattrIn>() == 88 && size_of::<MknodIn>() == 16);
    assert!(size_of::<ReadIn>() == 40 && size_of::<WriteIn>() == 40);
    assert!(size_of::<ReleaseIn>() == 24 && size_of::<FallocateIn>() == 32);
    assert!(size_of::<CopyFileRangeIn>() == 56 && size_of::<SetupmappingIn>() == 40);
    assert!(size_of::<StatfsOut>() == 80 && size_of::<Dirent>() == 24);
};
