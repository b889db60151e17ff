//! What the control thread, the model and its workers share of one network device.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::kernel::KernelPath;
use super::offload;
use super::pace::Pace;
use super::vhost::VhostNet;
use super::wire::Wire;
use crate::limiter::Limits;
use crate::signal::DeviceEvents;
use crate::timer::Timer;

/// A direction, as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// To the guest.
    Rx,
    /// From the guest.
    Tx,
}

/// What a port is made of.
pub struct PortSettings {
    /// The device's name in what is logged.
    pub id: String,
    /// The host's end of each queue pair; one at least.
    pub wires: Vec<Wire>,
    /// The kernel's data path of each queue pair, or none at all.
    pub vhost: Vec<VhostNet>,
    /// The device's address.
    pub mac: [u8; 6],
    /// Tells the guest how large packets may be.
    pub mtu: Option<u16>,
    /// Whether checksums and segmentation may be left to the other side.
    pub offloads: bool,
    /// To the guest.
    pub rx: Limits,
    /// From the guest.
    pub tx: Limits,
}

/// The host's side of a network device, which outlives the guest's boots; models are made of it, and
/// through it a device is changed while the guest runs. Clones are the same port.
#[derive(Clone)]
pub struct NetPort(pub(super) Arc<Shared>);

impl NetPort {
    /// A port with its cable plugged in. Fails if the host gives no eventfds and timers.
    /// Everything is opened here: a guest's reset opens nothing.
    pub fn new(settings: PortSettings) -> io::Result<Self> {
        let mut vhost = settings.vhost.into_iter();
        let lanes: io::Result<Vec<_>> = settings
            .wires
            .into_iter()
            .map(|wire| {
                Ok(Arc::new(Lane::new(
                    wire,
                    vhost.next().map(KernelPath::new),
                )?))
            })
            .collect();
        Ok(Self(Arc::new(Shared {
            id: settings.id,
            lanes: lanes?,
            offloads: settings.offloads,
            mtu: settings.mtu,
            own_mac: settings.mac,
            rx: Pace::new(settings.rx),
            tx: Pace::new(settings.tx),
            link: AtomicBool::new(true),
            lost: AtomicBool::new(false),
            peers_lost: Arc::default(),
            mac: Mutex::new(settings.mac),
            device: Mutex::default(),
            spilled: Arc::default(),
            dropped: Arc::default(),
        })))
    }

    /// Plugs the cable in or pulls it; the guest is told. Where the other end of a stream is gone
    /// there is nothing to plug it into: then the answer is `false`, and the link stays down.
    #[must_use]
    pub fn set_link(&self, up: bool) -> bool {
        if up && self.0.is_lost() {
            return false;
        }
        if self.0.link.swap(up, Ordering::AcqRel) != up {
            self.0.wake_all();
            self.0.config_changed();
        }
        true
    }

    /// New limits of one direction; frames that wait are looked at again.
    pub fn set_limits(&self, way: Way, limits: Limits) {
        self.0.pace(way).set(limits);
        self.0.wake_all();
    }
}

/// One queue pair's share of the host.
pub(super) struct Lane {
    pub(super) wire: Wire,
    /// The data path in the kernel, if the device has one.
    pub(super) kernel: Option<KernelPath>,
    /// Signalled when the lane's worker shall look at the shared state again.
    pub(super) wake: EventFd,
    /// Signalled by the kernel's data path when it cannot use a ring.
    pub(super) errors: EventFd,
    /// End a wait for the rate limits.
    pub(super) rx_timer: Timer,
    pub(super) tx_timer: Timer,
    /// The driver uses the pair.
    enabled: AtomicBool,
}

impl Lane {
    fn new(wire: Wire, kernel: Option<KernelPath>) -> io::Result<Self> {
        Ok(Self {
            wire,
            kernel,
            wake: EventFd::new(EFD_NONBLOCK)?,
            errors: EventFd::new(EFD_NONBLOCK)?,
            rx_timer: Timer::new()?,
            tx_timer: Timer::new()?,
            enabled: AtomicBool::new(false),
        })
    }

    /// Before a driver has said anything.
    pub(super) fn forget(&self) {
        self.enabled.store(false, Ordering::Release);
    }

