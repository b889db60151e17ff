//! virtio-fs (virtio 1.2 §5.11): a directory of the host as a file system of the guest, served in
//! this process.
//!
//! ```text
//!   hiprio, queue 1 ─▶ Worker ─┐            ┌─ Export: the directory; openat2 below it
//!   queue 2         ─▶ Worker ─┼─▶ Server ──┼─ Nodes, handles: what the guest knows and has open
//!   …                          │            └─ Mappings: the DAX window
//! ```
//! Each worker is in a thread of its own, so that a slow request keeps only its own queue waiting.
//! The parser and every operation take the guest for hostile: see [`request`] and [`host`].

mod attr;
mod dir;
mod file;
mod forgets;
mod handle;
mod hints;
mod host;
mod mapping;
mod names;
mod node;
mod request;
mod server;
mod session;
mod table;
mod wire;
mod worker;

use std::io;
use std::sync::Arc;

use testudo_memory::HostWindow;

use crate::model::{
    ActivateError, Activated, Queues, SavedState, Shape, SharedMemory, VirtioModel,
};
use crate::timer::Timer;
use crate::worker::{Attachment, IoHandle};
use server::Server;
use worker::{Farewell, Worker};

pub use host::{Export, ExportError};
pub use mapping::Mender;

const DEVICE_TYPE: u16 = 26;
/// Room for a request of 256 pages without an indirect table.
const QUEUE_SIZE: u16 = 1024;
/// Id of the DAX window (virtio 1.2 §5.11.5).
const WINDOW: u8 = 0;
/// Bytes of the tag, which is padded with zeroes.
pub(crate) const TAG_MAX: usize = 36;

/// How much the guest may take for granted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Caching {
    /// Nothing: data, names and attributes are asked for each time.
    None,
    /// Names and attributes for a second; data until a file is opened again and has changed.
    #[default]
    Auto,
    /// Everything, until the guest itself drops it: nobody else changes the export.
    Always,
}

/// How a directory is exported.
#[derive(Debug, Clone)]
pub struct FsOptions {
    /// Its name in the guest, 1 to 36 bytes.
    pub tag: String,
    /// The guest may change nothing.
    pub readonly: bool,
    /// What the guest may cache.
    pub caching: Caching,
    /// Writes may stay in the guest's cache.
    pub writeback: bool,
    /// Extended attributes are passed on.
    pub xattr: bool,
    /// POSIX ACLs are passed on and heeded by the guest.
    pub acl: bool,
    /// Descriptors the export may hold.
    pub descriptors: usize,
}

/// The model.
pub struct Fs {
    threads: Vec<IoHandle>,
    server: Arc<Server>,
    timer: Arc<Timer>,
    running: Vec<Attachment<Worker>>,
    /// A session may have begun.
    used: bool,
}

impl Fs {
    /// Serves `export`, with a request queue for each of `threads`, of which there is at least
    /// one, and with a DAX window if one is given. Opens a timer and nothing else.
    pub fn new(
        export: Arc<Export>,
        options: FsOptions,
        window: Option<Arc<HostWindow>>,
        threads: Vec<IoHandle>,
    ) -> io::Result<Self> {
        let server = Server::new(export, options, window)?;
        Ok(Self {
            threads,
            server: Arc::new(server),
            timer: Arc::new(Timer::new()?),
            running: Vec::new(),
            used: false,
        })
    }

    /// By which the control thread mends the DAX window.
    pub fn mender(&self) -> Mender {
        Mender::new(&self.server)
    }

    /// Prepares the calling thread to serve exports. It is done anyway before the first request;
    /// a thread with a system call filter does it before.
    pub fn prepare_thread() -> io::Result<()> {
        host::prepare_thread().map(drop)
    }

    fn config(&self) -> [u8; TAG_MAX + 4] {
        let mut config = [0; TAG_MAX + 4];
        let (tag, queues) = config.split_at_mut(TAG_MAX);
        for (to, from) in tag.iter_mut().zip(self.server.options.tag.bytes()) {
            *to = from;
        }
        let count = u32::try_from(self.threads.len()).unwrap_or(1);
        queues.copy_from_slice(&count.to_le_bytes());
        config
    }
}

impl VirtioModel for Fs {
    fn shape(&self) -> Shape {
        let window = self.server.window.as_ref();
        let gauges = &self.server.gauges;
        Shape {
            name: "fs",
            device_type: DEVICE_TYPE,
            queues: vec![QUEUE_SIZE; self.threads.len().saturating_add(1)],
            config_len: u32::try_from(TAG_MAX + 4).unwrap_or(0),
            shared_memory: window.map(|window| SharedMemory {
                id: WINDOW,
                window: Arc::clone(window),
            }),
            gauges: vec![
                ("nodes", Arc::clone(&gauges.nodes)),
                ("open_files", Arc::clone(&gauges.handles)),
                ("dax_granules", Arc::clone(&gauges.mapped)),
                ("dax_mended", Arc::clone(&gauges.mended)),
            ],
            ..Shape::default()
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let rest = usize::try_from(offset).ok().and_then(|at| config.get(at..));
        for (to, from) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *to = *from;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn start(&mut self, mut on: Activated) -> Result<(), ActivateError> {
        for needed in [0, 1] {
            if !on.queues.iter().any(|queue| queue.index == needed) {
                return Err(ActivateError::QueueMissing { index: needed });
            }
        }
        self.used = true;
        for (number, thread) in (0..).zip(&self.threads) {
            let here = |index: u16| usize::from(index).saturating_sub(1) == number;
            let (mine, others) = on.queues.into_iter().partition(|q| here(q.index));
            on.queues = others;
            let server = Arc::clone(&self.server);
            let timer = Arc::clone(&self.timer);
            let worker = Worker::new(server, mine, timer, on.ram.clone(), on.device.clone());
            let attached = thread.attach(worker).map_err(|e| ActivateError::Host {
                what: "a worker of the file system cannot be attached",
                source: Box::new(e),
            })?;
            self.running.push(attached);
        }
        Ok(())
    }

    fn stop(&mut self) -> Queues {
        let mut queues = Queues::new();
        for attached in std::mem::take(&mut self.running) {
            match attached.detach() {
                Ok(worker) => queues.extend(worker.into_queues()),
                Err(e) => log::warn!("virtio-fs: {e}"),
            }
        }
        queues.sort_by_key(|queue| queue.index);
        queues
    }

    fn reset(&mut self) {
        if !std::mem::take(&mut self.used) {
            return;
        }
        let Some(thread) = self.threads.first() else {
            return;
        };
        match thread.attach(Farewell(Arc::clone(&self.server))) {
            Ok(done) => drop(done),
            Err(e) => log::debug!("virtio-fs: {e}"),
        }
    }

    fn saved_state(&self) -> SavedState {
        // Descriptors of another host's files mean nothing there.
        SavedState::Unsupported
    }
}

#[cfg(test)]
mod tests;
