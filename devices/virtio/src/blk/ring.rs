//! An io_uring that owns whatever is lent to the kernel.
//!
//! ```text
//!   start(job, pieces, tag) ─▶ slot ──submit──▶ kernel ──completion──▶ reap: tag, result
//!                               └── pieces and tag stay in the slot until then (CVE-2026-45782) ──┘
//! ```
//! Made on the control thread, used by one worker at a time. Its one file is registered, and the
//! kernel takes nothing from it but the calls below on that file: io_uring passes system call
//! filters by, so the ring has its own (`IORING_REGISTER_RESTRICTIONS`, Linux 5.10).
//!
//! Completions are events of the ring's own descriptor. A worker that has just taken them is not
//! woken for them again, which an eventfd would do.
#![expect(unsafe_code, reason = "submission queue entries name memory")]

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring::register::{Probe, Restriction};
use io_uring::{IoUring, opcode, squeue, types};
use rustix::fs::FallocateFlags;

use crate::iovec::{self, IoVec};

/// `IOSQE_FIXED_FILE`.
const FIXED_FILE: u8 = 1;
/// Submissions held back at most before the kernel is told.
const SUBMISSIONS: usize = 256;

const FILE: types::Fixed = types::Fixed(0);

/// What the kernel is to do.
#[derive(Debug, Clone, Copy)]
pub(super) enum Job {
    Read {
        offset: u64,
    },
    Write {
        offset: u64,
        durable: bool,
    },
    Flush,
    Allocate {
        mode: FallocateFlags,
        offset: u64,
        len: u64,
    },
}

struct Lent<T> {
    pieces: Vec<IoVec>,
    tag: T,
}

/// Something that came back: its pieces, its tag, and what the system call would have returned.
pub(super) struct Done<T> {
    pub(super) pieces: Vec<IoVec>,
    pub(super) tag: T,
    pub(super) result: io::Result<u32>,
}

/// What became of a submission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Submitted {
    All,
    /// The kernel is short of something; try again soon.
    Later,
}

pub(super) struct Ring<T> {
    uring: IoUring,
    /// Freed only when the kernel has nothing of it.
    lent: ManuallyDrop<Vec<Option<Lent<T>>>>,
    free: Vec<usize>,
}

