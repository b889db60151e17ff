//! One thread's way to the disk: an io_uring or none, and what else its requests need.
//!
//! ```text
//!   begin(chain) ─┬─ done at once (no io_uring, nothing to do, an error) ─▶ answered
//!                 └─ ring ─▶ settle: submit, take completions ────────────▶ answered
//! ```
//! Lives in the disk while no model runs and in a worker while one does. A chain in the ring is in
//! the ring's own keeping, buffers and all.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use testudo_memory::RamView;
use vm_memory::{Bytes, GuestAddress, Permissions};

use super::backing::Backing;
use super::disk::Disk;
use super::inline::Inline;
use super::request::{HEADER, Operation, Refusal, Request, Status};
use super::ring::{Done, Job, Ring, Submitted};
use crate::iovec::{self, Aligned, IoVec};
use crate::model::ActiveQueue;
use crate::queue::{Chain, QueueFault, VirtQueue};
use crate::timer::Timer;

/// Bytes of a transfer whose memory O_DIRECT does not take that are copied at once.
const BOUNCE: usize = 128 << 10;
/// Buffers of finished requests that are kept for new ones.
const SPARE: usize = 64;
/// Time between two messages about requests that failed.
const QUIET: Duration = Duration::from_secs(10);
/// When the kernel is short of something it is asked again after this long.
const RETRY: Duration = Duration::from_millis(2);

/// A request under way.
pub(super) struct Pending {
    /// Place of its queue among the worker's.
    queue: usize,
    chain: Chain,
    request: Request,
}

pub(super) struct Lane {
    pub(super) ring: Option<Ring<Pending>>,
    pub(super) timer: Timer,
    /// Something, where what does not wait is done at once.
    inline: Option<Inline>,
    done: Vec<Done<Pending>>,
    spare: Vec<Vec<IoVec>>,
    bounce: Option<Aligned>,
    complained: Option<Instant>,
}

impl Lane {
    pub(super) fn new(ring: Option<Ring<Pending>>, timer: Timer, inline: bool) -> Self {
        Self {
            ring,
            timer,
            inline: inline.then(Inline::default),
            done: Vec::new(),
            spare: Vec::new(),
            bounce: None,
            complained: None,
        }
    }

    /// Begins, and if it can ends, a request that came by the queue at place `number`. With
    /// `durable` a write is answered when it is on stable storage.
    pub(super) fn begin(
        &mut self,
        disk: &Disk,
        (number, queue): (usize, &mut VirtQueue),
        ram: &RamView,
        chain: Chain,
        request: Request,
        durable: bool,
    ) -> Result<(), QueueFault> {
        count(disk, &request);
        let Request { offset, len, .. } = request;
        let mut pieces = self.spare.pop().unwrap_or_default();
        pieces.clear();
        let job = match request.operation {
            Operation::GetId => {
                // The last writable byte is the status.
                let room = chain.writable_len().saturating_sub(1);
                let room = usize::try_from(room).unwrap_or(usize::MAX);
                let id = disk.serial.get(..room).unwrap_or(&disk.serial);
                let _ = chain.write(ram, 0, id);
                return self.answer(queue, ram, chain, &request, &Ok(()));
            }
            Operation::Read if len > 0 => {
                let access = Permissions::Write;
                let gathered = iovec::gather(&mut pieces, chain.writable(), ram, 0, len, access);
                if gathered.is_err() {
                    return self.answer(queue, ram, chain, &request, &out_of_reach());
                }
                Job::Read { offset }
            }
            Operation::Write if len > 0 => {
                let access = Permissions::Read;
                let gathered =
                    iovec::gather(&mut pieces, chain.readable(), ram, HEADER, len, access);
                if gathered.is_err() {
                    return self.answer(queue, ram, chain, &request, &out_of_reach());
                }
                Job::Write { offset, durable }
            }
            Operation::Flush if !disk.backing.readonly() => Job::Flush,
            Operation::Discard if len > 0 => Job::Allocate {
                mode: Backing::PUNCH,
                offset,
                len,
            },
            Operation::Zero { unmap } if len > 0 => Job::Allocate {
                mode: Backing::zero_mode(unmap),
                offset,
                len,
            },
            _ => return self.answer(queue, ram, chain, &request, &Ok(())),
        };
        if let Some(alignment) = disk.backing.alignment()
            && !iovec::are_aligned(&pieces, alignment)
        {
            self.keep(pieces);
            let copied = self.copy(disk, ram, &chain, &request, durable);
            return self.answer(queue, ram, chain, &request, &copied);
        }
        let by_call = match job {
            _ if self.inline.is_some() && disk.backing.in_memory() => true,
            Job::Allocate { .. } => !disk.backing.is_regular(),
            Job::Write { durable: true, .. } => false,
            Job::Write { .. } => self
                .inline
                .as_mut()
                .is_some_and(|inline| inline.may_write(Instant::now)),
            Job::Read { .. } => {
                if self.is_cached(disk, &pieces, &request) {
                    self.keep(pieces);
                    return self.answer(queue, ram, chain, &request, &Ok(()));
                }
                false
            }
            Job::Flush => false,
        };
        let (mut pieces, chain) = match &mut self.ring {
            Some(ring) if !by_call => {
                let pending = Pending {
                    queue: number,
                    chain,
                    request,
                };
                match ring.start(job, pieces, pending) {
                    Ok(()) => return Ok(()),
                    Err((pieces, pending)) => (pieces, pending.chain),
                }
            }
            _ => (pieces, chain),
        };
        let done = carry_out(disk, &request, &mut pieces, durable);
        self.keep(pieces);
        self.answer(queue, ram, chain, &request, &done)
    }

