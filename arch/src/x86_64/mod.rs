//! x86_64: a PC without firmware. The VMM enters the kernel directly and hands it ACPI tables of
//! the hardware-reduced kind (ACPI 6.5 §4.1).

pub mod acpi;
pub mod boot_params;
pub mod boot_state;
pub mod cpuid;
mod gdt;
#[cfg(target_arch = "x86_64")]
pub mod host;
pub mod layout;
pub mod map;
pub mod mtrr;
mod paging;
mod reset_vector;
pub mod topology;

pub use boot_params::{E820Entry, E820Kind};
pub use boot_state::{BootState, VcpuState};
pub use cpuid::{CpuidEntry, CpuidRequest};
pub use map::{MapError, MapRequest, MemoryMap};
pub use mtrr::{MemoryType, MtrrError, MtrrPlan};
pub use topology::{Topology, TopologyError};
