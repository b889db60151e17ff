//! Devices whose queues another process serves (vhost-user front-ends): network, file system, disk.
//!
//! ```text
//!   driver ═kick (ioeventfd)═▶ back-end ═▶ guest RAM (shared memfd)     ═call (irqfd)═▶ driver
//!                                 ▲
//!                 Unix socket: features, RAM, rings, positions
//!                                 │
//!   vCPU: start, stop ──▶ [Worker] in the device's own thread ◀── control thread: RAM changes
//! ```
//! Data never passes through this process. The back-end is not trusted to be well: it can write
//! guest RAM, which is what it is for, and harm the guest that way, and nothing else. Whatever it
//! sends, and if it sends nothing, no thread here waits longer than a deadline, and nothing panics.
//!
//! A back-end that goes takes nothing with it: see [`worker`].

mod connection;
mod control;
mod kind;
mod link;
mod message;
mod table;
mod worker;

use std::error::Error as StdError;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use testudo_memory::{RamListener, RamRange};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use connection::PeerError;
pub use kind::{VhostUserKind, VhostUserOptions};
pub use message::Malformed;

use crate::model::{ActivateError, Activated, Queues, SavedState, Shape, VirtioModel};
use crate::timer::Timer;
use crate::worker::{AttachError, Attachment, DetachError, IoHandle};
use connection::{Connection, Deadline};
use kind::Profile;
use link::Link;
use worker::{PATIENCE, Worker};

/// Where a back-end is.
#[derive(Debug)]
pub enum Backend {
    /// It listens there.
    Path(PathBuf),
    /// It is at the other end.
    Socket(OwnedFd),
}

/// The device could not be had.
#[derive(Debug, Error)]
pub enum VhostUserError {
    /// The back-end.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The thread.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The host.
    #[error("no eventfd or timer; check the limit of open files")]
    Host(#[source] io::Error),
}

/// What the worker tells others, on whichever thread they are.
struct Shared {
    /// What the guest may have of the back-end's and of ours.
    offered: u64,
    config: Mutex<Vec<u8>>,
    connected: Arc<AtomicU64>,
    lost: Arc<AtomicU64>,
    reconnects: Arc<AtomicU64>,
}

impl Shared {
    fn config(&self) -> MutexGuard<'_, Vec<u8>> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_config(&self, config: Vec<u8>) {
        *self.config() = config;
    }
}

/// A device with its back-end; it outlives its models. Clones are the same device.
#[derive(Clone)]
pub struct VhostUser {
    profile: Profile,
    shared: Arc<Shared>,
    worker: Arc<Attachment<Worker>>,
}

impl VhostUser {
    /// Connects to a back-end and agrees with it. All later exchanges happen in `thread`, which
    /// they may keep for seconds.
    pub fn open(
        backend: Backend,
        options: VhostUserOptions,
        thread: &IoHandle,
    ) -> Result<Self, VhostUserError> {
        let profile = Profile::new(options);
        let (connection, path) = match backend {
            Backend::Path(path) => (Connection::open(&path)?, Some(path)),
            Backend::Socket(socket) => (Connection::from_socket(socket)?, None),
        };
        let deadline = Deadline::after(PATIENCE);
        let link = Link::open(connection, &profile, deadline)?;
        if profile.asks_for_config() && !link.has_config() {
            let why = "keeps no configuration space, which such a device needs";
            return Err(PeerError::Unfit(why.to_owned()).into());
        }
        let config = if link.has_config() {
            link.read_config(profile.config_len(), deadline)?
        } else {
            Vec::new()
        };
        let shared = Arc::new(Shared {
            offered: link.features(),
            config: Mutex::new(config),
            connected: Arc::new(AtomicU64::new(1)),
            lost: Arc::default(),
            reconnects: Arc::default(),
        });
        let wake = EventFd::new(EFD_NONBLOCK).map_err(VhostUserError::Host)?;
        let timer = Timer::new().map_err(VhostUserError::Host)?;
        let to = Arc::clone(&shared);
        let worker = Worker::new(profile.clone(), path, to, link, wake, timer);
        Ok(Self {
            profile,
            shared,
            worker: Arc::new(thread.attach(worker)?),
        })
    }

    /// The device for a driver; one at a time.
    pub fn model(&self) -> Box<dyn VirtioModel> {
        Box::new(Model(self.clone()))
    }

    /// Keeps the back-end's account of guest RAM.
    pub fn ram_listener(&self) -> Box<dyn RamListener> {
        Box::new(Listener(Arc::clone(&self.worker)))
    }
}

struct Model(VhostUser);

impl VirtioModel for Model {
    fn shape(&self) -> Shape {
        let shared = &self.0.shared;
        let mut shape = self.0.profile.shape(shared.offered);
        shape.gauges = vec![
            ("connected", Arc::clone(&shared.connected)),
            ("lost", Arc::clone(&shared.lost)),
            ("reconnects", Arc::clone(&shared.reconnects)),
        ];
        shape
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let connected = self.0.shared.connected.load(Ordering::Relaxed) != 0;
        let config = self.0.profile.config(&self.0.shared.config(), connected);
        let from = usize::try_from(offset).ok().and_then(|at| config.get(at..));
        match from.and_then(|config| config.get(..data.len())) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0xff),
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if !self.0.profile.config_writable(offset, data.len()) {
            return;
        }
        let data = data.to_vec();
        let written = self.0.worker.with(move |w| w.write_config(offset, &data));
        if let Err(e) = written {
            log::debug!("virtio-{}: {e}", self.0.profile.name());
        }
    }

    fn start(&mut self, on: Activated) -> Result<(), ActivateError> {
        let started = self.0.worker.with(move |w| w.start(on));
        started.map_err(|e| ActivateError::Host {
            what: "the device's thread",
            source: Box::new(e),
        })
    }

    fn stop(&mut self) -> Queues {
        self.0.worker.with(Worker::stop).unwrap_or_else(|e| {
            log::debug!("virtio-{}: {e}", self.0.profile.name());
            Vec::new()
        })
    }

    fn saved_state(&self) -> SavedState {
        // The back-end has state of its own, which nobody asks it for.
        SavedState::Unsupported
    }
}

struct Listener(Arc<Attachment<Worker>>);

type ListenResult = Result<(), Box<dyn StdError + Send + Sync>>;

fn heard(answer: Result<Result<(), PeerError>, DetachError>) -> ListenResult {
    Ok(answer??)
}

impl RamListener for Listener {
    fn name(&self) -> &'static str {
        "vhost-user"
    }

    fn added(&mut self, range: &RamRange) -> ListenResult {
        let range = range.clone();
        heard(self.0.with(move |w| w.ram_added(&range)))
    }

    fn removed(&mut self, range: &RamRange) -> ListenResult {
        let range = range.clone();
        heard(self.0.with(move |w| w.ram_removed(&range)))
    }
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
