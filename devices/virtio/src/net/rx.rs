//! From the wire to the guest: frames are read straight into the driver's buffers.
//!
//! A frame's length is known only once it has been read, so buffers for the largest one are kept in
//! stock, and what exceeds the stock is read into a spill. With mergeable buffers (virtio 1.2
//! §5.1.6.3.1) a spilled frame waits there for more buffers: none is lost, and nothing is read behind
//! it. A driver that has given every descriptor it has and still has no room for a frame would wait
//! for ever; then the frame is dropped.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::io::Errno;
use testudo_memory::RamView;
use virtio_bindings::virtio_net as bits;
use vm_memory::Permissions;

use super::offload;
use super::shared::{Shared, Way};
use super::vectors::{self, Vectors};
use super::wire::{HEADER, Wire};
use crate::model::ActiveQueue;
use crate::queue::{Chain, QueueFault};

/// The largest frame there is: 64 KiB of packet (virtio 1.2 §5.1.6.3.1), its link header and tag.
const LARGEST: usize = HEADER + 65536 + 18;
/// Link header and tag around an MTU.
const LINK: usize = 18;
/// Where the header counts the buffers of a frame.
const NUM_BUFFERS: u32 = 10;
/// Frames taken before the thread looks at its other events.
const BUDGET: usize = 128;

/// How a pass over a queue ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The other side has nothing more; it will signal.
    Idle,
    /// The driver has no buffers; it will kick.
    Starved,
    /// The wire takes no more now; it will signal.
    Blocked,
    /// The rate limit says to wait so long.
    Throttled(Duration),
    /// There is more; others first.
    Yield,
    /// The wire is not there.
    Gone,
}

/// What the driver has ready.
enum Stock {
    /// Enough, or as much as one frame may use.
    Ready,
    /// Less, and the driver kicks when there is more.
    Short,
    /// A driver that keeps this busy with useless chains.
    Busy,
}

struct Stocked {
    chain: Chain,
    pieces: usize,
}

pub(super) struct Rx {
    pub(super) queue: ActiveQueue,
    mergeable: bool,
    /// Bytes to keep in stock.
    want: usize,
    stock: VecDeque<Stocked>,
    /// The stock's buffers.
    vectors: Vectors,
    /// Bytes in stock.
    room: usize,
    spill: Vec<u8>,
    /// A frame that waits for buffers: its length, and how much of it is in the stock already.
    waiting: Option<(usize, usize)>,
    filled: Vec<(Chain, u32)>,
    kicks_on: bool,
}

impl Rx {
    pub(super) fn new(queue: ActiveQueue, features: u64, mtu: Option<u16>) -> Self {
        let frame = usize::from(mtu.unwrap_or(1500).max(1500)).saturating_add(LINK);
        let want = if offload::large(features) {
            LARGEST
        } else {
            frame.saturating_add(HEADER)
        };
        Self {
            queue,
            mergeable: features & offload::bit(bits::VIRTIO_NET_F_MRG_RXBUF) != 0,
            want,
            stock: VecDeque::new(),
            vectors: Vectors::default(),
            room: 0,
            spill: vec![0; LARGEST],
            waiting: None,
            filled: Vec::new(),
            kicks_on: true,
        }
    }

    /// The queue as if nothing were in stock; a frame that waits is dropped.
    pub(super) fn into_queue(mut self) -> ActiveQueue {
        if self.waiting.is_some() {
            self.queue.queue.count_error();
        }
        while let Some(stocked) = self.stock.pop_back() {
            self.queue.queue.put_back(stocked.chain);
        }
        self.queue
    }

    /// Moves frames until something is in the way.
    pub(super) fn pass(
        &mut self,
        ram: &RamView,
        wire: &Wire,
        shared: &Shared,
    ) -> Result<End, QueueFault> {
        let mut end = End::Yield;
        for _ in 0..BUDGET {
            if let Some(reason) = self.step(ram, wire, shared)? {
                end = reason;
                break;
            }
        }
        self.queue.queue.notify(ram)?;
        Ok(end)
    }

