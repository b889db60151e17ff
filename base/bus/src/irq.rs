//! Interrupts as a device sees them.

use std::io;

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

/// An interrupt could not be set up or delivered.
#[derive(Debug, Error)]
pub enum IrqError {
    /// No interrupt route is left; every one is given back when its device goes.
    #[error("no interrupt route left: all {limit} are in use; remove a device or use fewer queues")]
    Exhausted {
        /// How many routes the machine has.
        limit: u32,
    },
    /// The host refused.
    #[error("{action} interrupt route {gsi}")]
    Host {
        /// What was tried, as a verb: "program", "bind".
        action: &'static str,
        /// The route.
        gsi: u32,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// A wired, edge-triggered interrupt line (an IOAPIC pin, an SPI). Raised from any thread.
pub trait IrqLine: Send + Sync {
    /// Delivers one edge to the guest.
    fn trigger(&self);
}

/// What a guest programs into one MSI or MSI-X vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MsiMessage {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// One message-signalled vector, owned by the device it belongs to; dropping it gives its route
/// back. `enable` and `disable` may cost a system call and are called when the guest programs or
/// masks the vector; `eventfd` is what a data path writes to.
pub trait MsiVector: Send + Sync {
    /// Routes the vector to `message` and lets it fire.
    fn enable(&self, message: MsiMessage) -> Result<(), IrqError>;
    /// Stops the vector from firing. What is written to the eventfd meanwhile stays pending there.
    fn disable(&self);
    /// Write to it to fire the vector.
    fn eventfd(&self) -> &EventFd;
}

/// Where a device gets its message-signalled vectors.
pub trait Msi: Send + Sync {
    /// A new, disabled vector.
    fn vector(&self) -> Result<Box<dyn MsiVector>, IrqError>;
}
