//! The guest's virtio devices: what a configuration asks for, what of the host they hold, and the
//! models they become.
//!
//! ```text
//!   Config ─check─▶ DeviceSpec ──open──▶ OpenDevice ──model──▶ VirtioModel on the board
//!   (words)         (pure)               (host objects,        (one for each boot of the guest)
//!                                         once, before the plan
//!                                         is built; threads)
//! ```
//! Each kind of device has a file of its own, with its words, its check, its flag and its host half;
//! [`from_config`] lists them. The control thread owns the open devices and [adjusts](Adjust) them.

mod balloon;
mod console;
mod disk;
mod fs;
mod mem;
mod net;
mod pmem;
mod rng;
mod vhost_user;
mod vsock;
mod watchdog;

use std::collections::BTreeSet;
use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use testudo_arch::Span;
use testudo_memory::{Backing, GuestRam, GuestWindows, RamListener};
use testudo_protocol::LimitsSpec;
use thiserror::Error;
use virtio_devices::{IoHandle, IoThread, SpawnError, VirtioModel};

use crate::letters::Letters;
use crate::seccomp::{self, ThreadKind};
use crate::spec::{Config, Seccomp, Source};

pub use balloon::BalloonConfig;
pub use console::PortConfig;
pub use disk::DiskConfig;
pub use fs::{CachingConfig, FsConfig};
pub(crate) use mem::Growth;
pub use net::{MacAddress, NetConfig};
pub use pmem::PmemConfig;
pub use rng::RngConfig;
pub use vhost_user::VhostUserConfig;
pub use vsock::VsockConfig;
pub use watchdog::{OnWatchdog, WatchdogConfig};

/// Id of the device that grows and shrinks the guest's memory.
pub(crate) const MEMORY: &str = "memory";
/// Id of the virtio console.
pub(crate) const CONSOLE: &str = "console";
/// Id of the balloon.
pub(crate) const BALLOON: &str = "balloon";

/// A device as it was asked for, checked as far as the words alone can tell.
pub(crate) trait DeviceSpec: fmt::Debug + Send + Sync {
    /// Its kind, as plans and `ctl info` show it: "virtio-blk".
    fn kind(&self) -> &'static str;
    /// Its name, one of its own among all devices of the machine.
    fn id(&self) -> &str;
    /// Files it names, none of which may be handed over twice.
    fn sources(&self) -> Vec<&Source> {
        Vec::new()
    }
    /// The room it needs in the guest's address space beside its registers.
    fn space(&self) -> Result<Space, DeviceError> {
        Ok(Space::default())
    }
    /// Opens what it needs of the host. Called once, before anything is built.
    fn open(&self, host: &HostContext) -> Result<Box<dyn OpenDevice>, DeviceError>;
}

/// Room in the guest's address space, in bytes; 0 is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Space {
    /// A shared memory region in a BAR: a power of two.
    pub(crate) shared_memory: u64,
    /// Memory of its own, outside of PCI.
    pub(crate) guest_memory: u64,
    /// Its alignment, a power of two, if there is any.
    pub(crate) alignment: u64,
}

/// A device with everything it needs of the host. It outlives the board: a guest that boots again
/// gets a new model of the same device.
pub(crate) trait OpenDevice: Send {
    /// The model for a board.
    fn model(&self, place: &Place<'_>) -> Result<Box<dyn VirtioModel>, DeviceError>;
    /// Changes something while the guest runs.
    fn adjust(&self, what: &Adjust) -> Result<(), AdjustError> {
        Err(AdjustError::Unsupported(what.verb()))
    }
    /// Who is to be told of guest RAM, for the life of a board.
    fn ram_listener(&self) -> Option<Box<dyn RamListener>> {
        None
    }
    /// The device has asked for a change of guest RAM, or another one has: makes it, if it has.
    fn attend(&self, _ram: &mut GuestRam, _backing: &Backing) {}
    /// The guest is gone and another one will boot: takes back the RAM that the device added.
    fn forget_guest(&self, _ram: &mut GuestRam) {}
    /// How much memory there may be beside what was there at boot.
    fn memory(&self) -> Option<Growth> {
        None
    }
    /// A vCPU has touched memory that is not there: puts something in the place of what has gone of the
    /// device's own; how many pages that was so far.
    fn mend(&self) -> u64 {
        0
    }
    /// The terminal that the VMM runs on has another size.
    fn window_changed(&self) {}
    /// The VM has ended, its vCPUs stand, and the process is about to exit without taking the device
    /// apart: delivers what the guest had handed over, gives back what outlives the process.
    fn end(&self) {}
}

/// What can be changed of a running device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Adjust {
    /// A disk's backing has, or shall have, so many bytes.
    DiskSize(u64),
    /// A virtio-mem device shall offer so many bytes.
    Memory(u64),
    /// A balloon shall hold so many bytes.
    Balloon(u64),
    /// Rate limits.
    Limits(LimitsSpec),
    /// Columns and rows of a console.
    ConsoleSize(u16, u16),
    /// A network device's cable shall be plugged in, or not.
    Link(bool),
}

