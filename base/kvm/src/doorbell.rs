//! ioeventfd: a guest write becomes an eventfd signal inside the kernel.

use std::io;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use testudo_bus::{Doorbell, DoorbellAddress, Doorbells};
use vmm_sys_util::eventfd::EventFd;

use crate::Vm;

/// Doorbells of one VM, by `KVM_IOEVENTFD` without a data match.
pub struct KvmDoorbells {
    vm: Arc<VmFd>,
}

impl KvmDoorbells {
    /// The doorbells of `vm`.
    pub fn new(vm: &Vm) -> Self {
        Self {
            vm: Arc::clone(vm.fd()),
        }
    }
}

impl Doorbells for KvmDoorbells {
    fn bind(
        &self,
        address: DoorbellAddress,
        event: &Arc<EventFd>,
    ) -> io::Result<Box<dyn Doorbell>> {
        self.vm
            .register_ioevent(event, &at(address), NoDatamatch)
            .map_err(io::Error::from)?;
        Ok(Box::new(Bound {
            vm: Arc::clone(&self.vm),
            address,
            event: Arc::clone(event),
        }))
    }
}

fn at(address: DoorbellAddress) -> IoEventAddress {
    match address {
        DoorbellAddress::Mmio(addr) => IoEventAddress::Mmio(addr),
        DoorbellAddress::Pio(port) => IoEventAddress::Pio(u64::from(port)),
    }
}

struct Bound {
    vm: Arc<VmFd>,
    address: DoorbellAddress,
    event: Arc<EventFd>,
}

impl Doorbell for Bound {}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Err(error) = self
            .vm
            .unregister_ioevent(&self.event, &at(self.address), NoDatamatch)
        {
            log::error!(
                "cannot unregister the doorbell at {:?}: {error}",
                self.address
            );
        }
    }
}
