//! virtio-pci, modern (virtio 1.2 §4.1): one 64-bit BAR with everything in it, and one for shared
//! memory where the device has some.
//!
//! | BAR 0 offset | what |
//! |---|---|
//! | 0x0000 | common configuration |
//! | 0x1000 | ISR status |
//! | 0x2000 | the device's own configuration |
//! | 0x3000 | notification, 4 bytes per queue |
//! | 0x4000 | MSI-X table, a page of its own |
//! | 0x5000 | MSI-X pending bits, a page of its own |
//!
//! BAR 2, if there is one, is a shared memory region from its beginning to its end; the guest reaches
//! the memory itself wherever it puts the BAR.
//!
//! Interrupts are MSI-X only: there is no INTx pin, so a guest booted with MSI switched off cannot
//! drive these devices. The ISR byte is kept nevertheless for drivers that poll it. There is no PCI
//! Express capability: the function sits on a root bus as a conventional one, which saves the
//! guest's walk through extended configuration space.
//!
//! A notification is an ioeventfd at its address while the device runs and BAR 0 is mapped; the
//! doorbells move with the BAR. A write that still arrives here signals the same eventfd.

mod common;
mod layout;
mod window;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use testudo_bus::{Access, Doorbell, DoorbellAddress, Doorbells, IrqError, Msi, fill_absent};
use testudo_memory::{GuestWindows, RamHandle, WindowGuard};
use testudo_pci::{ConfigSpace, LayoutError, Msix, MsixVectors, PciFunction};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::device::{DeviceError, Transition, VirtioDevice};
use crate::model::VirtioModel;
use crate::queue::{DeviceCounters, QueueRegisters};
use crate::signal::Interrupts;
use layout::Region;
use window::Window;

const ISR_QUEUE: u8 = 1 << 0;
const ISR_CONFIG: u8 = 1 << 1;

/// A virtio-pci function could not be made.
#[derive(Debug, Error)]
pub enum VirtioPciError {
    /// More queues than the BAR has room for.
    #[error("virtio-{name} has {queues} queues, virtio-pci here carries {max}; configure fewer")]
    Queues {
        /// The model.
        name: &'static str,
        /// How many it has.
        queues: usize,
        /// How many fit.
        max: usize,
    },
    /// The registers could not be made.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// No interrupt vectors.
    #[error("virtio-{name}: interrupt vectors")]
    Vectors {
        /// The model.
        name: &'static str,
        /// Why.
        #[source]
        source: IrqError,
    },
    /// The configuration space could not be laid out.
    #[error("virtio-{name}: configuration space")]
    Layout {
        /// The model.
        name: &'static str,
        /// Why.
        #[source]
        source: LayoutError,
    },
}

/// What a function is wired to.
pub struct Wiring<'a> {
    /// Guest RAM.
    pub ram: RamHandle,
    /// Where interrupt vectors come from.
    pub msi: &'a dyn Msi,
    /// How notifications become eventfds.
    pub doorbells: Arc<dyn Doorbells>,
    /// Where shared memory is shown to the guest.
    pub windows: Arc<dyn GuestWindows>,
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    config: ConfigSpace,
    window: Window,
    device: VirtioDevice,
    msix: Msix,
    isr: Arc<AtomicU8>,
    config_vector: u16,
    doorbells: Arc<dyn Doorbells>,
    bound: Vec<Box<dyn Doorbell>>,
    base: Option<u64>,
    windows: Arc<dyn GuestWindows>,
    /// Shared memory where the guest has put its BAR.
    shown: Option<Box<dyn WindowGuard>>,
}

impl VirtioPci {
    /// The BAR everything is in.
    pub const BAR: u8 = layout::BAR;
    /// Its size in bytes.
    pub const BAR_SIZE: u64 = layout::BAR_SIZE;

    /// The BAR that a shared memory region fills.
    pub const SHARED_BAR: u8 = layout::SHARED_BAR;

    /// `model` as a function with one vector per queue and one for configuration changes.
    pub fn new(model: Box<dyn VirtioModel>, wiring: Wiring<'_>) -> Result<Self, VirtioPciError> {
        let device = VirtioDevice::new(model, wiring.ram)?;
        let shape = device.shape();
        let name = shape.name;
        let queues = shape.queues.len();
        if queues > layout::MAX_QUEUES {
            return Err(VirtioPciError::Queues {
                name,
                queues,
                max: layout::MAX_QUEUES,
            });
        }
        let vectors = device.queue_count().saturating_add(1);
        let mut msix = Msix::new(vectors, wiring.msi)
            .map_err(|source| VirtioPciError::Vectors { name, source })?;
        let (config, window) = layout::config_space(shape, &mut msix)
            .map_err(|source| VirtioPciError::Layout { name, source })?;
        Ok(Self {
            config,
            window,
            device,
            msix,
            isr: Arc::default(),
            config_vector: QueueRegisters::NO_VECTOR,
            doorbells: wiring.doorbells,
            bound: Vec::new(),
            base: None,
            windows: wiring.windows,
            shown: None,
        })
    }

    /// The device's counters, which outlive it.
    pub fn counters(&self) -> Arc<DeviceCounters> {
        Arc::clone(self.device.counters())
    }

    /// Shows the shared memory at `base`, or nowhere.
    fn show_shared_memory(&mut self, base: Option<u64>) {
        self.shown = None;
        let (Some(base), Some(shared)) = (base, &self.device.shape().shared_memory) else {
            return;
        };
        match self.windows.show(base, &shared.window, false) {
            Ok(shown) => self.shown = Some(shown),
            Err(e) => {
                let name = self.device.shape().name;
                log::warn!("virtio-{name}: no shared memory at {base:#x}: {e}");
            }
        }
    }

