//! virtio-net (virtio 1.2 §5.1): one or several pairs of a receive and a transmit queue, and a control
//! queue.
//!
//! ```text
//!             control thread                        one thread for each queue pair
//!   NetPort ──link, limits──▶ Shared ◀─────────── Worker: Rx ◀── Wire (tap, ◀── host, passt
//!      │                        ▲                         Tx ──▶       stream)
//!      └──model per boot──▶ Net ┘                         Control (first pair only)
//!                                                  or KernelWorker: vhost-net moves the frames
//! ```
//! The receive queue of pair N is queue 2N, its transmit queue 2N + 1; the control queue follows the
//! last pair that was negotiated. Until the driver asks for more pairs, the host delivers to the first
//! one alone.

mod control;
mod kernel;
mod offload;
mod pace;
mod rx;
mod shared;
mod stream;
mod tx;
mod vectors;
mod vhost;
mod wire;
mod worker;

use std::sync::Arc;

use virtio_bindings::virtio_net as bits;

use crate::model::{ActivateError, Activated, Queues, SavedState, Shape, VirtioModel};
use crate::worker::{Attachment, IoHandle};
use control::Control;
use kernel::{KernelWorker, Pair};
use offload::bit;
use rx::Rx;
use shared::{Begin, Shared};
use tx::Tx;
use worker::Worker;

pub use shared::{NetPort, PortSettings, Way};
pub use vhost::{VhostError, VhostMemory, VhostNet};
pub use wire::{Wire, WireError, attach_tap};

const DEVICE_TYPE: u16 = 1;
const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
/// Up to `mtu`, the last field (virtio 1.2 §5.1.4).
const CONFIG_LEN: u32 = 12;
/// `status`: the link is up.
const LINK_UP: u16 = 1;

/// The model.
pub struct Net {
    shared: Arc<Shared>,
    /// One for each queue pair.
    io: Vec<IoHandle>,
    running: Vec<Serving>,
    /// Queues that are the driver's and nobody's concern.
    unused: Queues,
    /// No driver has started since the device was made or reset.
    afresh: bool,
}

/// Who serves a pair.
enum Serving {
    Here(Attachment<Worker>),
    Kernel(Attachment<KernelWorker>),
}

impl Net {
    /// A device on `port`, whose queue pairs are served in the threads of `io`, the last of them for
    /// all pairs that have none of their own.
    pub fn new(port: &NetPort, io: Vec<IoHandle>) -> Self {
        Self {
            shared: Arc::clone(&port.0),
            io,
            running: Vec::new(),
            unused: Vec::new(),
            afresh: true,
        }
    }

    fn pairs(&self) -> u16 {
        u16::try_from(self.shared.lanes.len()).unwrap_or(1)
    }

    fn features(&self) -> u64 {
        let own = [
            bits::VIRTIO_NET_F_MAC,
            bits::VIRTIO_NET_F_STATUS,
            bits::VIRTIO_NET_F_MRG_RXBUF,
            bits::VIRTIO_NET_F_CTRL_VQ,
            bits::VIRTIO_NET_F_CTRL_RX,
            bits::VIRTIO_NET_F_CTRL_RX_EXTRA,
            bits::VIRTIO_NET_F_CTRL_MAC_ADDR,
        ];
        let mut features = own.into_iter().fold(0, |all, own| all | bit(own));
        if self.shared.mtu.is_some() {
            features |= bit(bits::VIRTIO_NET_F_MTU);
        }
        if self.pairs() > 1 {
            features |= bit(bits::VIRTIO_NET_F_MQ);
        }
        if self.shared.offloads {
            // All queues of a tap take the same.
            let flags = self.shared.lanes.first().map(|lane| lane.wire.offloads());
            features |= offload::offered(flags.unwrap_or(0));
        }
        let kernels = self.shared.lanes.iter().filter_map(|l| l.kernel.as_ref());
        kernels.fold(features, |features, kernel| features & !kernel.missing())
    }

    fn config(&self) -> [u8; 12] {
        let [m0, m1, m2, m3, m4, m5] = self.shared.mac();
        let status = if self.shared.link() { LINK_UP } else { 0 };
        let [s0, s1] = status.to_le_bytes();
        let [p0, p1] = self.pairs().to_le_bytes();
        let [t0, t1] = self.shared.mtu.unwrap_or(0).to_le_bytes();
        [m0, m1, m2, m3, m4, m5, s0, s1, p0, p1, t0, t1]
    }

