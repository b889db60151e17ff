//! The control queue (virtio 1.2 §5.1.6.5): commands of the driver, answered one after the other by
//! the worker of the first queue pair.
//!
//! Frames are not filtered by address: a tap's neighbours decide what is sent to it. So filters are
//! accepted and change nothing, which the specification allows (§5.1.6.5.1: best effort).

use std::ops::ControlFlow;
use std::sync::Arc;

use testudo_memory::RamView;
use virtio_bindings::virtio_net as bits;

use super::offload;
use super::shared::Shared;
use crate::model::ActiveQueue;
use crate::queue::{Chain, QueueFault, Round, VirtQueue};

const OK: u8 = 0;
const ERR: u8 = 1;
/// Of a command only this much is read: class, command, and the longest argument that matters.
const READ: usize = 16;
/// Commands answered before the thread looks at its other events.
const BUDGET: usize = 64;

/// The control queue at work.
pub(super) struct Control {
    pub(super) queue: ActiveQueue,
    shared: Arc<Shared>,
    features: u64,
    /// Queue pairs whose queues the driver set up.
    pairs: usize,
}

impl Control {
    pub(super) fn new(
        queue: ActiveQueue,
        shared: Arc<Shared>,
        features: u64,
        pairs: usize,
    ) -> Self {
        Self {
            queue,
            shared,
            features,
            pairs,
        }
    }

    /// Answers what is there.
    pub(super) fn serve(&mut self, ram: &RamView) -> Result<(), QueueFault> {
        let Self {
            queue,
            shared,
            features,
            pairs,
        } = self;
        let mut left = BUDGET;
        let round = queue.queue.drain(ram, |queue, chain| {
            if left == 0 {
                queue.put_back(chain);
                return Ok(ControlFlow::Break(()));
            }
            left = left.saturating_sub(1);
            answer(queue, ram, chain, |command| {
                execute(command, shared, *features, *pairs)
            })?;
            Ok(ControlFlow::Continue(()))
        })?;
        if round == Round::Stopped {
            // More is there: others first.
            let _ = queue.kick.write(1);
        }
        queue.queue.notify(ram)
    }
}

/// A command as it was read.
#[derive(Debug, Clone, Copy)]
struct Command<'a> {
    class: u8,
    verb: u8,
    /// The beginning of what follows.
    argument: &'a [u8],
    /// Bytes of the whole.
    len: u32,
}

fn answer(
    queue: &mut VirtQueue,
    ram: &RamView,
    chain: Chain,
    execute: impl FnOnce(Command<'_>) -> bool,
) -> Result<(), QueueFault> {
    let mut bytes = [0; READ];
    let read = chain.read(ram, 0, &mut bytes).unwrap_or(0);
    let done = match bytes.get(..read) {
        // Nobody could be told of the outcome otherwise.
        Some([class, verb, argument @ ..]) if chain.writable_len() != 0 => execute(Command {
            class: *class,
            verb: *verb,
            argument,
            len: chain.readable_len(),
        }),
        _ => false,
    };
    if !done {
        queue.count_error();
    }
    let ack = if done { OK } else { ERR };
    let written = chain.write(ram, 0, &[ack]).unwrap_or(0);
    queue.push(ram, chain, u32::try_from(written).unwrap_or(0))
}

/// Whether the command was done.
fn execute(command: Command<'_>, shared: &Shared, features: u64, pairs: usize) -> bool {
    let agreed = |feature| features & offload::bit(feature) != 0;
    let (class, verb) = (u32::from(command.class), u32::from(command.verb));
    match (class, verb) {
        (bits::VIRTIO_NET_CTRL_RX, ..=bits::VIRTIO_NET_CTRL_RX_ALLMULTI) => {
            agreed(bits::VIRTIO_NET_F_CTRL_RX) && command.len == 3
        }
        (bits::VIRTIO_NET_CTRL_RX, ..=bits::VIRTIO_NET_CTRL_RX_NOBCAST) => {
            agreed(bits::VIRTIO_NET_F_CTRL_RX_EXTRA) && command.len == 3
        }
        (bits::VIRTIO_NET_CTRL_MAC, bits::VIRTIO_NET_CTRL_MAC_TABLE_SET) => {
            agreed(bits::VIRTIO_NET_F_CTRL_RX) && command.len >= 10
        }
        (bits::VIRTIO_NET_CTRL_MAC, bits::VIRTIO_NET_CTRL_MAC_ADDR_SET) => {
            let mac = <[u8; 6]>::try_from(command.argument);
            let (true, Ok(mac)) = (agreed(bits::VIRTIO_NET_F_CTRL_MAC_ADDR), mac) else {
                return false;
            };
            shared.set_mac(mac);
            true
        }
        (bits::VIRTIO_NET_CTRL_MQ, bits::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
            let Ok(wanted) = <[u8; 2]>::try_from(command.argument) else {
                return false;
            };
            let wanted = usize::from(u16::from_le_bytes(wanted));
            agreed(bits::VIRTIO_NET_F_MQ)
                && (1..=pairs).contains(&wanted)
                && use_pairs(shared, wanted)
        }
        (bits::VIRTIO_NET_CTRL_GUEST_OFFLOADS, bits::VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
            let Ok(wanted) = <[u8; 8]>::try_from(command.argument) else {
                return false;
            };
            let wanted = u64::from_le_bytes(wanted);
            agreed(bits::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)
                && wanted & !offload::guest_bits(features) == 0
                && set_offloads(shared, wanted)
        }
        _ => false,
    }
}

/// Lets the host deliver to the first `wanted` pairs and to no others.
fn use_pairs(shared: &Shared, wanted: usize) -> bool {
    let link = shared.link();
    let mut done = true;
    for (pair, lane) in shared.lanes.iter().enumerate() {
        let enabled = pair < wanted;
        if lane.enabled() == enabled {
            continue;
        }
        if let Err(e) = lane.enable(enabled, link) {
            log::warn!("virtio-net: queue pair {pair} cannot be switched: {e}");
            done = false;
        }
    }
    done
}

fn set_offloads(shared: &Shared, features: u64) -> bool {
    let Some(first) = shared.lanes.first() else {
        return false;
    };
    match first.wire.set_offloads(offload::flags(features)) {
        Ok(()) => true,
        Err(e) => {
            log::warn!("virtio-net: offloads cannot be changed: {e}");
            false
        }
    }
}
