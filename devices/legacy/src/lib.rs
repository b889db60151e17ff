//! Platform devices a PC guest expects at fixed ports: serial, i8042, CMOS RTC, ACPI registers,
//! pvpanic, debug port; and a watchdog, which is a PCI function.
//!
//! Each of the former is a [`testudo_bus::Device`] that sees offsets of its own range; where the range lies is
//! the machine's decision. All of them are called on vCPU threads, reach the machine through a
//! [`Mailbox`](testudo_bus::Mailbox) or an [`IrqLine`](testudo_bus::IrqLine) only, and do nothing
//! that waits, with one exception that is argued for in [`serial`].
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]

pub mod acpi_regs;
pub mod cmos;
pub mod debug_port;
pub mod i6300esb;
pub mod i8042;
pub mod pvpanic;
pub mod serial;
pub mod system_control;

pub use acpi_regs::{AcpiRegisters, GedHandle, ged};
pub use cmos::Cmos;
pub use debug_port::DebugPort;
pub use i6300esb::{I6300Esb, WatchdogError, WatchdogHandle};
pub use i8042::I8042;
pub use pvpanic::Pvpanic;
pub use serial::{Serial, SerialHandle};
pub use system_control::SystemControl;

#[cfg(test)]
mod testing;