impl Adjust {
    fn verb(&self) -> &'static str {
        match self {
            Self::DiskSize(_) => "be resized",
            Self::Memory(_) => "change the guest's memory",
            Self::Balloon(_) => "hold a balloon",
            Self::Limits(_) => "be limited",
            Self::ConsoleSize(..) => "have a size",
            Self::Link(_) => "have a link",
        }
    }
}

/// A device cannot be changed so.
#[derive(Debug, Error)]
pub(crate) enum AdjustError {
    /// No device of this kind can.
    #[error("such a device cannot {0}")]
    Unsupported(&'static str),
    /// This value cannot be.
    #[error("{0}")]
    Value(String),
    /// The host did not do it.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
}

/// What a device may use of the process it is opened in.
pub(crate) struct HostContext {
    pub(crate) seccomp: Seccomp,
    pub(crate) letters: Letters,
}

impl HostContext {
    /// A thread for workers, under the system call filter of its kind.
    pub(crate) fn thread(&self, name: &str, kind: ThreadKind) -> Result<IoThread, SpawnError> {
        self.prepared_thread(name, kind, || Ok(()))
    }

    /// The same, with something the thread does before it is filtered.
    pub(crate) fn prepared_thread(
        &self,
        name: &str,
        kind: ThreadKind,
        prepare: impl FnOnce() -> std::io::Result<()> + Send + 'static,
    ) -> Result<IoThread, SpawnError> {
        let mode = self.seccomp;
        IoThread::spawn(name, move || {
            prepare()?;
            seccomp::apply(kind, mode).map_err(std::io::Error::other)
        })
    }
}

/// Where a model is to work.
pub(crate) struct Place<'a> {
    /// The thread that serves devices without one of their own.
    pub(crate) io: IoHandle,
    /// Shows memory to the guest.
    pub(crate) windows: &'a Arc<dyn GuestWindows>,
    /// Where the device asks the control thread for what only that may do.
    pub(crate) letters: &'a Letters,
    /// The room the plan gave to [`Space::guest_memory`].
    pub(crate) memory: Option<Span>,
}

/// A device could not be had.
#[derive(Debug, Error)]
#[error("{kind} {id}")]
pub struct DeviceError {
    kind: &'static str,
    id: String,
    #[source]
    source: Box<dyn StdError + Send + Sync>,
}

impl DeviceError {
    /// `source` happened to `device`.
    pub(crate) fn new(
        device: &dyn DeviceSpec,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self {
            kind: device.kind(),
            id: device.id().to_owned(),
            source: source.into(),
        }
    }
}

/// The words do not make a device.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{id}: {why}")]
pub struct BadDevice {
    id: String,
    why: String,
}

impl BadDevice {
    pub(crate) fn new(id: &str, why: impl Into<String>) -> Self {
        Self {
            id: id.to_owned(),
            why: why.into(),
        }
    }
}

/// The devices of a configuration, in the order of their PCI slots.
pub(crate) fn from_config(config: &Config) -> Result<Vec<Arc<dyn DeviceSpec>>, BadDevice> {
    let mut list = List::default();
    list.add(config.rng.check()?)?;
    list.add(config.balloon.check(&config.memory)?)?;
    let mut addresses = BTreeSet::new();
    for (number, net) in config.nets.iter().enumerate() {
        let net = net.check(number)?;
        if let Some(mac) = net.mac().map(String::from)
            && !addresses.insert(mac.clone())
        {
            let why = format!("two devices have the address {mac}; give each its own");
            return Err(BadDevice::new(net.id(), why));
        }
        list.add(Some(net))?;
    }
    for (number, disk) in config.disks.iter().enumerate() {
        list.add(Some(disk.check(number)?))?;
    }
    for (index, pmem) in config.pmem.iter().enumerate() {
        list.add(Some(pmem.check(index)))?;
    }
    let (console, ports) = console::check(config)?;
    list.add(console)?;
    list.add(ports)?;
    if let Some(vsock) = &config.vsock {
        list.add(Some(vsock.check()?))?;
    }
    for (number, device) in config.vhost_user.iter().enumerate() {
        list.add(Some(device.check(number, &config.memory)?))?;
    }
    list.add(mem::check(&config.memory)?)?;
    for folder in FsConfig::check_all(&config.fs)? {
        list.add(Some(folder))?;
    }
    Ok(list.devices)
}

#[derive(Default)]
struct List {
    devices: Vec<Arc<dyn DeviceSpec>>,
    ids: BTreeSet<String>,
}

impl List {
    fn add(&mut self, device: Option<impl DeviceSpec + 'static>) -> Result<(), BadDevice> {
        let Some(device) = device else {
            return Ok(());
        };
        let id = device.id();
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if id.is_empty() || id.len() > 64 || !id.chars().all(plain) {
            let why = "an id has 1 to 64 letters, digits, dots, dashes and underscores";
            return Err(BadDevice::new(id, why));
        }
        if !self.ids.insert(id.to_owned()) {
            return Err(BadDevice::new(
                id,
                "two devices have this id; give each its own with id=…",
            ));
        }
        self.devices.push(Arc::new(device));
        Ok(())
    }
}
