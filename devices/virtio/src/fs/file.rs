//! Open files: data goes between them and guest RAM without a copy in this process.
#![expect(unsafe_code, reason = "vectored I/O on guest RAM")]

use std::os::fd::AsFd;

use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;
use testudo_memory::RamView;
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use super::Caching;
use super::attr::drop_privileges;
use super::handle::Handle;
use super::host;
use super::server::{Answer, Answered, Call, Pieces, Server};
use super::wire::{
    self, CopyFileRangeIn, FSYNC_DATA_ONLY, FallocateIn, FsyncIn, LseekIn, LseekOut,
    OPEN_KILL_SUIDGID, OpenIn, OpenOut, ReadIn, ReleaseIn, WRITE_KILL_SUIDGID, WriteIn, WriteOut,
    fopen, init,
};
use crate::queue::Buffer;

/// Bytes between WRITE's beginning and its data.
const WRITE_DATA: u32 = wire::IN_HEADER + 40;
const _: () = assert!(size_of::<WriteIn>() == 40);
/// What read(2) and write(2) move at once at most.
const COUNT_MAX: usize = 0x7fff_f000;

impl Pieces {
    /// Becomes the `len` bytes that come after `skip` in `buffers`.
    fn gather(
        &mut self,
        ram: &RamView,
        buffers: &[Buffer],
        skip: u32,
        len: u32,
        access: Permissions,
    ) -> Result<(), Errno> {
        self.0.clear();
        let (mut skip, mut len) = (skip, len);
        for buffer in buffers {
            let begin = skip.min(buffer.len);
            skip = skip.saturating_sub(begin);
            let take = buffer.len.saturating_sub(begin).min(len);
            if take == 0 {
                continue;
            }
            len = len.saturating_sub(take);
            let at = buffer
                .address
                .0
                .checked_add(begin.into())
                .ok_or(Errno::FAULT)?;
            let count = usize::try_from(take).map_err(|_| Errno::FAULT)?;
            let slices = ram.get_slices(GuestAddress(at), count, access);
            for slice in slices.map_err(|_| Errno::FAULT)? {
                let slice = slice.map_err(|_| Errno::FAULT)?;
                self.0.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
        }
        Ok(())
    }
}

impl Server {
    /// The flags a file is opened with here for those the guest opens it with.
    pub(super) fn open_flags(&self, asked: u32) -> Result<OFlags, Errno> {
        let asked = OFlags::from_bits_retain(asked);
        let kept = OFlags::APPEND | OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC;
        let mut flags = asked & (OFlags::RWMODE | kept);
        let writing = flags & OFlags::RWMODE != OFlags::RDONLY;
        if self.options.readonly && (writing || flags.contains(OFlags::TRUNC)) {
            return Err(Errno::ROFS);
        }
        if self.agreed(init::WRITEBACK_CACHE) {
            // The guest's cache reads what it writes parts of, and knows itself where the end is.
            if flags & OFlags::RWMODE == OFlags::WRONLY {
                flags = flags.difference(OFlags::RWMODE) | OFlags::RDWR;
            }
            flags.remove(OFlags::APPEND);
        }
        Ok(flags)
    }

    /// How the guest may cache what it opened.
    pub(super) fn file_flags(&self) -> u32 {
        match self.options.caching {
            Caching::None => fopen::DIRECT_IO | fopen::PARALLEL_DIRECT_WRITES,
            Caching::Auto => 0,
            Caching::Always => fopen::KEEP_CACHE,
        }
    }

    pub(super) fn open(&self, call: &mut Call<'_>) -> Answered {
        let asked: OpenIn = call.args.take()?;
        let node = self.node(call.header.nodeid)?;
        if node.is_dir() {
            return Err(Errno::ISDIR);
        }
        let flags = self.open_flags(asked.flags)?;
        let file = self.export.open(&node, flags)?;
        if flags.contains(OFlags::TRUNC) && asked.open_flags & OPEN_KILL_SUIDGID != 0 {
            drop_privileges(&file)?;
        }
        let fh = self.add_handle(Handle::file(file))?;
        Ok(call.put(&OpenOut {
            fh,
            open_flags: self.file_flags(),
            padding: 0,
        }))
    }

    pub(super) fn release(&self, call: &mut Call<'_>) -> Answered {
        let ReleaseIn { fh, .. } = call.args.take()?;
        drop(self.remove_handle(fh).ok_or(Errno::BADF)?);
        Ok(Answer::Built)
    }

