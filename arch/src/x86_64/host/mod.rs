//! The KVM half: what the host can do, and the plans applied to a VM and its vCPUs.
//!
//! Order, on the control thread: [`Capabilities::probe`], then [`prepare_vm`] before any vCPU is
//! created; then for each vCPU (created with its APIC id as KVM's vCPU id) [`tsc_khz`] to plan
//! its CPUID and [`prepare_vcpu`], before its thread runs it for the first time.

mod capabilities;
mod vcpu;
mod vm;

pub use capabilities::{Capabilities, ProbeError};
pub use vcpu::{PrepareVcpuError, VcpuPlan, prepare_vcpu, tsc_khz};
pub use vm::{PrepareVmError, VmPlan, prepare_vm};

#[cfg(test)]
mod tests;
