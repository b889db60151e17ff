//! The machine around a device that is fuzzed: interrupts, doorbells and windows that lead nowhere.

use std::io;
use std::sync::Arc;

use testudo_bus::{Doorbell, DoorbellAddress, Doorbells, IrqError, Msi, MsiMessage, MsiVector};
use testudo_memory::{GuestWindows, HostWindow, WindowGuard};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// An interrupt, a doorbell and a window that lead nowhere.
pub struct Nothing(EventFd);

impl Nothing {
    /// With an eventfd that nobody reads.
    pub fn new() -> Self {
        Self(EventFd::new(EFD_NONBLOCK).expect("an eventfd"))
    }
}

impl MsiVector for Nothing {
    fn enable(&self, _message: MsiMessage) -> Result<(), IrqError> {
        Ok(())
    }
    fn disable(&self) {}
    fn eventfd(&self) -> &EventFd {
        &self.0
    }
}

impl Doorbell for Nothing {}

impl WindowGuard for Nothing {}

/// What a device is wired to.
pub struct Host;

impl GuestWindows for Host {
    fn show(
        &self,
        _gpa: u64,
        _window: &Arc<HostWindow>,
        _readonly: bool,
    ) -> io::Result<Box<dyn WindowGuard>> {
        Ok(Box::new(Nothing::new()))
    }
}

impl Msi for Host {
    fn vector(&self) -> Result<Box<dyn MsiVector>, IrqError> {
        Ok(Box::new(Nothing::new()))
    }
}

impl Doorbells for Host {
    fn bind(
        &self,
        _address: DoorbellAddress,
        _event: &Arc<EventFd>,
    ) -> io::Result<Box<dyn Doorbell>> {
        Ok(Box::new(Nothing::new()))
    }
}