    pub(super) fn read(&self, call: &mut Call<'_>) -> Answered {
        let asked: ReadIn = call.args.take()?;
        let handle = self.handle(asked.fh)?;
        let (room, skip) = (call.room(), wire::OUT_HEADER);
        let len = asked.size.min(room);
        let buffers = call.chain.writable();
        let pieces = &mut *call.pieces;
        pieces.gather(call.ram, buffers, skip, len, Permissions::Write)?;
        // SAFETY: the pieces are guest RAM, which the view keeps mapped; Rust holds no reference
        // into it.
        let done = unsafe { host::read(handle.as_fd(), &pieces.0, asked.offset)? };
        let done = u32::try_from(done).map_err(|_| Errno::IO)?;
        Ok(Answer::InPlace(done))
    }

    pub(super) fn write(&self, call: &mut Call<'_>) -> Answered {
        let asked: WriteIn = call.args.take()?;
        let handle = self.handle(asked.fh)?;
        let given = call.header.len.saturating_sub(WRITE_DATA);
        if asked.size > given {
            return Err(Errno::INVAL);
        }
        let buffers = call.chain.readable();
        let pieces = &mut *call.pieces;
        pieces.gather(call.ram, buffers, WRITE_DATA, asked.size, Permissions::Read)?;
        // SAFETY: as for reading.
        let done = unsafe { host::write(handle.as_fd(), &pieces.0, asked.offset)? };
        if asked.write_flags & WRITE_KILL_SUIDGID != 0 {
            drop_privileges(&*handle)?;
        }
        Ok(call.put(&WriteOut {
            size: u32::try_from(done).map_err(|_| Errno::IO)?,
            padding: 0,
        }))
    }

    pub(super) fn fsync(&self, call: &mut Call<'_>) -> Answered {
        let asked: FsyncIn = call.args.take()?;
        let handle = self.handle(asked.fh)?;
        if asked.fsync_flags & FSYNC_DATA_ONLY != 0 {
            rustix::fs::fdatasync(&*handle)?;
        } else {
            rustix::fs::fsync(&*handle)?;
        }
        Ok(Answer::Built)
    }

    pub(super) fn syncfs(&self, call: &mut Call<'_>) -> Answered {
        let node = self.node(call.header.nodeid)?;
        rustix::fs::syncfs(self.export.open(&node, OFlags::RDONLY)?)?;
        Ok(Answer::Built)
    }

    pub(super) fn fallocate(&self, call: &mut Call<'_>) -> Answered {
        let asked: FallocateIn = call.args.take()?;
        let handle = self.handle(asked.fh)?;
        let mode = FallocateFlags::from_bits_retain(asked.mode);
        rustix::fs::fallocate(&*handle, mode, asked.offset, asked.length)?;
        Ok(Answer::Built)
    }

    /// Where data and holes are; all other positions the guest keeps itself.
    pub(super) fn lseek(&self, call: &mut Call<'_>) -> Answered {
        let asked: LseekIn = call.args.take()?;
        let handle = self.handle(asked.fh)?;
        let to = match i32::try_from(asked.whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(asked.offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(asked.offset),
            _ => return Err(Errno::INVAL),
        };
        // Only reading a directory depends on the position of its descriptor.
        if handle.listing.is_some() {
            return Err(Errno::INVAL);
        }
        let offset = rustix::fs::seek(&*handle, to)?;
        Ok(call.put(&LseekOut { offset }))
    }

    pub(super) fn copy_file_range(&self, call: &mut Call<'_>) -> Answered {
        let asked: CopyFileRangeIn = call.args.take()?;
        let (from, to) = (self.handle(asked.fh_in)?, self.handle(asked.fh_out)?);
        if asked.flags != 0 {
            return Err(Errno::INVAL);
        }
        let len = usize::try_from(asked.len)
            .unwrap_or(COUNT_MAX)
            .min(COUNT_MAX);
        let (mut at_in, mut at_out) = (asked.off_in, asked.off_out);
        let (from_at, to_at) = (Some(&mut at_in), Some(&mut at_out));
        let done = rustix::fs::copy_file_range(&*from, from_at, &*to, to_at, len)?;
        Ok(call.put(&WriteOut {
            size: u32::try_from(done).map_err(|_| Errno::IO)?,
            padding: 0,
        }))
    }
}