impl<T> Ring<T> {
    /// A ring for `file` on which up to `depth` jobs are under way at a time.
    pub(super) fn new(file: BorrowedFd<'_>, depth: usize) -> io::Result<Self> {
        let entries = |n: usize| {
            let n = u32::try_from(n.next_power_of_two());
            n.map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
        };
        let (submissions, completions) = (entries(depth.min(SUBMISSIONS))?, entries(depth)?);
        let build = |coop: bool| {
            let mut builder = IoUring::builder();
            builder
                .dontfork()
                .setup_r_disabled()
                .setup_cqsize(completions);
            if coop {
                // No interrupt to tell a thread of completions it asks for anyway; Linux 5.19.
                builder.setup_coop_taskrun();
            }
            builder.build(submissions)
        };
        let uring = build(true).or_else(|_| build(false))?;
        let submitter = uring.submitter();
        let operations = [
            opcode::Read::CODE,
            opcode::Readv::CODE,
            opcode::Write::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        let mut probe = Probe::new();
        submitter.register_probe(&mut probe)?;
        if !operations.iter().all(|op| probe.is_supported(*op)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        submitter.register_files(&[file.as_raw_fd()])?;
        let mut restrictions: Vec<_> = operations.into_iter().map(Restriction::sqe_op).collect();
        restrictions.push(Restriction::sqe_flags_required(FIXED_FILE));
        submitter.register_restrictions(&mut restrictions)?;
        submitter.register_enable_rings()?;
        Ok(Self {
            uring,
            lent: ManuallyDrop::new((0..depth).map(|_| None).collect()),
            free: (0..depth).rev().collect(),
        })
    }

    /// Jobs under way.
    pub(super) fn in_flight(&self) -> usize {
        self.lent.len().saturating_sub(self.free.len())
    }

    /// Takes a job to be handed over by the next [`Self::submit`]. If the ring is full, it comes back.
    pub(super) fn start(
        &mut self,
        job: Job,
        pieces: Vec<IoVec>,
        tag: T,
    ) -> Result<(), (Vec<IoVec>, T)> {
        if self.uring.submission().is_full() {
            // Makes room, or does not: then there is none.
            let _ = self.submit();
        }
        let Some(at) = self.free.pop() else {
            return Err((pieces, tag));
        };
        let entry = entry(job, &pieces).user_data(at as u64);
        // SAFETY: the entry names `pieces`' own memory, which moves into a slot that is not
        // touched before the completion, and what the pieces point to, which outlives that as
        // well (see `IoVec`); `Drop` waits for completions, or keeps the slots for ever.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        match self.lent.get_mut(at) {
            Some(slot) if pushed.is_ok() => {
                *slot = Some(Lent { pieces, tag });
                Ok(())
            }
            _ => {
                self.free.push(at);
                Err((pieces, tag))
            }
        }
    }

    /// Hands over what was started, in one call.
    pub(super) fn submit(&mut self) -> io::Result<Submitted> {
        while !self.uring.submission().is_empty() {
            match self.uring.submit() {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if is_shortage(&e) => return Ok(Submitted::Later),
                Err(e) => return Err(e),
            }
        }
        Ok(Submitted::All)
    }

    /// Takes what has been completed into `done`.
    pub(super) fn reap(&mut self, done: &mut Vec<Done<T>>) {
        for completion in self.uring.completion() {
            let Ok(at) = usize::try_from(completion.user_data()) else {
                continue;
            };
            let Some(Lent { pieces, tag }) = self.lent.get_mut(at).and_then(Option::take) else {
                continue;
            };
            self.free.push(at);
            let result = u32::try_from(completion.result())
                .map_err(|_| io::Error::from_raw_os_error(completion.result().saturating_neg()));
            done.push(Done {
                pieces,
                tag,
                result,
            });
        }
    }

    /// Hands over what was started and waits until something is completed.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        match self.uring.submit_and_wait(1) {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted || is_shortage(&e) => Ok(()),
            Err(e) => Err(e),
        }
    }
}

fn is_shortage(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM)
    )
}

fn entry(job: Job, pieces: &[IoVec]) -> squeue::Entry {
    let (iov, count) = iovec::as_raw(pieces);
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    let single = match pieces {
        [one] => u32::try_from(one.len()).ok().map(|len| (one.base(), len)),
        _ => None,
    };
    match (job, single) {
        (Job::Read { offset }, Some((base, len))) => {
            opcode::Read::new(FILE, base, len).offset(offset).build()
        }
        (Job::Read { offset }, None) => opcode::Readv::new(FILE, iov, count).offset(offset).build(),
        (Job::Write { offset, durable }, single) => {
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            match single {
                Some((base, len)) => opcode::Write::new(FILE, base, len)
                    .offset(offset)
                    .rw_flags(flags)
                    .build(),
                None => opcode::Writev::new(FILE, iov, count)
                    .offset(offset)
                    .rw_flags(flags)
                    .build(),
            }
        }
        (Job::Flush, _) => opcode::Fsync::new(FILE)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        (Job::Allocate { mode, offset, len }, _) => opcode::Fallocate::new(FILE, len)
            .offset(offset)
            .mode(mode.bits().cast_signed())
            .build(),
    }
}

