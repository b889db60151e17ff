//! Against a real /dev/kvm, where there is one.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::*;
use crate::x86_64::cpuid::{self, CpuidEntry, CpuidRequest};
use crate::x86_64::mtrr::{self, KVM_VARIABLE_RANGES, MtrrPlan};
use crate::x86_64::{BootState, MemoryMap, Topology};

/// `None`, said aloud, on a machine without KVM.
fn kvm() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            println!("Skipped: /dev/kvm does not open ({error})");
            None
        }
    }
}

fn vm(kvm: &Kvm, topology: Topology, pit: bool) -> VmFd {
    let vm = kvm.create_vm().unwrap();
    let max_apic_id = topology.max_apic_id();
    let plan = VmPlan {
        max_apic_id,
        pmu: false,
        pit,
        halt_in_guest: false,
    };
    prepare_vm(&vm, &plan).unwrap();
    vm
}

fn mtrrs(host: &Capabilities) -> (MemoryMap, MtrrPlan) {
    let bits = host.guest_phys_bits();
    let map = MemoryMap::plan(256 << 20, bits).unwrap();
    let plan = mtrr::plan(&map, bits, KVM_VARIABLE_RANGES).unwrap();
    (map, plan)
}

fn leaves(host: &Capabilities, topology: Topology, index: u16, vcpu: &VcpuFd) -> Vec<CpuidEntry> {
    let request = CpuidRequest {
        topology,
        index,
        guest_phys_bits: host.guest_phys_bits(),
        tsc_khz: tsc_khz(vcpu),
        tsc_deadline: true,
        pmu: false,
        nested: false,
    };
    cpuid::plan(host.supported_cpuid(), &request).unwrap()
}

fn create(vm: &VmFd, topology: Topology, index: u16) -> VcpuFd {
    vm.create_vcpu(u64::from(topology.apic_id(index).unwrap()))
        .unwrap()
}

#[test]
fn a_vcpu_holds_what_was_planned() {
    let Some(kvm) = kvm() else { return };
    let host = Capabilities::probe(&kvm).unwrap();
    assert!((36..=52).contains(&host.guest_phys_bits()));
    let topology = Topology::new(1, 1, 2, 2).unwrap();
    let vm = vm(&kvm, topology, true);
    let (_, mtrr) = mtrrs(&host);
    let state = BootState::linux_64(0x10_0200, 0x7000, false).vcpu;
    for index in 0..topology.vcpus() {
        let vcpu = create(&vm, topology, index);
        let cpuid = leaves(&host, topology, index, &vcpu);
        let boot = (index == 0).then_some(&state);
        prepare_vcpu(
            &vcpu,
            &VcpuPlan {
                cpuid: &cpuid,
                mtrr: &mtrr,
                boot,
            },
        )
        .unwrap();

        for (register, value) in mtrr.msrs() {
            let entry = kvm_msr_entry {
                index: register,
                ..Default::default()
            };
            let mut read = Msrs::from_entries(&[entry]).unwrap();
            assert_eq!(vcpu.get_msrs(&mut read).unwrap(), 1, "{register:#x}");
            assert_eq!(read.as_slice()[0].data, value, "{register:#x}");
        }
        let held = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
        let held: Vec<_> = held.as_slice().iter().map(CpuidEntry::from).collect();
        for function in [0xb, 0x8000_0008] {
            let of = |all: &[CpuidEntry]| -> Vec<_> {
                all.iter()
                    .filter(|e| e.function == function)
                    .copied()
                    .collect()
            };
            assert_eq!(of(&held), of(&cpuid), "{function:#x}");
        }
        let special = vcpu.get_sregs().unwrap();
        if index == 0 {
            let general = vcpu.get_regs().unwrap();
            assert_eq!((general.rip, general.rsi), (0x10_0200, 0x7000));
            assert_eq!(
                (special.cr3, special.efer, special.cs.l),
                (0x9000, 0x500, 1)
            );
            assert_ne!(special.apic_base, 0);
        } else {
            assert_eq!(special.cr0 & 1, 0, "waits in real mode");
        }
    }
}

#[test]
fn wide_apic_ids_are_accepted() {
    let Some(kvm) = kvm() else { return };
    let topology = Topology::new(3, 1, 65, 1).unwrap();
    let vm = vm(&kvm, topology, false);
    let host = Capabilities::probe(&kvm).unwrap();
    let (_, mtrr) = mtrrs(&host);
    for index in [0, 194] {
        let vcpu = create(&vm, topology, index);
        let cpuid = leaves(&host, topology, index, &vcpu);
        let boot = Some(&BootState::pvh(0x100_0000, 0x6000).vcpu)
            .filter(|_| index == 0)
            .copied();
        let plan = VcpuPlan {
            cpuid: &cpuid,
            mtrr: &mtrr,
            boot: boot.as_ref(),
        };
        prepare_vcpu(&vcpu, &plan).unwrap();
    }
}

#[test]
fn a_refused_msr_is_named() {
    let Some(kvm) = kvm() else { return };
    let host = Capabilities::probe(&kvm).unwrap();
    let topology = Topology::flat(1).unwrap();
    let vm = vm(&kvm, topology, false);
    let vcpu = create(&vm, topology, 0);
    let mut cpuid = leaves(&host, topology, 0, &vcpu);
    for leaf in cpuid.iter_mut().filter(|leaf| leaf.function == 0x8000_0008) {
        leaf.eax = leaf.eax & !0xff | 36;
    }
    let map = MemoryMap::plan(256 << 20, 36).unwrap();
    let too_wide = mtrr::plan(&map, 52, KVM_VARIABLE_RANGES).unwrap();
    let plan = VcpuPlan {
        cpuid: &cpuid,
        mtrr: &too_wide,
        boot: None,
    };
    let error = prepare_vcpu(&vcpu, &plan).unwrap_err();
    assert!(
        error.to_string().contains("IA32_MTRR_PHYSMASK (0x201)"),
        "{error}"
    );
}

#[test]
fn preparing_a_vm_twice_is_an_error() {
    let Some(kvm) = kvm() else { return };
    let vm = vm(&kvm, Topology::flat(1).unwrap(), false);
    let plan = VmPlan {
        max_apic_id: 0,
        pmu: false,
        pit: false,
        halt_in_guest: false,
    };
    let error = prepare_vm(&vm, &plan).unwrap_err();
    assert!(error.to_string().contains("refused"), "{error}");
}
