//! From the wire to the guest: frames are read straight into the driver's buffers.
//!
//! A frame's length is known only once it has been read, so buffers for the largest one are kept in
//! stock, and what exceeds the stock is read into a spill. With mergeable buffers (virtio 1.2
//! §5.1.6.3.1) a spilled frame waits there for more buffers: none is lost, and nothing is read behind
//! it. A driver that has given every descriptor it has and still has no room for a frame would wait
//! for ever; then the frame is dropped.
//!
//! A stream's frames have a known length, and wait where they were read to.

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
use super::stream::Stream;
use super::vectors::{self, Vectors};
use super::wire::{HEADER, Wire};
use crate::model::ActiveQueue;
use crate::queue::{Chain, QueueFault};

/// The largest frame there is: 64 KiB of packet (virtio 1.2 §5.1.6.3.1), its link header and tag.
const LARGEST: usize = HEADER + 65536 + 18;
/// Link header and tag around an MTU.
const LINK: usize = 18;
/// The least a frame has.
const LINK_HEADER: usize = 14;
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

/// A frame that waits for buffers.
#[derive(Clone, Copy)]
struct Waiting {
    /// Its length, header included.
    len: usize,
    place: Waits,
}

#[derive(Clone, Copy)]
enum Waits {
    /// So much of it is in the stock already, the rest in the spill.
    Spill { inside: usize },
    /// In the stream, without a header.
    Stream,
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
    waiting: Option<Waiting>,
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

    /// The queue as if nothing were in stock; a frame that waits in the spill is dropped.
    pub(super) fn into_queue(mut self) -> ActiveQueue {
        let spilt = |w: Waiting| matches!(w.place, Waits::Spill { .. });
        if self.waiting.is_some_and(spilt) {
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
        if let Some(waiting) = self.waiting {
            return self.deliver_waiting(ram, wire, shared, waiting, &stock);
        }
        match stock {
            Stock::Busy => return Ok(Some(End::Yield)),
            Stock::Short if self.stock.is_empty() => return Ok(Some(End::Starved)),
            Stock::Ready | Stock::Short => {}
        }
        if let Some(mut stream) = wire.as_stream() {
            return self.receive(ram, wire, shared, &mut stream, stock);
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
            let place = Waits::Spill { inside: self.room };
            self.waiting = Some(Waiting { len, place });
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
            .map_or(self.want, |waiting| self.want.max(waiting.len));
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

    /// Delivers the next frame of a stream.
    fn receive(
        &mut self,
        ram: &RamView,
        wire: &Wire,
        shared: &Shared,
        stream: &mut Stream,
        stock: Stock,
    ) -> Result<Option<End>, QueueFault> {
        let frame = match stream.front(wire.as_fd()) {
            Ok(frame) => frame,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Some(End::Idle)),
            Err(e) => {
                shared.lose_peer(&e);
                return Ok(Some(End::Gone));
            }
        };
        if frame < LINK_HEADER {
            stream.consume();
            shared.dropped.fetch_add(1, Ordering::Relaxed);
            return Ok(None);
        }
        let waiting = Waiting {
            len: frame.saturating_add(HEADER),
            place: Waits::Stream,
        };
        let stock = if waiting.len > self.room {
            shared.spilled.fetch_add(1, Ordering::Relaxed);
            self.waiting = Some(waiting);
            self.stock_up(ram)?
        } else {
            stock
        };
        self.deliver_from(ram, shared, waiting, Some(stream), &stock)
    }

    /// Delivers the frame that waits, if there is room for it now.
    fn deliver_waiting(
        &mut self,
        ram: &RamView,
        wire: &Wire,
        shared: &Shared,
        waiting: Waiting,
        stock: &Stock,
    ) -> Result<Option<End>, QueueFault> {
        let mut stream = wire.as_stream();
        self.deliver_from(ram, shared, waiting, stream.as_deref_mut(), stock)
    }

    fn deliver_from(
        &mut self,
        ram: &RamView,
        shared: &Shared,
        waiting: Waiting,
        stream: Option<&mut Stream>,
        stock: &Stock,
    ) -> Result<Option<End>, QueueFault> {
        let len = waiting.len;
        if len <= self.room {
            self.waiting = None;
            match (waiting.place, stream) {
                (Waits::Spill { inside }, _) => {
                    let spilt = self.spill.get(..len.saturating_sub(inside));
                    self.fill(ram, inside, spilt.unwrap_or_default());
                }
                (Waits::Stream, Some(stream)) => {
                    self.fill(ram, 0, &[0; HEADER]);
                    self.fill(ram, HEADER, stream.frame());
                    stream.consume();
                }
                (Waits::Stream, None) => return Ok(None),
            }
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
                if let Some(stream) = stream {
                    stream.consume();
                }
                self.queue.queue.count_error();
                shared.dropped.fetch_add(1, Ordering::Relaxed);
                Ok(None)
            }
        }
    }

    /// Writes `bytes` of a frame, from its byte `at` on, to where they belong in the stock.
    fn fill(&self, ram: &RamView, at: usize, bytes: &[u8]) {
        let len = at.saturating_add(bytes.len());
        let mut start = 0_usize;
        for stocked in &self.stock {
            if start >= len {
                break;
            }
            let room = usize::try_from(stocked.chain.writable_len()).unwrap_or(0);
            let end = start.saturating_add(room).min(len);
            let from = start.max(at);
            let part = bytes.get(from.saturating_sub(at)..end.saturating_sub(at));
            let offset = u32::try_from(from.saturating_sub(start));
            if let (true, Some(part), Ok(offset)) = (from < end, part, offset) {
                // A driver whose memory went away finds what it finds.
                let _ = stocked.chain.write(ram, offset, part);
            }
            start = start.saturating_add(room);
        }
    }

    /// Takes one frame off the wire for nobody.
    fn drop_frame(&mut self, wire: &Wire, shared: &Shared) -> Option<End> {
        self.waiting = None;
        if let Some(mut stream) = wire.as_stream() {
            if shared.is_lost() {
                return Some(End::Gone);
            }
            return match stream.front(wire.as_fd()) {
                Ok(_) => {
                    stream.consume();
                    shared.dropped.fetch_add(1, Ordering::Relaxed);
                    None
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => Some(End::Idle),
                Err(e) => {
                    shared.lose_peer(&e);
                    Some(End::Gone)
                }
            };
        }
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
