//! What a vCPU needs before it runs for the first time: CPUID, MTRRs and, for the first one, the
//! kernel's entry state. All else is as KVM resets it, which is as the manuals say.

use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_dtable, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs,
    kvm_segment, kvm_sregs,
};
use kvm_ioctls::VcpuFd;
use thiserror::Error;

use crate::x86_64::boot_state::{Segment, VcpuState};
use crate::x86_64::cpuid::CpuidEntry;
use crate::x86_64::mtrr::{MSR_MTRR_DEF_TYPE, MSR_MTRR_PHYS_BASE_0, MSR_PAT, MtrrPlan};

/// IA32_MISC_ENABLE.
const MSR_MISC_ENABLE: u32 = 0x1a0;
/// Fast string operations, in IA32_MISC_ENABLE: Linux uses them only when this is set.
const FAST_STRINGS: u64 = 1;
/// x87 control word and MXCSR with all exceptions masked.
const FCW: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;
/// Offsets of LVT registers in the LAPIC page, and what they deliver (SDM 3A §11.5.1).
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVER_EXTINT: u32 = 0x700;
const DELIVER_NMI: u32 = 0x400;

/// How one vCPU is set up.
#[derive(Debug, Clone, Copy)]
pub struct VcpuPlan<'a> {
    /// Its CPUID leaves.
    pub cpuid: &'a [CpuidEntry],
    /// The memory types, the same for every vCPU.
    pub mtrr: &'a MtrrPlan,
    /// Where the first vCPU enters the kernel; the others wait to be started by it.
    pub boot: Option<&'a VcpuState>,
}

/// Why a vCPU could not be set up.
#[derive(Debug, Error)]
pub enum PrepareVcpuError {
    /// KVM takes no more leaves.
    #[error("{entries} CPUID leaves are more than KVM takes")]
    TooManyLeaves {
        /// Leaves planned.
        entries: usize,
    },
    /// KVM refused one register.
    #[error("KVM refused MSR {name} ({index:#x}) = {value:#x}: check the CPUID given to the vCPU")]
    Msr {
        /// The manual's name.
        name: &'static str,
        /// Its number.
        index: u32,
        /// The value.
        value: u64,
    },
    /// KVM refused a step.
    #[error("{step}: the host's KVM refused")]
    Refused {
        /// What was tried.
        step: &'static str,
        /// Its answer.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// Frequency of the vCPU's TSC; `None` when the host does not know it.
pub fn tsc_khz(vcpu: &VcpuFd) -> Option<u32> {
    vcpu.get_tsc_khz().ok().filter(|khz| *khz != 0)
}

/// Gives the vCPU its CPUID, its MTRRs and, if it is the first one, the kernel's entry state.
pub fn prepare_vcpu(vcpu: &VcpuFd, plan: &VcpuPlan<'_>) -> Result<(), PrepareVcpuError> {
    set_cpuid(vcpu, plan.cpuid)?;
    let mut msrs = plan.mtrr.msrs();
    msrs.push((MSR_MISC_ENABLE, FAST_STRINGS));
    set_msrs(vcpu, &msrs)?;
    let fpu = kvm_fpu {
        fcw: FCW,
        mxcsr: MXCSR,
        ..Default::default()
    };
    vcpu.set_fpu(&fpu).map_err(refused("setting the FPU"))?;
    if let Some(state) = plan.boot {
        set_local_pins(vcpu)?;
        set_registers(vcpu, state)?;
    }
    Ok(())
}

fn refused(step: &'static str) -> impl Fn(kvm_ioctls::Error) -> PrepareVcpuError {
    move |source| PrepareVcpuError::Refused { step, source }
}

fn set_cpuid(vcpu: &VcpuFd, leaves: &[CpuidEntry]) -> Result<(), PrepareVcpuError> {
    let entries: Vec<_> = leaves.iter().map(kvm_cpuid_entry2::from).collect();
    let cpuid = CpuId::from_entries(&entries).map_err(|_| PrepareVcpuError::TooManyLeaves {
        entries: entries.len(),
    })?;
    vcpu.set_cpuid2(&cpuid).map_err(refused("setting CPUID"))
}

/// KVM writes MSRs in order and stops at the first it refuses.
fn set_msrs(vcpu: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), PrepareVcpuError> {
    let entry = |&(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries: Vec<_> = msrs.iter().map(entry).collect();
    let step = "setting MSRs";
    let list =
        Msrs::from_entries(&entries).map_err(|_| refused(step)(kvm_ioctls::Error::new(7)))?;
    let written = vcpu.set_msrs(&list).map_err(refused(step))?;
    match msrs.get(written) {
        None => Ok(()),
        Some(&(index, value)) => Err(PrepareVcpuError::Msr {
            name: msr_name(index),
            index,
            value,
        }),
    }
}

fn msr_name(index: u32) -> &'static str {
    match index {
        MSR_MISC_ENABLE => "IA32_MISC_ENABLE",
        MSR_PAT => "IA32_PAT",
        MSR_MTRR_DEF_TYPE => "IA32_MTRR_DEF_TYPE",
        _ if index >= MSR_MTRR_PHYS_BASE_0 && index.is_multiple_of(2) => "IA32_MTRR_PHYSBASE",
        _ => "IA32_MTRR_PHYSMASK",
    }
}

/// LINT0 takes an 8259's interrupts and LINT1 non-maskable ones, as firmware would have it.
fn set_local_pins(vcpu: &VcpuFd) -> Result<(), PrepareVcpuError> {
    let mut lapic = vcpu.get_lapic().map_err(refused("reading the LAPIC"))?;
    set_lapic_register(&mut lapic, LVT_LINT0, DELIVER_EXTINT);
    set_lapic_register(&mut lapic, LVT_LINT1, DELIVER_NMI);
    vcpu.set_lapic(&lapic).map_err(refused("setting the LAPIC"))
}

fn set_lapic_register(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    let register = lapic.regs.iter_mut().skip(offset);
    for (to, from) in register.zip(value.to_le_bytes()) {
        *to = from.cast_signed();
    }
}

fn set_registers(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), PrepareVcpuError> {
    let mut special = vcpu
        .get_sregs()
        .map_err(refused("reading segment registers"))?;
    apply(&mut special, state);
    vcpu.set_sregs(&special)
        .map_err(refused("setting segment and control registers"))?;
    let general = kvm_regs {
        rip: state.rip,
        rsp: state.rsp,
        rsi: state.rsi,
        rbx: state.rbx,
        rflags: state.rflags,
        ..Default::default()
    };
    vcpu.set_regs(&general)
        .map_err(refused("setting general registers"))
}

/// What the boot state does not name stays as KVM has it, above all the APIC base.
fn apply(special: &mut kvm_sregs, state: &VcpuState) {
    let data = segment(&state.data);
    special.cs = segment(&state.code);
    (special.ds, special.es, special.fs) = (data, data, data);
    (special.gs, special.ss) = (data, data);
    special.tr = segment(&state.tss);
    special.gdt = kvm_dtable {
        base: state.gdt_base,
        limit: state.gdt_limit,
        ..Default::default()
    };
    special.idt = kvm_dtable::default();
    special.cr0 = state.cr0;
    special.cr3 = state.cr3;
    special.cr4 = state.cr4;
    special.efer = state.efer;
}

fn segment(from: &Segment) -> kvm_segment {
    kvm_segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        type_: from.kind,
        present: 1,
        s: u8::from(from.code_or_data),
        l: u8::from(from.long),
        db: u8::from(from.default_32),
        g: u8::from(from.granular),
        ..Default::default()
    }
}
