//! PCI: configuration space, BAR windows, MSI-X, the segment and its host bridge.
//!
//! A [`PciFunction`] keeps its registers in a [`ConfigSpace`] and answers accesses to its BARs.
//! [`Segment::plug`] gives it a place on a bus; the guard it returns takes it away again. The
//! segment routes configuration accesses ([`Segment::ecam`], [`Segment::cf8`]) and keeps the MMIO
//! bus in step with what the guest programs into BARs and command registers.
//!
//! Threads: configuration and BAR accesses come from vCPU threads and hold the function's lock;
//! plugging and unplugging happen on the control thread. No function ever sees the segment.
#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]

mod address;
mod bar;
mod capability;
mod config;
mod function;
mod host_bridge;
mod msix;
mod segment;

pub mod fuzz;

pub use address::Bdf;
pub use bar::{BAR_COUNT, Bar, Decoding};
pub use capability::{Capability, PcieType};
pub use config::{ClassCode, ConfigSpace, Identity, LayoutError, regs};
pub use function::PciFunction;
pub use host_bridge::HostBridge;
pub use msix::{BarOffset, Msix, MsixVectors};
pub use segment::{PlugError, Plugged, Segment};

#[cfg(test)]
mod testing;
