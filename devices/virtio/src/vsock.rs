//! virtio-vsock (virtio 1.2 §5.10): stream sockets between the guest and unix sockets of the host.
//!
//! ```text
//!   host process ── connect(PATH), "CONNECT 1024\n" ──▶ guest's port 1024
//!   guest ── connect(CID 2, port 80) ──▶ PATH_80, where a host process listens
//! ```
//! [`VsockBackend`] has the sockets and serves them in its thread for as long as it lives; a [`Vsock`]
//! brings it a guest's queues when the driver starts and takes them away when it stops. So a pause
//! leaves connections as they are, a reset of the guest ends them, and what a guest sent before it
//! was reset or powered off still reaches the host.
//!
//! Memory is bounded by credit: what the host does not read is kept up to 256 KiB a stream, then the
//! guest's writer waits. Data the host sends is read from its socket straight into the guest's
//! buffers, as far as the guest has given credit, so none of it is kept here.

mod backlog;
mod host;
mod packet;
mod session;
mod stream;
mod transfer;
mod worker;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use host::VsockHost;

use crate::model::{ActivateError, Activated, Queues, SavedState, Shape, VirtioModel};
use crate::worker::{AttachError, Attachment, IoHandle};
use session::Session;
use worker::Worker;

const DEVICE_TYPE: u16 = 19;
/// VIRTIO_VSOCK_F_STREAM.
const STREAMS: u64 = 1 << 0;
const QUEUE_SIZE: u16 = 256;
const RX: u16 = 0;
const TX: u16 = 1;
const EVENT: u16 = 2;

/// The back end could not be made.
#[derive(Debug, Error)]
pub enum VsockError {
    /// Eventfd or timer.
    #[error("no eventfd or timer; check the limit of open files")]
    Event(#[from] io::Error),
    /// No thread to serve it.
    #[error(transparent)]
    Attach(#[from] AttachError),
}

/// What is counted beside the queues.
#[derive(Debug, Clone, Default)]
struct Gauges {
    streams: Arc<AtomicU64>,
    opened: Arc<AtomicU64>,
    refused: Arc<AtomicU64>,
}

impl Gauges {
    fn streams(&self, count: usize) {
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        self.streams.store(count, Ordering::Relaxed);
    }

    fn opened(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
    }

    fn refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    fn by_name(&self) -> Vec<(&'static str, Arc<AtomicU64>)> {
        vec![
            ("streams", Arc::clone(&self.streams)),
            ("streams_opened", Arc::clone(&self.opened)),
            ("streams_refused", Arc::clone(&self.refused)),
        ]
    }
}

/// The host's sockets and the worker that serves them. Clones are the same.
#[derive(Clone)]
pub struct VsockBackend {
    worker: Arc<Attachment<Worker>>,
    gauges: Gauges,
}

impl VsockBackend {
    /// Streams at a time, unless fewer are wanted.
    pub const STREAMS: usize = 1024;

    /// Serves `host` in `io`'s thread, with at most `streams` streams at a time.
    pub fn new(host: VsockHost, streams: usize, io: &IoHandle) -> Result<Self, VsockError> {
        let gauges = Gauges::default();
        let poke = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let worker = Worker::new(host, gauges.clone(), streams, poke)?;
        Ok(Self {
            worker: Arc::new(io.attach(worker)?),
            gauges,
        })
    }

    /// Waits until everything the guest has sent is with the host, for as long as the host takes
    /// some within `patience`. The guest must not run any more. Returns how many bytes are left.
    pub fn drain(&self, patience: Duration) -> usize {
        let mut last = (usize::MAX, Instant::now());
        loop {
            let left = match self.worker.with(Worker::undelivered) {
                Ok(left) => left,
                Err(e) => {
                    log::debug!("vsock: {e}");
                    return 0;
                }
            };
            if left != last.0 {
                last = (left, Instant::now());
            }
            if left == 0 || last.1.elapsed() > patience {
                return left;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// The model.
pub struct Vsock {
    cid: u32,
    backend: VsockBackend,
}

impl Vsock {
    /// A device by which the guest has the address `cid`.
    pub fn new(cid: u32, backend: VsockBackend) -> Self {
        Self { cid, backend }
    }
}

impl VirtioModel for Vsock {
    fn shape(&self) -> Shape {
        Shape {
            name: "vsock",
            device_type: DEVICE_TYPE,
            features: STREAMS,
            queues: vec![QUEUE_SIZE; 3],
            config_len: 8,
            gauges: self.backend.gauges.by_name(),
            ..Shape::default()
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = u64::from(self.cid).to_le_bytes();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = config.iter().copied().skip(from);
        for (byte, value) in data.iter_mut().zip(bytes) {
            *byte = value;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn start(&mut self, mut on: Activated) -> Result<(), ActivateError> {
        let (rx, tx) = (on.take_queue(RX)?, on.take_queue(TX)?);
        let event = on.take_queue(EVENT).ok();
        let session = Session::new(rx, tx, event, on.ram, on.device);
        let cid = u64::from(self.cid);
        let started = self.backend.worker.with(move |w| w.start(cid, session));
        started.map_err(|e| ActivateError::Host {
            what: "the thread that serves the sockets has ended",
            source: Box::new(e),
        })
    }

    fn stop(&mut self) -> Queues {
        self.backend.worker.with(Worker::stop).unwrap_or_else(|e| {
            log::debug!("virtio-vsock: {e}");
            Vec::new()
        })
    }

    fn reset(&mut self) {
        if let Err(e) = self.backend.worker.with(Worker::forget) {
            log::debug!("virtio-vsock: {e}");
        }
    }

    fn saved_state(&self) -> SavedState {
        // Streams end where a guest is restored, as the specification has it.
        SavedState::QueuesOnly
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        // The guest goes with its board.
        self.reset();
    }
}

#[cfg(test)]
mod tests;