    /// Attaches the worker of pair `number`; it has begun when this returns.
    fn serve(
        &mut self,
        number: usize,
        pair: Pair,
        control: Option<Control>,
        begin: Begin,
        on: &Activated,
    ) -> Result<(), ActivateError> {
        let io = self.io.get(number).or_else(|| self.io.last());
        let lane = self.shared.lanes.get(number);
        let (Some(io), Some(lane)) = (io, lane) else {
            return Err(host("no thread for a queue pair", "a defect of the VMM"));
        };
        let (lane, shared) = (Arc::clone(lane), Arc::clone(&self.shared));
        let (ram, device) = (on.ram.clone(), on.device.clone());
        let attach = "the worker of a queue pair cannot be attached";
        let start = "a queue pair cannot be started";
        if lane.kernel.is_some() {
            let worker = KernelWorker::new(lane, shared, pair, control, begin, ram, device);
            let attached = io.attach(worker).map_err(|e| host(attach, e))?;
            let started = attached.with(KernelWorker::started);
            self.running.push(Serving::Kernel(attached));
            return started
                .map_err(|e| host(attach, e))?
                .map_err(|e| host(start, e));
        }
        let rx = Rx::new(pair.rx, begin.features, shared.mtu);
        let tx = Tx::new(pair.tx);
        let worker = Worker::new(lane, shared, rx, tx, control, begin, ram, device);
        let attached = io.attach(worker).map_err(|e| host(attach, e))?;
        let started = attached.with(Worker::started);
        self.running.push(Serving::Here(attached));
        started
            .map_err(|e| host(attach, e))?
            .map_err(|e| host(start, e))
    }
}

fn host(
    what: &'static str,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> ActivateError {
    ActivateError::Host {
        what,
        source: source.into(),
    }
}

/// The pairs the driver set up, from the first on without a gap.
fn pairs_of(on: &mut Activated, most: u16) -> Result<Vec<Pair>, ActivateError> {
    let first = Pair {
        rx: on.take_queue(0)?,
        tx: on.take_queue(1)?,
    };
    let mut pairs = vec![first];
    for number in 1..most {
        let index = number.saturating_mul(2);
        let there = |index| on.queues.iter().any(|queue| queue.index == index);
        if !there(index) || !there(index.saturating_add(1)) {
            break;
        }
        pairs.push(Pair {
            rx: on.take_queue(index)?,
            tx: on.take_queue(index.saturating_add(1))?,
        });
    }
    Ok(pairs)
}

impl VirtioModel for Net {
    fn shape(&self) -> Shape {
        let pairs = usize::from(self.pairs());
        let mut queues = vec![QUEUE_SIZE; pairs.saturating_mul(2)];
        queues.push(CONTROL_QUEUE_SIZE);
        let mut gauges = vec![
            ("rx_dropped", Arc::clone(&self.shared.dropped)),
            ("rx_spilled", Arc::clone(&self.shared.spilled)),
        ];
        if self.shared.lanes.iter().any(|lane| lane.wire.is_stream()) {
            gauges.push(("peers_lost", Arc::clone(&self.shared.peers_lost)));
        }
        Shape {
            name: "net",
            device_type: DEVICE_TYPE,
            features: self.features(),
            queues,
            config_len: CONFIG_LEN,
            gauges,
            ..Shape::default()
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = config.get(from..).unwrap_or_default();
        for (byte, value) in data.iter_mut().zip(rest) {
            *byte = *value;
        }
    }

    /// The address is set by command; nothing here can be written (virtio 1.2 §5.1.4).
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn start(&mut self, mut on: Activated) -> Result<(), ActivateError> {
        let features = on.features;
        let agreed = |feature| features & bit(feature) != 0;
        let afresh = std::mem::take(&mut self.afresh);
        // §5.1.2: the control queue follows the last pair that there can be.
        let most = if agreed(bits::VIRTIO_NET_F_MQ) {
            self.pairs()
        } else {
            1
        };
        let pairs = pairs_of(&mut on, most)?;
        let commands = if agreed(bits::VIRTIO_NET_F_CTRL_VQ) {
            on.take_queue(most.saturating_mul(2)).ok()
        } else {
            None
        };
        let shared = Arc::clone(&self.shared);
        let mut control = commands.map(|queue| Control::new(queue, shared, features, pairs.len()));
        self.unused = std::mem::take(&mut on.queues);
        *self.shared.device() = Some(on.device.clone());
        if afresh {
            self.shared.lanes.iter().for_each(|lane| lane.forget());
        }
        // The first pair comes last: it makes the device ready and takes commands for all of them.
        for (number, pair) in pairs.into_iter().enumerate().rev() {
            let first = number == 0;
            let begin = Begin {
                features,
                afresh: afresh && first,
            };
            let control = if first { control.take() } else { None };
            self.serve(number, pair, control, begin, &on)?;
        }
        Ok(())
    }

    fn stop(&mut self) -> Queues {
        *self.shared.device() = None;
        let mut queues = std::mem::take(&mut self.unused);
        // The first pair, which commands the others, was attached last.
        while let Some(serving) = self.running.pop() {
            let back = match serving {
                Serving::Here(attached) => attached.detach().map(Worker::into_queues),
                Serving::Kernel(attached) => attached
                    .with(KernelWorker::halt)
                    .and_then(|()| attached.detach())
                    .map(KernelWorker::into_queues),
            };
            match back {
                Ok(back) => queues.extend(back),
                Err(e) => log::warn!("virtio-net: {e}"),
            }
        }
        queues.sort_by_key(|queue| queue.index);
        queues
    }

    fn reset(&mut self) {
        self.afresh = true;
    }

    fn saved_state(&self) -> SavedState {
        SavedState::Unsupported
    }
}

#[cfg(test)]
mod tests;