    /// The driver writes `device_status`.
    fn write_status(&mut self, value: u8) {
        let (vectors, isr, config) = (self.msix.vectors(), &self.isr, self.config_vector);
        let transition = self.device.write_status(value, |device| {
            Arc::new(Frozen {
                vectors,
                isr: Arc::clone(isr),
                config,
                queues: device.queues().iter().map(|q| q.vector).collect(),
            })
        });
        match transition {
            Transition::None => {}
            Transition::Started => self.bind_doorbells(),
            Transition::Reset => {
                self.bound.clear();
                self.config_vector = QueueRegisters::NO_VECTOR;
                self.isr.store(0, Ordering::Release);
            }
        }
    }

    /// A vector the driver chose: itself, or none if there is no such vector.
    fn checked_vector(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors().count() {
            vector
        } else {
            QueueRegisters::NO_VECTOR
        }
    }

    /// Binds a doorbell to each enabled queue's notification address. Without one a notification
    /// traps, which is slower and no less right.
    fn bind_doorbells(&mut self) {
        self.bound.clear();
        let Some(base) = self.base.filter(|_| self.device.running()) else {
            return;
        };
        let enabled = (0_u16..)
            .zip(self.device.queues())
            .filter(|(_, q)| q.enabled);
        for (index, _) in enabled {
            let address = base.checked_add(layout::notify_offset(index));
            let (Some(address), Some(kick)) = (address, self.device.kick(index)) else {
                continue;
            };
            match self.doorbells.bind(DoorbellAddress::Mmio(address), kick) {
                Ok(bound) => self.bound.push(bound),
                Err(e) => {
                    let name = self.device.shape().name;
                    log::debug!("virtio-{name} queue {index}: no doorbell, kicks trap: {e}");
                }
            }
        }
    }

    fn kick(&self, offset: u64) {
        let index = layout::notify_index(offset);
        // A kick that finds the counter full is signalled already.
        if let Some(kick) = index.and_then(|index| self.device.kick(index))
            && let Err(e) = kick.write(1)
        {
            log::debug!("virtio-{}: kick: {e}", self.device.shape().name);
        }
    }

    fn region_read(&mut self, region: Region, offset: u64, data: &mut [u8]) {
        match region {
            Region::Common => self.common_read(offset, data),
            Region::Isr => {
                data.fill(0);
                if let (0, Some(first)) = (offset, data.first_mut()) {
                    *first = self.isr.swap(0, Ordering::AcqRel);
                }
            }
            Region::Device => self.device.read_config(offset, data),
            Region::Notify => data.fill(0),
            Region::MsixTable => self.msix.table_read(offset, data),
            Region::MsixPba => self.msix.pba_read(offset, data),
        }
    }

    fn region_write(&mut self, region: Region, offset: u64, data: &[u8]) {
        match region {
            Region::Common => self.common_write(offset, data),
            Region::Device => self.device.write_config(offset, data),
            Region::Notify => self.kick(offset),
            Region::MsixTable => self.msix.table_write(offset, data),
            Region::Isr | Region::MsixPba => {}
        }
    }
}

impl PciFunction for VirtioPci {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        if let Some((at, len)) = self.window.read_through(&self.config, offset, data.len()) {
            let mut value = [0; 4];
            if let Some(value) = value.get_mut(..len) {
                self.bar_read(Self::BAR, Access { offset: at }, value);
            }
            self.config.set(self.window.data(), &value);
        }
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        self.msix.config_written(&self.config);
        if let Some((at, len)) = self.window.write_through(&self.config, offset, data.len()) {
            let value = self.config.get_u32(self.window.data()).to_le_bytes();
            if let Some(value) = value.get(..len) {
                self.bar_write(Self::BAR, Access { offset: at }, value);
            }
        }
    }

    fn bar_read(&mut self, bar: u8, at: Access, data: &mut [u8]) {
        match layout::region(bar, at.offset) {
            Some((region, offset)) => self.region_read(region, offset, data),
            None => fill_absent(data),
        }
    }

    fn bar_write(&mut self, bar: u8, at: Access, data: &[u8]) {
        if let Some((region, offset)) = layout::region(bar, at.offset) {
            self.region_write(region, offset, data);
        }
    }

    fn bar_moved(&mut self, bar: u8, base: Option<u64>) {
        match bar {
            Self::BAR => {
                self.base = base;
                self.bind_doorbells();
            }
            Self::SHARED_BAR => self.show_shared_memory(base),
            _ => {}
        }
    }
    fn pause(&mut self) {
        self.device.pause();
    }
    fn resume(&mut self) {
        self.device.resume();
    }
}

/// The vectors as the driver had chosen them at DRIVER_OK.
struct Frozen {
    vectors: MsixVectors,
    isr: Arc<AtomicU8>,
    config: u16,
    queues: Vec<u16>,
}

impl Frozen {
    fn queue_vector(&self, index: u16) -> Option<u16> {
        self.queues.get(usize::from(index)).copied()
    }
}

impl Interrupts for Frozen {
    fn queue(&self, index: u16) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        if let Some(vector) = self.queue_vector(index) {
            self.vectors.fire(vector);
        }
    }

    fn config(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.vectors.fire(self.config);
    }

    fn queue_event(&self, index: u16) -> Option<&EventFd> {
        let vector = self.queue_vector(index)?;
        Some(self.vectors.get(vector)?.eventfd())
    }
}

#[cfg(test)]
mod tests;
