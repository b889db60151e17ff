//! Interrupt routes: wired lines and message-signalled vectors, delivered by irqfd.
//!
//! `KVM_SET_GSI_ROUTING` replaces the whole table, so one owner keeps it: GSIs below
//! [`pins::COUNT`] are pins of the in-kernel interrupt controllers, the rest is a pool for
//! message-signalled vectors. A vector takes its GSI when it is made and its route when the guest
//! enables it; the table is set again only when a route really changes.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_msi,
};
use kvm_ioctls::{Cap, VmFd};
use testudo_bus::{IrqError, IrqLine, Msi, MsiMessage, MsiVector};
use thiserror::Error;
use vm_allocator::IdAllocator;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::Vm;

/// Pins of the interrupt controllers KVM emulates.
#[cfg(target_arch = "x86_64")]
mod pins {
    use kvm_bindings::{
        KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
        kvm_irq_routing_entry, kvm_irq_routing_irqchip,
    };

    /// Pins of the IOAPIC.
    pub(super) const COUNT: u32 = 24;

    fn route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
        entry
    }

    /// Each GSI reaches its IOAPIC pin, and the first sixteen their 8259 pin as well: what KVM
    /// sets up by itself when the controllers are created.
    pub(super) fn routes() -> Vec<kvm_irq_routing_entry> {
        (0..COUNT)
            .flat_map(|gsi| {
                let pic = match gsi {
                    0..8 => Some(route(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
                    8..16 => Some(route(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi.saturating_sub(8))),
                    _ => None,
                };
                std::iter::once(route(gsi, KVM_IRQCHIP_IOAPIC, gsi)).chain(pic)
            })
            .collect()
    }
}

/// Elsewhere the controller's pins need no route until the architecture's code lands.
#[cfg(not(target_arch = "x86_64"))]
mod pins {
    pub(super) const COUNT: u32 = 32;

    pub(super) fn routes() -> Vec<kvm_bindings::kvm_irq_routing_entry> {
        Vec::new()
    }
}

/// A wired line could not be had.
#[derive(Debug, Error)]
pub enum LineError {
    /// There is no such pin.
    #[error(
        "there is no interrupt pin {gsi}: the interrupt controller has {}",
        pins::COUNT
    )]
    NoSuchPin {
        /// The pin asked for.
        gsi: u32,
    },
    /// The host refused.
    #[error("cannot bind interrupt line {gsi}")]
    Host {
        /// The pin.
        gsi: u32,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// The interrupt routes of one VM. Clones share them.
#[derive(Clone)]
pub struct Interrupts {
    shared: Arc<Shared>,
}

struct Shared {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
    limit: u32,
}

struct Table {
    pool: IdAllocator,
    messages: BTreeMap<u32, MsiMessage>,
}

impl Interrupts {
    /// The routes of `vm`, whose interrupt controllers exist already.
    pub fn new(vm: &Vm) -> Result<Self, IrqError> {
        // Linux has had 1024 or more since 2.6.30 wherever the capability exists; 4096 today.
        let limit = u32::try_from(vm.fd().check_extension_int(Cap::IrqRouting))
            .ok()
            .filter(|n| *n > pins::COUNT)
            .unwrap_or(1024);
        let pool = IdAllocator::new(pins::COUNT, limit.saturating_sub(1))
            .map_err(|_| IrqError::Exhausted { limit })?;
        Ok(Self {
            shared: Arc::new(Shared {
                vm: Arc::clone(vm.fd()),
                table: Mutex::new(Table {
                    pool,
                    messages: BTreeMap::new(),
                }),
                limit,
            }),
        })
    }

    /// An edge-triggered wired line on pin `gsi`.
    pub fn line(&self, gsi: u32) -> Result<Arc<dyn IrqLine>, LineError> {
        if gsi >= pins::COUNT {
            return Err(LineError::NoSuchPin { gsi });
        }
        let host = |source| LineError::Host { gsi, source };
        let event = EventFd::new(EFD_NONBLOCK).map_err(host)?;
        self.shared
            .vm
            .register_irqfd(&event, gsi)
            .map_err(|e| host(e.into()))?;
        Ok(Arc::new(Line {
            vm: Arc::clone(&self.shared.vm),
            gsi,
            event,
        }))
    }
}

struct Line {
    vm: Arc<VmFd>,
    gsi: u32,
    event: EventFd,
}

impl IrqLine for Line {
    fn trigger(&self) {
        signal(&self.event);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let _ = self.vm.unregister_irqfd(&self.event, self.gsi);
    }
}

/// An eventfd that KVM drains can only refuse a write when 2^64−2 signals are pending, and then
/// the interrupt is pending anyway.
fn signal(event: &EventFd) {
    let _ = event.write(1);
}

impl Msi for Interrupts {
    fn vector(&self) -> Result<Box<dyn MsiVector>, IrqError> {
        let limit = self.shared.limit;
        let gsi = self
            .shared
            .table()
            .pool
            .allocate_id()
            .map_err(|_| IrqError::Exhausted { limit })?;
        match EventFd::new(EFD_NONBLOCK) {
            Ok(event) => Ok(Box::new(Vector {
                shared: Arc::clone(&self.shared),
                gsi,
                event,
                bound: Mutex::new(false),
            })),
            Err(source) => {
                let _ = self.shared.table().pool.free_id(gsi);
                Err(IrqError::Host {
                    action: "make an eventfd for",
                    gsi,
                    source,
                })
            }
        }
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, table: &Table) -> io::Result<()> {
        let mut entries = pins::routes();
        entries.extend(table.messages.iter().map(|(gsi, message)| {
            let mut entry = kvm_irq_routing_entry {
                gsi: *gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                ..Default::default()
            };
            let [b0, b1, b2, b3, b4, b5, b6, b7] = message.address.to_le_bytes();
            entry.u.msi = kvm_irq_routing_msi {
                address_lo: u32::from_le_bytes([b0, b1, b2, b3]),
                address_hi: u32::from_le_bytes([b4, b5, b6, b7]),
                data: message.data,
                ..Default::default()
            };
            entry
        }));
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        self.vm.set_gsi_routing(&routing).map_err(Into::into)
    }
}

struct Vector {
    shared: Arc<Shared>,
    gsi: u32,
    event: EventFd,
    bound: Mutex<bool>,
}

impl Vector {
    fn bound(&self) -> MutexGuard<'_, bool> {
        self.bound.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unbind(&self, bound: &mut bool) {
        if std::mem::take(bound) {
            let _ = self.shared.vm.unregister_irqfd(&self.event, self.gsi);
        }
    }
}

impl MsiVector for Vector {
    fn enable(&self, message: MsiMessage) -> Result<(), IrqError> {
        let host = |action| {
            move |source| IrqError::Host {
                action,
                gsi: self.gsi,
                source,
            }
        };
        let mut bound = self.bound();
        let mut table = self.shared.table();
        let old = table.messages.insert(self.gsi, message);
        if old != Some(message)
            && let Err(source) = self.shared.set(&table)
        {
            match old {
                Some(old) => table.messages.insert(self.gsi, old),
                None => table.messages.remove(&self.gsi),
            };
            return Err(host("program")(source));
        }
        drop(table);
        if !*bound {
            self.shared
                .vm
                .register_irqfd(&self.event, self.gsi)
                .map_err(|e| host("bind")(e.into()))?;
            *bound = true;
        }
        Ok(())
    }

    fn disable(&self) {
        let mut bound = self.bound();
        self.unbind(&mut bound);
    }

    fn eventfd(&self) -> &EventFd {
        &self.event
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        let mut bound = self.bound();
        self.unbind(&mut bound);
        drop(bound);
        let mut table = self.shared.table();
        // The stale route of an unused GSI reaches nobody; it goes with the next change.
        table.messages.remove(&self.gsi);
        let _ = table.pool.free_id(self.gsi);
    }
}