    pub(super) fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    /// The driver begins or ceases to use the pair: the host delivers to it or to others. After this
    /// returns with `false` nothing more is put into its receive queue.
    pub(super) fn enable(&self, enabled: bool, link: bool) -> io::Result<()> {
        let done = if enabled {
            let attached = self.wire.set_attached(true);
            self.enabled.store(true, Ordering::Release);
            attached.and_then(|()| self.connect(link))
        } else {
            self.enabled.store(false, Ordering::Release);
            self.connect(false)
                .and_then(|()| self.wire.set_attached(false))
        };
        self.wake();
        done
    }

    /// Lets the kernel's data path, if that is what serves, reach the wire.
    pub(super) fn connect(&self, link: bool) -> io::Result<()> {
        match &self.kernel {
            Some(kernel) => kernel.connect((link && self.enabled()).then_some(&self.wire)),
            None => Ok(()),
        }
    }

    fn wake(&self) {
        // Full is signalled already.
        let _ = self.wake.write(1);
    }
}

/// What the worker of one lane does before it serves.
#[derive(Clone, Copy)]
pub(super) struct Begin {
    pub(super) features: u64,
    /// The driver has just started, and this lane makes the device ready for it.
    pub(super) afresh: bool,
}

impl Begin {
    pub(super) fn carry_out(&self, shared: &Shared) -> io::Result<()> {
        if self.afresh {
            shared.begin(self.features)?;
        }
        Ok(())
    }
}

pub(super) struct Shared {
    id: String,
    pub(super) lanes: Vec<Arc<Lane>>,
    pub(super) offloads: bool,
    pub(super) mtu: Option<u16>,
    own_mac: [u8; 6],
    rx: Pace,
    tx: Pace,
    link: AtomicBool,
    /// The other end of a stream is gone, for good: nothing is opened while the guest runs.
    lost: AtomicBool,
    pub(super) peers_lost: Arc<AtomicU64>,
    mac: Mutex<[u8; 6]>,
    /// The running device, to tell its driver of changes.
    device: Mutex<Option<DeviceEvents>>,
    /// Frames larger than what the driver had ready, which were copied once more.
    pub(super) spilled: Arc<AtomicU64>,
    /// Frames from the host that were dropped.
    pub(super) dropped: Arc<AtomicU64>,
}

impl Shared {
    /// Makes everything as it is for a driver that has just started: its address, its offloads, one
    /// queue pair, nothing waiting from before.
    pub(super) fn begin(&self, features: u64) -> io::Result<()> {
        self.set_mac(self.own_mac);
        for lane in &self.lanes {
            lane.enable(false, false)?;
        }
        let Some(first) = self.lanes.first() else {
            return Ok(());
        };
        first.wire.set_offloads(offload::flags(features))?;
        first.wire.discard();
        first.enable(true, self.link())
    }

    pub(super) fn pace(&self, way: Way) -> &Pace {
        match way {
            Way::Rx => &self.rx,
            Way::Tx => &self.tx,
        }
    }

    /// Whether frames go anywhere.
    pub(super) fn link(&self) -> bool {
        self.link.load(Ordering::Acquire) && !self.is_lost()
    }

    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// A stream has come to its end, or to what makes no sense: the link goes down, and the guest is
    /// told.
    pub(super) fn lose_peer(&self, why: &io::Error) {
        if self.lost.swap(true, Ordering::AcqRel) {
            return;
        }
        self.peers_lost.fetch_add(1, Ordering::Relaxed);
        let id = &self.id;
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        if matches!(why.kind(), UnexpectedEof | ConnectionReset | BrokenPipe) {
            log::warn!("{id}: the other end of its stream has gone; its link is down from now on");
        } else {
            log::warn!("{id}: its stream is broken, its link is down from now on: {why}");
        }
        self.config_changed();
    }

    fn config_changed(&self) {
        if let Some(device) = &*self.device() {
            device.config_changed();
        }
    }

    pub(super) fn mac(&self) -> [u8; 6] {
        *self.mac.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_mac(&self, mac: [u8; 6]) {
        *self.mac.lock().unwrap_or_else(PoisonError::into_inner) = mac;
    }

    pub(super) fn device(&self) -> MutexGuard<'_, Option<DeviceEvents>> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_all(&self) {
        self.lanes.iter().for_each(|lane| lane.wake());
    }
}
