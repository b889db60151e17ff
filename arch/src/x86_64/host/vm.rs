//! What a VM needs before its first vCPU is created.

use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_CAP_X2APIC_API, KVM_CAP_X86_DISABLE_EXITS, KVM_PIT_SPEAKER_DUMMY,
    KVM_PMU_CAP_DISABLE, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
    KVM_X86_DISABLE_EXITS_HLT, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::VmFd;
use thiserror::Error;

use crate::x86_64::layout::{KVM_IDENTITY_MAP, KVM_TSS};

/// APIC ids that xAPIC and 8-bit message destinations can name; 255 means all.
const XAPIC_ID_MAX: u32 = 254;

/// How a VM is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmPlan {
    /// The greatest APIC id of the topology.
    pub max_apic_id: u32,
    /// vCPUs may have a PMU (see [`crate::x86_64::CpuidRequest::pmu`]).
    pub pmu: bool,
    /// Emulate a PIT. Kernels that read hardware-reduced ACPI tables do without.
    pub pit: bool,
    /// A halted vCPU keeps its host CPU: for CPUs given to one guest alone.
    pub halt_in_guest: bool,
}

/// Why a VM could not be set up.
#[derive(Debug, Error)]
pub enum PrepareVmError {
    /// The host refused a step that every KVM knows.
    #[error("{step}: the host's KVM refused; is the VM new and without vCPUs?")]
    Refused {
        /// What was tried.
        step: &'static str,
        /// Its answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A feature that was asked for is not there.
    #[error("the host's KVM has no {name}: {remedy}")]
    Unsupported {
        /// The KVM extension.
        name: &'static str,
        /// What to do without it.
        remedy: &'static str,
    },
}

/// Places KVM's own pages, creates the interrupt controllers and sets what must be set before the
/// first vCPU exists.
pub fn prepare_vm(vm: &VmFd, plan: &VmPlan) -> Result<(), PrepareVmError> {
    let refused = |step| move |source| PrepareVmError::Refused { step, source };
    vm.set_identity_map_address(KVM_IDENTITY_MAP)
        .map_err(refused("placing KVM's identity map page"))?;
    vm.set_tss_address(usize::try_from(KVM_TSS).unwrap_or_default())
        .map_err(refused("placing KVM's TSS"))?;
    if plan.max_apic_id > XAPIC_ID_MAX {
        let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        require(
            vm,
            (KVM_CAP_X2APIC_API, flags),
            "KVM_CAP_X2APIC_API",
            "choose a topology whose APIC ids stay below 255",
        )?;
    }
    if plan.halt_in_guest {
        require(
            vm,
            (KVM_CAP_X86_DISABLE_EXITS, KVM_X86_DISABLE_EXITS_HLT),
            "KVM_CAP_X86_DISABLE_EXITS for HLT",
            "do not ask for halting inside the guest",
        )?;
    }
    // Older KVMs lack the switch; the guest sees no PMU in CPUID either way.
    if !plan.pmu && has_flags(vm, KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE) {
        enable(vm, KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE)
            .map_err(refused("turning the virtual PMU off"))?;
    }
    vm.create_irq_chip()
        .map_err(refused("creating LAPICs and IOAPIC"))?;
    if plan.pit {
        let config = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        vm.create_pit2(config)
            .map_err(refused("creating the PIT"))?;
    }
    Ok(())
}

fn require(
    vm: &VmFd,
    (capability, flags): (u32, u32),
    name: &'static str,
    remedy: &'static str,
) -> Result<(), PrepareVmError> {
    if !has_flags(vm, capability, flags) {
        return Err(PrepareVmError::Unsupported { name, remedy });
    }
    enable(vm, capability, flags).map_err(|source| PrepareVmError::Refused { step: name, source })
}

/// Whether the capability's answer has all of `flags`.
fn has_flags(vm: &VmFd, capability: u32, flags: u32) -> bool {
    let answer = vm.check_extension_raw(u64::from(capability));
    u32::try_from(answer).is_ok_and(|answer| answer & flags == flags)
}

fn enable(vm: &VmFd, capability: u32, flags: u32) -> Result<(), kvm_ioctls::Error> {
    vm.enable_cap(&kvm_enable_cap {
        cap: capability,
        args: [u64::from(flags), 0, 0, 0],
        ..Default::default()
    })
}
