//! What this host's KVM offers, and a clear no where it offers too little.

use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use thiserror::Error;

use crate::x86_64::cpuid::{CpuidEntry, supported_phys_bits};

/// KVM extensions without which there is no machine, and what each is for.
const REQUIRED: [(Cap, &str); 11] = [
    (
        Cap::Irqchip,
        "KVM_CAP_IRQCHIP (LAPIC and IOAPIC in the kernel)",
    ),
    (
        Cap::UserMemory,
        "KVM_CAP_USER_MEMORY (guest RAM from our own memory)",
    ),
    (
        Cap::SetTssAddr,
        "KVM_CAP_SET_TSS_ADDR (a place for KVM's TSS)",
    ),
    (
        Cap::SetIdentityMapAddr,
        "KVM_CAP_SET_IDENTITY_MAP_ADDR (a place for KVM's page table)",
    ),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID (CPUID chosen by us)"),
    (Cap::MpState, "KVM_CAP_MP_STATE (more than one vCPU)"),
    (Cap::Irqfd, "KVM_CAP_IRQFD (interrupts by eventfd)"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD (doorbells by eventfd)"),
    (
        Cap::IrqRouting,
        "KVM_CAP_IRQ_ROUTING (message-signalled interrupts)",
    ),
    (
        Cap::ImmediateExit,
        "KVM_CAP_IMMEDIATE_EXIT (stopping a vCPU)",
    ),
    (
        Cap::TscDeadlineTimer,
        "KVM_CAP_TSC_DEADLINE_TIMER (the guest's timer)",
    ),
];

/// Why this host cannot run guests.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// Not the KVM we speak to.
    #[error("KVM speaks API version {found}, not {KVM_API_VERSION}: update the host kernel")]
    ApiVersion {
        /// What it said.
        found: i32,
    },
    /// An extension is missing.
    #[error(
        "the host's KVM lacks {name}: use a host kernel of 5.10 or later with kvm-intel or kvm-amd"
    )]
    Missing {
        /// The extension, and what it is for.
        name: &'static str,
    },
    /// The host does not tell what CPUID it supports.
    #[error("reading the CPUID that KVM supports: check the access rights of /dev/kvm")]
    Cpuid(#[source] kvm_ioctls::Error),
    /// No leaf 0x80000008.
    #[error(
        "KVM's supported CPUID tells no physical address width: this host cannot run 64-bit guests"
    )]
    PhysBits,
}

/// What the host's KVM offers.
#[derive(Debug, Clone)]
pub struct Capabilities {
    supported_cpuid: Vec<CpuidEntry>,
    guest_phys_bits: u8,
    max_vcpus: usize,
    max_vcpu_id: usize,
}

impl Capabilities {
    /// Asks KVM.
    pub fn probe(kvm: &Kvm) -> Result<Self, ProbeError> {
        let found = kvm.get_api_version();
        if u32::try_from(found) != Ok(KVM_API_VERSION) {
            return Err(ProbeError::ApiVersion { found });
        }
        for (capability, name) in REQUIRED {
            if !kvm.check_extension(capability) {
                return Err(ProbeError::Missing { name });
            }
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(ProbeError::Cpuid)?;
        let supported_cpuid: Vec<_> = cpuid.as_slice().iter().map(CpuidEntry::from).collect();
        Ok(Self {
            guest_phys_bits: supported_phys_bits(&supported_cpuid).ok_or(ProbeError::PhysBits)?,
            supported_cpuid,
            max_vcpus: kvm.get_max_vcpus(),
            max_vcpu_id: kvm.get_max_vcpu_id(),
        })
    }

    /// The CPUID leaves KVM can give a vCPU.
    pub fn supported_cpuid(&self) -> &[CpuidEntry] {
        &self.supported_cpuid
    }

    /// Width of the widest guest-physical address KVM can map.
    pub fn guest_phys_bits(&self) -> u8 {
        self.guest_phys_bits
    }

    /// vCPUs a VM may have.
    pub fn max_vcpus(&self) -> usize {
        self.max_vcpus
    }

    /// vCPU ids, which are APIC ids, lie below this.
    pub fn max_vcpu_id(&self) -> usize {
        self.max_vcpu_id
    }
}

impl From<&kvm_cpuid_entry2> for CpuidEntry {
    fn from(entry: &kvm_cpuid_entry2) -> Self {
        let kvm_cpuid_entry2 {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
            ..
        } = *entry;
        Self {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
        }
    }
}

impl From<&CpuidEntry> for kvm_cpuid_entry2 {
    fn from(entry: &CpuidEntry) -> Self {
        let CpuidEntry {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
        } = *entry;
        Self {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
            ..Self::default()
        }
    }
}
