//! From the guest to the wire: each chain is a header and a frame, written from where it lies.
//!
//! The kernel checks the header against the frame (offsets, segment sizes) from one copy it makes of
//! it; a frame it does not take is counted and gone. A wire that is full keeps the chain in its queue.
//! Over a stream the frame goes without its header.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsFd;

use testudo_memory::RamView;
use vm_memory::Permissions;

use super::rx::End;
use super::shared::{Shared, Way};
use super::stream::{Pushed, Stream};
use super::vectors::Vectors;
use super::wire::{HEADER, Wire};
use crate::model::ActiveQueue;
use crate::queue::{Chain, QueueFault, Round, VirtQueue};

/// An Ethernet header.
const LINK: u32 = 14;
/// Frames taken before the thread looks at its other events.
const BUDGET: usize = 128;

pub(super) struct Tx {
    pub(super) queue: ActiveQueue,
    vectors: Vectors,
}

/// What became of a frame.
enum Sent {
    Yes,
    Dropped,
    Later,
}

impl Tx {
    pub(super) fn new(queue: ActiveQueue) -> Self {
        Self {
            queue,
            vectors: Vectors::default(),
        }
    }

    /// Moves frames until something is in the way.
    pub(super) fn pass(
        &mut self,
        ram: &RamView,
        wire: &Wire,
        shared: &Shared,
    ) -> Result<End, QueueFault> {
        if !flushed(wire, shared) {
            return Ok(End::Blocked);
        }
        let Self { queue, vectors } = self;
        let pace = shared.pace(Way::Tx);
        let mut left = BUDGET;
        let mut end = End::Yield;
        let round = queue.queue.drain(ram, |queue, chain| {
            if left == 0 {
                queue.put_back(chain);
                return Ok(ControlFlow::Break(()));
            }
            left = left.saturating_sub(1);
            if let Some(wait) = pace.wait() {
                queue.undo_pop(chain);
                end = End::Throttled(wait);
                return Ok(ControlFlow::Break(()));
            }
            match send(vectors, ram, wire, shared, queue, &chain) {
                Sent::Later => {
                    queue.undo_pop(chain);
                    end = End::Blocked;
                    return Ok(ControlFlow::Break(()));
                }
                Sent::Yes => pace.charge(frame_len(&chain).into()),
                Sent::Dropped => {}
            }
            queue.push(ram, chain, 0)?;
            Ok(ControlFlow::Continue(()))
        })?;
        queue.queue.notify(ram)?;
        Ok(match round {
            // The end of a frame waits for the wire.
            Round::Empty if wire.as_stream().is_some_and(|s| s.is_sending()) => End::Blocked,
            Round::Empty => End::Idle,
            Round::Stopped => end,
        })
    }
}

/// Whether nothing is left of a frame that went in part.
fn flushed(wire: &Wire, shared: &Shared) -> bool {
    let Some(mut stream) = wire.as_stream() else {
        return true;
    };
    if shared.is_lost() {
        return true;
    }
    stream.flush(wire.as_fd()).unwrap_or_else(|e| {
        shared.lose_peer(&e);
        true
    })
}

fn frame_len(chain: &Chain) -> u32 {
    let header = u32::try_from(HEADER).unwrap_or(0);
    chain.readable_len().saturating_sub(header)
}

fn send(
    vectors: &mut Vectors,
    ram: &RamView,
    wire: &Wire,
    shared: &Shared,
    queue: &VirtQueue,
    chain: &Chain,
) -> Sent {
    if !shared.link() {
        return Sent::Dropped;
    }
    if let Some(mut stream) = wire.as_stream() {
        return send_over(&mut stream, vectors, ram, wire, shared, queue, chain);
    }
    vectors.clear();
    let readable = vectors.push(ram, chain.readable(), Permissions::Read);
    if frame_len(chain) < LINK || readable.is_err() {
        queue.count_error();
        return Sent::Dropped;
    }
    match vectors.write(wire.as_fd()) {
        Ok(_) => Sent::Yes,
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Sent::Later,
        Err(e) => {
            log::debug!("virtio-net: a frame is not taken: {e}");
            queue.count_error();
            Sent::Dropped
        }
    }
}

fn send_over(
    stream: &mut Stream,
    vectors: &mut Vectors,
    ram: &RamView,
    wire: &Wire,
    shared: &Shared,
    queue: &VirtQueue,
    chain: &Chain,
) -> Sent {
    if frame_len(chain) < LINK {
        queue.count_error();
        return Sent::Dropped;
    }
    match stream.push(wire.as_fd(), vectors, ram, chain) {
        Ok(Pushed::Yes) => Sent::Yes,
        Ok(Pushed::Later) => Sent::Later,
        Ok(Pushed::Never) => {
            queue.count_error();
            Sent::Dropped
        }
        Err(e) => {
            shared.lose_peer(&e);
            Sent::Dropped
        }
    }
}