    /// Whether a read was in the page cache, and is done.
    fn is_cached(&mut self, disk: &Disk, pieces: &[IoVec], request: &Request) -> bool {
        let (Some(inline), true) = (&mut self.inline, self.ring.is_some()) else {
            return false;
        };
        if !inline.may_read() {
            return false;
        }
        let Request { offset, len, .. } = *request;
        let cached = disk.backing.read_cached(pieces, offset, len);
        if cached {
            disk.gauges.cached_reads.fetch_add(1, Ordering::Relaxed);
        } else {
            inline.missed();
        }
        cached
    }

    /// Hands over what was begun, takes what is completed and tells the driver, once per queue.
    pub(super) fn settle(
        &mut self,
        disk: &Disk,
        queues: &mut [ActiveQueue],
        ram: &RamView,
        durable: bool,
    ) -> Result<(), QueueFault> {
        if let Some(inline) = &mut self.inline {
            inline.pass_ended(Instant::now);
        }
        let handed_over = match &mut self.ring {
            Some(ring) => {
                let submitted = ring.submit();
                ring.reap(&mut self.done);
                submitted
            }
            None => Ok(Submitted::All),
        };
        match handed_over {
            Ok(Submitted::All) => {}
            Ok(Submitted::Later) => self.retry(),
            Err(e) => {
                self.complain("io_uring takes no requests", &e);
                self.retry();
            }
        }
        let mut done = std::mem::take(&mut self.done);
        for done in done.drain(..) {
            self.completed(disk, queues, ram, done, durable)?;
        }
        self.done = done;
        for queue in queues {
            queue.queue.notify(ram)?;
        }
        Ok(())
    }

    /// Waits for everything that is under way, and answers it.
    pub(super) fn quiesce(
        &mut self,
        disk: &Disk,
        queues: &mut [ActiveQueue],
        ram: &RamView,
        durable: bool,
    ) -> Result<(), QueueFault> {
        let mut fault = None;
        while let Some(ring) = &mut self.ring {
            if ring.in_flight() == 0 {
                break;
            }
            if let Err(e) = ring.wait() {
                self.complain("io_uring gives no requests back", &e);
                break;
            }
            if let Err(e) = self.settle(disk, queues, ram, durable) {
                fault.get_or_insert(e);
            }
        }
        fault.map_or(Ok(()), Err)
    }

    fn completed(
        &mut self,
        disk: &Disk,
        queues: &mut [ActiveQueue],
        ram: &RamView,
        done: Done<Pending>,
        durable: bool,
    ) -> Result<(), QueueFault> {
        let Done {
            mut pieces,
            tag:
                Pending {
                    queue,
                    chain,
                    request,
                },
            result,
        } = done;
        let moves = matches!(request.operation, Operation::Read | Operation::Write);
        let result = match result {
            Ok(moved) if moves && u64::from(moved) < request.len => {
                finish(disk, &request, &mut pieces, moved, durable)
            }
            Ok(_) => Ok(()),
            // What io_uring cannot do, a system call may; and it is a call that waits.
            Err(e) if is_retried(&e, request.operation) => {
                carry_out(disk, &request, &mut pieces, durable)
            }
            Err(e) => Err(e),
        };
        self.keep(pieces);
        match queues.get_mut(queue) {
            Some(queue) => self.answer(&mut queue.queue, ram, chain, &request, &result),
            None => Ok(()),
        }
    }

    /// Moves data by way of a buffer of our own.
    fn copy(
        &mut self,
        disk: &Disk,
        ram: &RamView,
        chain: &Chain,
        request: &Request,
        durable: bool,
    ) -> io::Result<()> {
        let bounce = self.bounce.get_or_insert_with(|| Aligned::new(BOUNCE));
        let (mut at, mut done) = (request.offset, 0_u32);
        while u64::from(done) < request.len {
            let left = request.len.saturating_sub(done.into());
            let now = usize::try_from(left).unwrap_or(BOUNCE).min(BOUNCE);
            let gone = |_| io::Error::other("guest memory has gone");
            let mut piece = [bounce.iovec(now)];
            if request.operation == Operation::Write {
                let room = bounce.slice_mut().get_mut(..now).unwrap_or_default();
                chain
                    .read(ram, HEADER.saturating_add(done), room)
                    .map_err(gone)?;
                piece = [bounce.iovec(now)];
                disk.backing.write(&mut piece, at, durable)?;
            } else {
                disk.backing.read(&mut piece, at)?;
                let data = bounce.slice_mut().get(..now).unwrap_or_default();
                chain.write(ram, done, data).map_err(gone)?;
            }
            at = at.saturating_add(now as u64);
            done = done.saturating_add(u32::try_from(now).unwrap_or(u32::MAX));
        }
        Ok(())
    }

