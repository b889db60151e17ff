//! A model with the registers every transport shows: features, status, queue set-up.
//!
//! The status machine (virtio 1.2 §2.1, §3.1.1); a driver adds bits and clears them only all at
//! once by writing 0:
//!
//! ```text
//!   reset ─ACKNOWLEDGE,DRIVER─▶ features open ─FEATURES_OK─▶ features frozen ─DRIVER_OK─▶ frozen
//!     ▲        │                  │ (refused: the bit stays 0 unless the features are a subset    │
//!     │        │                  │  of the offered ones with VERSION_1)            start(model)  │
//!     │        ▼                  ▼                                          Ok ┌───────┴──────┐ Err
//!     │     FAILED: the driver gave up                                          ▼              ▼
//!     │                                                                      running ─▶ NEEDS_RESET
//!     └──────────────────────────── write 0: stop(model), all registers back ◀──┴──────────────┘
//! ```
//! From DRIVER_OK on, whatever it led to, queue registers and feature bits ignore writes
//! (CVE-2026-5747). A queue number out of range selects nothing: reads 0, writes nothing (ch#7917).
//!
//! Called under the device's lock, on vCPU threads and at unplug.

use std::io;
use std::sync::Arc;

use testudo_memory::RamHandle;
use thiserror::Error;
use virtio_bindings::virtio_config as bits;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::model::{ActivateError, Activated, ActiveQueue, Queues, Shape, VirtioModel, features};
use crate::queue::{CheckedQueue, DeviceCounters, QueueRegisters, QueueSetupError, VirtQueue};
use crate::signal::{DeviceEvents, Flags, Interrupts, QueueInterrupt};

/// The device status register's bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status;

#[expect(
    clippy::cast_possible_truncation,
    reason = "constants of the specification, all below 256"
)]
impl Status {
    /// The driver found the device.
    pub const ACKNOWLEDGE: u8 = bits::VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
    /// It can drive it.
    pub const DRIVER: u8 = bits::VIRTIO_CONFIG_S_DRIVER as u8;
    /// It is set up: serve.
    pub const DRIVER_OK: u8 = bits::VIRTIO_CONFIG_S_DRIVER_OK as u8;
    /// Features are agreed.
    pub const FEATURES_OK: u8 = bits::VIRTIO_CONFIG_S_FEATURES_OK as u8;
    /// The device cannot go on.
    pub const NEEDS_RESET: u8 = bits::VIRTIO_CONFIG_S_NEEDS_RESET as u8;
    /// The driver gave up.
    pub const FAILED: u8 = bits::VIRTIO_CONFIG_S_FAILED as u8;

    const WRITABLE: u8 =
        Self::ACKNOWLEDGE | Self::DRIVER | Self::DRIVER_OK | Self::FEATURES_OK | Self::FAILED;
}

