//! KVM: the hypervisor handle, the VM, its memslots, interrupt routes, doorbells and vCPUs.
//!
//! Everything acquired here is held by a guard and released by its drop: a memslot by
//! [`Memslot`], a message-signalled route by the vector that [`Interrupts`] hands out, an
//! ioeventfd by its doorbell. What is specific to one architecture (CPUID, registers, the
//! interrupt controller) is set up by the `arch` crate on the descriptors exposed here.
//!
//! Threads: the control thread creates and drops; a vCPU thread owns its [`Vcpu`] and runs it;
//! any thread may use a [`Kick`], an interrupt line or a vector.

mod doorbell;
mod hypervisor;
mod interrupt;
mod kick;
mod memslot;
mod vcpu;

pub use doorbell::KvmDoorbells;
pub use hypervisor::{Hypervisor, OpenError, Vm, VmError};
pub use interrupt::{Interrupts, LineError};
pub use kick::{Kick, install_kick_handler};
pub use memslot::{Memslot, MemslotError, Memslots};
pub use vcpu::{Exit, RunError, Vcpu};