    /// Writes the status byte and gives the chain back.
    fn answer(
        &mut self,
        queue: &mut VirtQueue,
        ram: &RamView,
        chain: Chain,
        request: &Request,
        result: &io::Result<()>,
    ) -> Result<(), QueueFault> {
        let status = match result {
            Ok(()) => Status::Ok,
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Status::Unsupported,
            Err(e) => {
                self.complain("a request failed", e);
                Status::IoError
            }
        };
        give_back(queue, ram, chain, request.status, status)
    }

    /// Answers what is no request.
    pub(super) fn refuse(
        &mut self,
        queue: &mut VirtQueue,
        ram: &RamView,
        chain: Chain,
        refusal: Refusal,
    ) -> Result<(), QueueFault> {
        match refusal {
            Refusal::Unanswerable => {
                log::debug!("virtio-blk: a request without a status byte");
                queue.count_error();
                queue.push(ram, chain, 0)
            }
            Refusal::Answer { at, status, why } => {
                log::debug!("virtio-blk: a request was refused: {why}");
                give_back(queue, ram, chain, at, status)
            }
        }
    }

    fn keep(&mut self, pieces: Vec<IoVec>) {
        if self.spare.len() < SPARE {
            self.spare.push(pieces);
        }
    }

    fn retry(&self) {
        if let Err(e) = self.timer.set(RETRY) {
            log::error!("virtio-blk: timer: {e}");
        }
    }

    /// Guests can make requests fail as often as they like.
    fn complain(&mut self, what: &str, error: &io::Error) {
        let now = Instant::now();
        let quiet = self
            .complained
            .is_some_and(|last| now.duration_since(last) < QUIET);
        if !quiet {
            self.complained = Some(now);
            log::warn!("virtio-blk: {what}: {error} (more of it is counted and not told)");
        }
    }
}

fn out_of_reach() -> io::Result<()> {
    Err(io::Error::other("guest memory has gone"))
}

/// By plain system calls.
fn carry_out(
    disk: &Disk,
    request: &Request,
    pieces: &mut [IoVec],
    durable: bool,
) -> io::Result<()> {
    let Request { offset, len, .. } = *request;
    match request.operation {
        Operation::Read => disk.backing.read(pieces, offset),
        Operation::Write => disk.backing.write(pieces, offset, durable),
        Operation::Flush => disk.backing.flush(),
        Operation::Discard => disk.backing.discard(offset, len),
        Operation::Zero { unmap } => disk.backing.zero(offset, len, unmap),
        Operation::GetId => Ok(()),
    }
}

/// The rest of a transfer of which the kernel did `moved` bytes.
fn finish(
    disk: &Disk,
    request: &Request,
    pieces: &mut [IoVec],
    moved: u32,
    durable: bool,
) -> io::Result<()> {
    let rest = iovec::advance(pieces, usize::try_from(moved).unwrap_or(usize::MAX));
    let at = request.offset.saturating_add(moved.into());
    match request.operation {
        Operation::Write => disk.backing.write(rest, at, durable),
        _ => disk.backing.read(rest, at),
    }
}

fn is_retried(error: &io::Error, operation: Operation) -> bool {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EINTR) => true,
        // Zeroes can always be written.
        Some(libc::EOPNOTSUPP) => matches!(operation, Operation::Zero { .. }),
        _ => false,
    }
}

fn give_back(
    queue: &mut VirtQueue,
    ram: &RamView,
    chain: Chain,
    at: GuestAddress,
    status: Status,
) -> Result<(), QueueFault> {
    let told = ram.write_obj(status.byte(), at).is_ok();
    // §2.7.8.2: the first so many bytes are written. Behind data that was not, the status byte is
    // not among the first.
    let only_status = chain.writable_len() == 1;
    let written = match status {
        Status::Ok if told => chain.writable_len(),
        _ => u32::from(told && only_status),
    };
    if status != Status::Ok {
        queue.count_error();
    }
    queue.push(ram, chain, written)
}

fn count(disk: &Disk, request: &Request) {
    let gauges = &disk.gauges;
    let add = |gauge: &AtomicU64, by| gauge.fetch_add(by, Ordering::Relaxed);
    match request.operation {
        Operation::Read => {
            add(&gauges.reads, 1);
            add(&gauges.read_bytes, request.len);
        }
        Operation::Write => {
            add(&gauges.writes, 1);
            add(&gauges.written_bytes, request.len);
        }
        Operation::Flush => {
            add(&gauges.flushes, 1);
        }
        Operation::Discard | Operation::Zero { .. } => {
            add(&gauges.discards, 1);
        }
        Operation::GetId => {}
    }
}