/// A device could not be made.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// The host gave no eventfd.
    #[error("virtio-{name}: no eventfd for queue {queue}; check the limit of open files")]
    Kick {
        /// The model.
        name: &'static str,
        /// The queue.
        queue: usize,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Why DRIVER_OK did not lead to a running device.
#[derive(Debug, Error)]
enum StartError {
    #[error("DRIVER_OK without FEATURES_OK, or after FAILED")]
    Order,
    #[error(transparent)]
    Queue(#[from] QueueSetupError),
    #[error(transparent)]
    Model(#[from] ActivateError),
}

/// What a status write led to, for the transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transition {
    /// Nothing a transport cares for.
    None,
    /// The model runs: doorbells may be bound.
    Started,
    /// Everything is as after power-on; the model is stopped.
    Reset,
}

/// A model and its registers.
pub struct VirtioDevice {
    model: Box<dyn VirtioModel>,
    shape: Shape,
    ram: RamHandle,
    offered: u64,
    accepted: u64,
    device_feature_page: u32,
    driver_feature_page: u32,
    status: u8,
    running: bool,
    /// How the model tells the driver of things, from DRIVER_OK to reset.
    events: Option<DeviceEvents>,
    /// The queues of a model that is paused.
    paused: Option<Queues>,
    selected: u16,
    queues: Vec<QueueRegisters>,
    kicks: Vec<Arc<EventFd>>,
    counters: Arc<DeviceCounters>,
    flags: Arc<Flags>,
}

impl VirtioDevice {
    /// `model` with its registers as after reset.
    pub fn new(model: Box<dyn VirtioModel>, ram: RamHandle) -> Result<Self, DeviceError> {
        let shape = model.shape();
        let kicks: Result<Vec<_>, _> = (0..shape.queues.len())
            .map(|queue| {
                EventFd::new(EFD_NONBLOCK)
                    .map(Arc::new)
                    .map_err(|source| DeviceError::Kick {
                        name: shape.name,
                        queue,
                        source,
                    })
            })
            .collect();
        Ok(Self {
            offered: shape.features | (features::COMMON & !shape.lacks),
            accepted: 0,
            device_feature_page: 0,
            driver_feature_page: 0,
            status: 0,
            running: false,
            events: None,
            paused: None,
            selected: 0,
            queues: shape
                .queues
                .iter()
                .copied()
                .map(QueueRegisters::new)
                .collect(),
            kicks: kicks?,
            counters: Arc::new(DeviceCounters::new(&shape)),
            flags: Arc::default(),
            model,
            shape,
            ram,
        })
    }

    /// What the model is.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The device's counters, which outlive it.
    pub fn counters(&self) -> &Arc<DeviceCounters> {
        &self.counters
    }

    /// `device_feature_select`.
    pub fn device_feature_page(&self) -> u32 {
        self.device_feature_page
    }

    /// Writes `device_feature_select`.
    pub fn select_device_features(&mut self, page: u32) {
        self.device_feature_page = page;
    }

    /// `device_feature`: 32 of the offered bits.
    pub fn device_features(&self) -> u32 {
        page_of(self.offered, self.device_feature_page)
    }

    /// `driver_feature_select`.
    pub fn driver_feature_page(&self) -> u32 {
        self.driver_feature_page
    }

    /// Writes `driver_feature_select`.
    pub fn select_driver_features(&mut self, page: u32) {
        self.driver_feature_page = page;
    }

    /// `driver_feature`: 32 of the bits the driver accepted.
    pub fn driver_features(&self) -> u32 {
        page_of(self.accepted, self.driver_feature_page)
    }

    /// Writes `driver_feature`; ignored once features are agreed.
    pub fn accept_features(&mut self, bits: u32) {
        if self.status & (Status::FEATURES_OK | Status::DRIVER_OK) != 0 {
            return;
        }
        let bits = u64::from(bits);
        self.accepted = match self.driver_feature_page {
            0 => (self.accepted & !0xffff_ffff) | bits,
            1 => (self.accepted & 0xffff_ffff) | (bits << 32),
            _ => self.accepted,
        };
    }

    /// `device_status`.
    pub fn status(&self) -> u8 {
        if self.flags.needs_reset() {
            self.status | Status::NEEDS_RESET
        } else {
            self.status
        }
    }

    /// `config_generation`.
    pub fn config_generation(&self) -> u8 {
        self.flags.generation()
    }

    /// `num_queues`.
    pub fn queue_count(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    /// `queue_select`.
    pub fn selected(&self) -> u16 {
        self.selected
    }

    /// Writes `queue_select`.
    pub fn select_queue(&mut self, index: u16) {
        self.selected = index;
    }

    /// The selected queue's registers; `None` if there is no such queue.
    pub fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.selected))
    }

    /// The selected queue's registers while the driver may still change them.
    pub fn queue_mut(&mut self) -> Option<&mut QueueRegisters> {
        if self.frozen() {
            return None;
        }
        self.queues.get_mut(usize::from(self.selected))
    }

    /// All queues' registers, for a transport that freezes its own part of them.
    pub fn queues(&self) -> &[QueueRegisters] {
        &self.queues
    }

    /// Queue `index`'s kick.
    pub fn kick(&self, index: u16) -> Option<&Arc<EventFd>> {
        self.kicks.get(usize::from(index))
    }

    /// DRIVER_OK has been written: registers are frozen until reset.
    pub fn frozen(&self) -> bool {
        self.status & Status::DRIVER_OK != 0
    }

    /// The model has started and not been stopped.
    pub fn running(&self) -> bool {
        self.running
    }

    /// Reads the model's configuration space; what it does not have reads all-ones.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        if self.in_config(offset, data.len()) {
            self.model.read_config(offset, data);
        } else {
            data.fill(0xff);
        }
    }

    /// Writes the model's configuration space.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        if self.in_config(offset, data.len()) {
            self.model.write_config(offset, data);
        }
    }

    fn in_config(&self, offset: u64, len: usize) -> bool {
        u64::try_from(len)
            .ok()
            .and_then(|len| offset.checked_add(len))
            .is_some_and(|end| end <= u64::from(self.shape.config_len))
    }

    /// Writes `device_status`. `interrupts` is asked for the transport's interrupts, as they are
    /// to stay until reset, when the driver sets DRIVER_OK.
    pub fn write_status(
        &mut self,
        value: u8,
        interrupts: impl FnOnce(&Self) -> Arc<dyn Interrupts>,
    ) -> Transition {
        if value == 0 {
            self.reset();
            return Transition::Reset;
        }
        let added = value & Status::WRITABLE & !self.status;
        self.status |= added & (Status::ACKNOWLEDGE | Status::DRIVER | Status::FAILED);
        if added & Status::FEATURES_OK != 0 && self.features_acceptable() {
            self.status |= Status::FEATURES_OK;
        }
        if added & Status::DRIVER_OK == 0 {
            return Transition::None;
        }
        let to = interrupts(self);
        let device = DeviceEvents::new(self.shape.name, Arc::clone(&self.flags), Arc::clone(&to));
        self.events = Some(device.clone());
        let started = self.start(&to, device.clone());
        self.status |= Status::DRIVER_OK;
        match started {
            Ok(()) => {
                self.running = true;
                Transition::Started
            }
            Err(e) => {
                drop(self.model.stop());
                device.needs_reset(&e);
                Transition::None
            }
        }
    }

    fn features_acceptable(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & features::VERSION_1 != 0
    }

    fn start(&mut self, to: &Arc<dyn Interrupts>, device: DeviceEvents) -> Result<(), StartError> {
        if self.status & Status::FEATURES_OK == 0 || self.status & Status::FAILED != 0 {
            return Err(StartError::Order);
        }
        let view = self.ram.memory();
        let mut queues = Vec::with_capacity(self.queues.len());
        let registers = (0_u16..).zip(&self.queues);
        let backs = self.kicks.iter().zip(&self.counters.queues);
        for ((index, registers), (kick, counters)) in registers.zip(backs) {
            if !registers.enabled {
                continue;
            }
            let rings = CheckedQueue::check(index, registers, self.accepted, &view)?;
            let interrupt = QueueInterrupt::new(Arc::clone(to), index);
            queues.push(ActiveQueue {
                index,
                queue: VirtQueue::new(rings, interrupt.clone(), Arc::clone(counters)),
                kick: Arc::clone(kick),
                interrupt,
            });
        }
        self.model.start(Activated {
            ram: self.ram.clone(),
            features: self.accepted,
            queues,
            device,
        })?;
        Ok(())
    }

    /// Stops the model for a while; the driver must not run meanwhile. Requests in flight are
    /// completed first; what the driver made available and nobody took stays in the queues.
    pub fn pause(&mut self) {
        if self.running && self.paused.is_none() {
            self.paused = Some(self.model.stop());
        }
    }

    /// Starts the model where [`Self::pause`] stopped it. If it cannot, the driver sees
    /// DEVICE_NEEDS_RESET.
    pub fn resume(&mut self) {
        let (Some(queues), Some(device)) = (self.paused.take(), self.events.clone()) else {
            return;
        };
        let started = self.model.start(Activated {
            ram: self.ram.clone(),
            features: self.accepted,
            queues,
            device: device.clone(),
        });
        if let Err(e) = started {
            self.running = false;
            drop(self.model.stop());
            device.needs_reset(&e);
        }
        for kick in &self.kicks {
            // What came before the pause may have been taken note of and not been served.
            let _ = kick.write(1);
        }
    }

    /// Stops the model if it runs and puts every register back. The driver's own queues are not
    /// touched after this returns.
    pub fn reset(&mut self) {
        if std::mem::take(&mut self.running) && self.paused.take().is_none() {
            drop(self.model.stop());
        }
        self.model.reset();
        self.events = None;
        self.status = 0;
        self.accepted = 0;
        self.device_feature_page = 0;
        self.driver_feature_page = 0;
        self.selected = 0;
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max_size);
        }
        for kick in &self.kicks {
            // Empty already if nobody kicked.
            let _ = kick.read();
        }
        self.flags.clear();
    }
}

impl Drop for VirtioDevice {
    fn drop(&mut self) {
        if self.running && self.paused.is_none() {
            drop(self.model.stop());
        }
    }
}

fn page_of(features: u64, page: u32) -> u32 {
    let [b0, b1, b2, b3, b4, b5, b6, b7] = features.to_le_bytes();
    match page {
        0 => u32::from_le_bytes([b0, b1, b2, b3]),
        1 => u32::from_le_bytes([b4, b5, b6, b7]),
        _ => 0,
    }
}