    /// Moves one frame; what is in the way if it cannot.
    fn step(
        &mut self,
        ram: &RamView,
        wire: &Wire,
        shared: &Shared,
    ) -> Result<Option<End>, QueueFault> {
        if !shared.link() {
            return Ok(self.drop_frame(wire, shared));
        }
        if let Some(wait) = shared.pace(Way::Rx).wait() {
            self.queue.queue.count_stall();
            return Ok(Some(End::Throttled(wait)));
        }
        let stock = self.stock_up(ram)?;
        if let Some((len, inside)) = self.waiting {
            return self.deliver_waiting(ram, shared, len, inside, &stock);
        }
        match stock {
            Stock::Busy => return Ok(Some(End::Yield)),
            Stock::Short if self.stock.is_empty() => return Ok(Some(End::Starved)),
            Stock::Ready | Stock::Short => {}
        }
        let pieces = self.vectors.len();
        let len = match self.vectors.read(wire.as_fd(), pieces, &mut self.spill) {
            Ok(len) => len,
            Err(e) => return Ok(Some(end_of(&e))),
        };
        if len < HEADER {
            shared.dropped.fetch_add(1, Ordering::Relaxed);
        } else if len <= self.room {
            self.deliver(ram, shared, len)?;
        } else if self.mergeable {
            shared.spilled.fetch_add(1, Ordering::Relaxed);
            self.waiting = Some((len, self.room));
        } else {
            // §5.1.6.3.2: one chain, or not at all.
            self.queue.queue.count_error();
            shared.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(None)
    }

    /// Takes chains until there is room for the largest frame.
    fn stock_up(&mut self, ram: &RamView) -> Result<Stock, QueueFault> {
        let want = self
            .waiting
            .map_or(self.want, |(len, _)| self.want.max(len));
        for _ in 0..=self.queue.queue.size() {
            let one = !self.mergeable && !self.stock.is_empty();
            if self.room >= want || one {
                if std::mem::take(&mut self.kicks_on) {
                    self.queue.queue.pause_kicks(ram)?;
                }
                return Ok(Stock::Ready);
            }
            let Some(chain) = self.queue.queue.pop(ram)? else {
                self.kicks_on = true;
                if self.queue.queue.resume_kicks(ram)? {
                    continue;
                }
                return Ok(Stock::Short);
            };
            if !self.keep(ram, chain)? {
                return Ok(Stock::Ready);
            }
        }
        Ok(Stock::Busy)
    }

    /// Puts `chain` into stock, or back if no frame could use it; `false` if the stock is full.
    fn keep(&mut self, ram: &RamView, chain: Chain) -> Result<bool, QueueFault> {
        let before = self.vectors.len();
        let room = usize::try_from(chain.writable_len()).unwrap_or(0);
        let access = Permissions::Write;
        let usable = room >= HEADER && self.vectors.push(ram, chain.writable(), access).is_ok();
        let pieces = self.vectors.len().saturating_sub(before);
        // One piece is the spill's.
        let fits = self.vectors.len() < vectors::MAX;
        if usable && fits {
            self.room = self.room.saturating_add(room);
            self.stock.push_back(Stocked { chain, pieces });
            return Ok(true);
        }
        self.vectors.truncate(before);
        if usable && before != 0 {
            self.queue.queue.put_back(chain);
            return Ok(false);
        }
        self.queue.queue.count_error();
        self.queue.queue.push(ram, chain, 0)?;
        Ok(true)
    }

    /// Returns the chains that a frame of `len` bytes, header included, has filled.
    fn deliver(&mut self, ram: &RamView, shared: &Shared, len: usize) -> Result<(), QueueFault> {
        let mut left = len;
        let mut pieces = 0_usize;
        while left != 0 {
            let Some(stocked) = self.stock.pop_front() else {
                break;
            };
            let room = usize::try_from(stocked.chain.writable_len()).unwrap_or(0);
            let now = left.min(room);
            left = left.saturating_sub(now);
            self.room = self.room.saturating_sub(room);
            pieces = pieces.saturating_add(stocked.pieces);
            let now = u32::try_from(now).unwrap_or(u32::MAX);
            self.filled.push((stocked.chain, now));
        }
        self.vectors.drop_front(pieces);
        let buffers = u16::try_from(self.filled.len()).unwrap_or(u16::MAX);
        if let Some((first, _)) = self.filled.first() {
            // A driver whose memory went away finds what it finds.
            let _ = first.write(ram, NUM_BUFFERS, &buffers.to_le_bytes());
        }
        self.queue.queue.push_all(ram, self.filled.drain(..))?;
        let frame = len.saturating_sub(HEADER);
        let frame = u64::try_from(frame).unwrap_or(u64::MAX);
        shared.pace(Way::Rx).charge(frame);
        Ok(())
    }

    /// Delivers the frame that waits in the spill, if there is room for it now.
    fn deliver_waiting(
        &mut self,
        ram: &RamView,
        shared: &Shared,
        len: usize,
        inside: usize,
        stock: &Stock,
    ) -> Result<Option<End>, QueueFault> {
        if len <= self.room {
            self.waiting = None;
            self.copy_spill(ram, len, inside);
            self.deliver(ram, shared, len)?;
            return Ok(None);
        }
        let all = self.queue.queue.in_flight() >= self.queue.queue.size();
        match stock {
            Stock::Busy => Ok(Some(End::Yield)),
            Stock::Short if !all => {
                self.queue.queue.count_stall();
                Ok(Some(End::Starved))
            }
            Stock::Ready | Stock::Short => {
                self.waiting = None;
                self.queue.queue.count_error();
                shared.dropped.fetch_add(1, Ordering::Relaxed);
                Ok(None)
            }
        }
    }

    /// Moves the spilled end of a frame, its bytes from `inside` to `len`, to where it belongs.
    fn copy_spill(&mut self, ram: &RamView, len: usize, inside: usize) {
        let mut start = 0_usize;
        for stocked in &self.stock {
            let room = usize::try_from(stocked.chain.writable_len()).unwrap_or(0);
            let end = start.saturating_add(room).min(len);
            let from = start.max(inside);
            let bytes = self
                .spill
                .get(from.saturating_sub(inside)..end.saturating_sub(inside));
            let offset = u32::try_from(from.saturating_sub(start));
            if let (true, Some(bytes), Ok(offset)) = (from < end, bytes, offset) {
                // A driver whose memory went away finds what it finds.
                let _ = stocked.chain.write(ram, offset, bytes);
            }
            start = start.saturating_add(room);
        }
    }

    /// Takes one frame off the wire for nobody.
    fn drop_frame(&mut self, wire: &Wire, shared: &Shared) -> Option<End> {
        self.waiting = None;
        match self.vectors.read(wire.as_fd(), 0, &mut self.spill) {
            Ok(_) => {
                shared.dropped.fetch_add(1, Ordering::Relaxed);
                None
            }
            Err(e) => Some(end_of(&e)),
        }
    }
}

/// What a failed read means.
fn end_of(error: &io::Error) -> End {
    if error.kind() == io::ErrorKind::WouldBlock {
        return End::Idle;
    }
    // A queue that the driver does not use is detached, which is no news.
    if error.raw_os_error() != Some(Errno::BADFD.raw_os_error()) {
        log::warn!("virtio-net: the wire cannot be read: {error}");
    }
    End::Gone
}