impl<T> AsRawFd for Ring<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.uring.as_raw_fd()
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        let mut done = Vec::new();
        while self.in_flight() > 0 {
            if let Err(e) = self.wait() {
                // The kernel may still use the slots: they are never freed.
                log::error!("io_uring does not give requests back: {e}");
                return;
            }
            self.reap(&mut done);
        }
        // SAFETY: dropped once, here, and not used afterwards; the kernel has nothing of it.
        unsafe { ManuallyDrop::drop(&mut self.lent) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::iovec::Aligned;

    fn ring(file: &std::fs::File) -> Option<Ring<u32>> {
        let ring = Ring::new(file.as_fd(), 4);
        match ring {
            Ok(ring) => Some(ring),
            Err(e) => {
                eprintln!("no io_uring here: {e}");
                None
            }
        }
    }

    fn all(ring: &mut Ring<u32>) -> Vec<Done<u32>> {
        let mut done = Vec::new();
        while ring.in_flight() > 0 {
            ring.wait().unwrap();
            ring.reap(&mut done);
        }
        done.sort_by_key(|d| d.tag);
        done
    }

    #[test]
    fn jobs_come_back_with_their_tags_and_a_full_ring_says_so() {
        let file = crate::blk::tests::scratch(1 << 16);
        let Some(mut ring) = ring(&file) else { return };
        let mut memory = Aligned::new(8192);
        memory.slice_mut()[..4096].fill(7);
        let write = Job::Write {
            offset: 4096,
            durable: true,
        };
        ring.start(write, vec![memory.iovec(4096)], 1).unwrap();
        assert_eq!(all(&mut ring)[0].result.as_ref().unwrap(), &4096);
        let base = memory.slice_mut().as_mut_ptr();
        let pieces = vec![
            IoVec::new(base.wrapping_add(4096), 100),
            IoVec::new(base.wrapping_add(6000), 100),
        ];
        ring.start(Job::Read { offset: 4000 }, pieces, 2).unwrap();
        ring.start(Job::Flush, Vec::new(), 3).unwrap();
        let past = Job::Read { offset: 1 << 20 };
        ring.start(past, vec![memory.iovec(10)], 4).unwrap();
        let punch = Job::Allocate {
            mode: crate::blk::backing::Backing::PUNCH,
            offset: 8192,
            len: 4096,
        };
        ring.start(punch, Vec::new(), 5).unwrap();
        let (_, tag) = ring.start(Job::Flush, Vec::new(), 6).err().unwrap();
        assert_eq!(tag, 6);
        let done = all(&mut ring);
        let results: Vec<_> = done.iter().map(|d| (d.tag, d.result.is_ok())).collect();
        assert_eq!(results, [(2, true), (3, true), (4, true), (5, true)]);
        assert_eq!(done[2].result.as_ref().unwrap(), &0, "the end of the file");
        assert_eq!(
            memory.slice_mut()[4096 + 95..4096 + 100],
            [0, 7, 7, 7, 7][..]
        );
    }

    /// io_uring is not a way around the thread's system call filter.
    #[test]
    fn the_kernel_takes_nothing_else_from_it() {
        let file = crate::blk::tests::scratch(4096);
        let Some(mut ring) = ring(&file) else { return };
        let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/dev/null".as_ptr())
            .build()
            .user_data(0);
        let other_file = opcode::Fsync::new(types::Fd(file.as_raw_fd()))
            .build()
            .user_data(1);
        for entry in [open, other_file] {
            // SAFETY: the names are literals, and the kernel refuses the entry anyway.
            unsafe { ring.uring.submission().push(&entry) }.unwrap();
            ring.uring.submit_and_wait(1).unwrap();
            let done = ring.uring.completion().next().unwrap();
            assert_eq!(done.result(), -libc::EACCES);
        }
    }

    /// CVE-2026-45782: what is lent is kept until it comes back.
    #[test]
    fn a_ring_that_is_dropped_waits_for_what_it_lent() {
        let file = crate::blk::tests::scratch(1 << 20);
        let Some(mut ring) = ring(&file) else { return };
        let mut memory = Aligned::new(1 << 20);
        memory.slice_mut().fill(9);
        for n in 0..4_u32 {
            let job = Job::Write {
                offset: u64::from(n) << 18,
                durable: true,
            };
            let piece = memory.iovec(1 << 18);
            ring.start(job, vec![piece], n).unwrap();
        }
        drop(ring);
        let mut seen = vec![0; 1 << 20];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut seen, 0).unwrap();
        assert!(seen.iter().all(|b| *b == 9), "a write was cut off");
    }
}
