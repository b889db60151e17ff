//! Address-space buses and the few traits by which a device reaches the world.
//!
//! A [`Device`] answers accesses at offsets of a range it was given; it never sees the bus it
//! sits on. It lives in a [`Slot`], which can be *closed*: closing waits out an access in flight
//! and hands the device back, and later accesses read all-ones. A [`Bus`] maps address ranges to
//! slots; a [`Mapping`] is the guard of one such range and unmaps it on drop.
//!
//! Threads: every vCPU thread calls [`Bus::read`] and [`Bus::write`], which take no lock on the
//! bus itself (the table is an immutable snapshot) and one lock on the slot they hit. Mapping and
//! unmapping may happen on any thread at any time.

mod bus;
mod device;
mod doorbell;
mod irq;
mod mailbox;
mod slot;

pub use bus::{Bus, MapError, Mapping, Range};
pub use device::{Access, Device, Target, fill_absent};
pub use doorbell::{Doorbell, DoorbellAddress, Doorbells};
pub use irq::{IrqError, IrqLine, Msi, MsiMessage, MsiVector};
pub use mailbox::{GuestEvent, Mailbox};
pub use slot::Slot;
