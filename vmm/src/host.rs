//! What the host offers, as far as a plan depends on it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use testudo_arch::x86_64::host::{Capabilities, ProbeError};
use testudo_arch::x86_64::mtrr::KVM_VARIABLE_RANGES;
use testudo_kvm::Hypervisor;

/// The host as a plan sees it: small enough to write down, so that a plan can be made for a host
/// that is elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HostFacts {
    /// Width of the widest guest-physical address KVM can map.
    pub guest_phys_bits: u8,
    /// Variable MTRR pairs.
    pub mtrr_slots: u8,
    /// vCPUs a VM may have.
    pub max_vcpus: u32,
    /// Guest CPU ids lie below this.
    pub max_vcpu_id: u32,
}

/// The host's facts and the CPUID it supports.
pub struct Host {
    /// What KVM said.
    pub capabilities: Capabilities,
    /// What of it a plan depends on.
    pub facts: HostFacts,
}

impl Host {
    /// Asks KVM.
    pub fn probe(hypervisor: &Hypervisor) -> Result<Self, ProbeError> {
        let capabilities = Capabilities::probe(hypervisor.kvm())?;
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let facts = HostFacts {
            guest_phys_bits: capabilities.guest_phys_bits(),
            mtrr_slots: KVM_VARIABLE_RANGES,
            max_vcpus: count(capabilities.max_vcpus()),
            max_vcpu_id: count(capabilities.max_vcpu_id()),
        };
        Ok(Self {
            capabilities,
            facts,
        })
    }
}
