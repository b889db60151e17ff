//! What CPUID tells a guest: the host's supported set, with topology, cache sharing, address
//! width, frequencies and paravirtual features of this machine put in.
//!
//! Bits the guest may not have are cleared by name; everything KVM supports and we do not name
//! passes through, so that a guest on a newer host has the newer instructions. Intel's leaves
//! are SDM 2A "CPUID", AMD's are APM 3 appendix E, KVM's are Documentation/virt/kvm/x86/cpuid.rst.

mod basic;
mod extended;
mod hypervisor;
mod table;
mod timing;

use thiserror::Error;

use super::topology::Topology;
use table::CpuidTable;

pub use table::{CpuidEntry, FLAG_SIGNIFICANT_INDEX};

/// Frequency of the LAPIC timer that KVM emulates: 1 GHz unless it is told otherwise.
pub const KVM_APIC_BUS_KHZ: u32 = 1_000_000;

/// Which vCPU on which machine the leaves are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuidRequest {
    /// The guest's CPUs.
    pub topology: Topology,
    /// Which of them, from 0.
    pub index: u16,
    /// Width of a guest-physical address, as in the memory map.
    pub guest_phys_bits: u8,
    /// TSC frequency of the vCPU (`KVM_GET_TSC_KHZ`), when it is stable and known.
    pub tsc_khz: Option<u32>,
    /// KVM emulates the LAPIC's TSC-deadline mode (`KVM_CAP_TSC_DEADLINE_TIMER`).
    pub tsc_deadline: bool,
    /// The guest may count events with a virtual PMU.
    pub pmu: bool,
    /// The guest may run guests of its own.
    pub nested: bool,
}

/// Why a vCPU has no CPUID.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CpuidError {
    /// No such CPU.
    #[error("there is no CPU {index} among {vcpus}")]
    NoSuchCpu {
        /// The CPU asked for.
        index: u16,
        /// CPUs in the topology.
        vcpus: u16,
    },
    /// KVM's own set lacks a leaf every 64-bit CPU has.
    #[error("KVM's supported CPUID lacks leaf {function:#x}: this host cannot run 64-bit guests")]
    MissingLeaf {
        /// The leaf.
        function: u32,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Vendor {
    Intel,
    Amd,
    Other,
}

impl Vendor {
    /// Leaf 0 spells the name in EBX, EDX, ECX.
    fn of(leaf_0: &CpuidEntry) -> Self {
        let CpuidEntry { ebx, ecx, edx, .. } = *leaf_0;
        let name: Vec<u8> = [ebx, edx, ecx]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        match name.as_slice() {
            b"GenuineIntel" => Self::Intel,
            b"AuthenticAMD" | b"HygonGenuine" => Self::Amd,
            _ => Self::Other,
        }
    }
}

/// One vCPU in its machine, as the parts of the plan see it.
struct Subject {
    vendor: Vendor,
    apic_id: u32,
    request: CpuidRequest,
}

/// The leaves of one vCPU, from KVM's supported set.
pub fn plan(
    supported: &[CpuidEntry],
    request: &CpuidRequest,
) -> Result<Vec<CpuidEntry>, CpuidError> {
    let mut table = CpuidTable::new(supported);
    for function in [0, 1, 0x8000_0000, 0x8000_0001, 0x8000_0008] {
        if table.get(function, 0).is_none() {
            return Err(CpuidError::MissingLeaf { function });
        }
    }
    let CpuidRequest {
        index, topology, ..
    } = *request;
    let vcpus = topology.vcpus();
    let subject = Subject {
        vendor: table.get(0, 0).map_or(Vendor::Other, Vendor::of),
        apic_id: topology
            .apic_id(index)
            .ok_or(CpuidError::NoSuchCpu { index, vcpus })?,
        request: *request,
    };
    basic::apply(&mut table, &subject);
    extended::apply(&mut table, &subject);
    timing::apply(&mut table, &subject);
    hypervisor::apply(&mut table, &subject);
    Ok(table.into_entries())
}

/// Whether these leaves promise 1 GiB pages (CPUID 0x80000001 EDX bit 26).
pub fn has_gib_pages(entries: &[CpuidEntry]) -> bool {
    let leaf = entries.iter().find(|entry| entry.function == 0x8000_0001);
    leaf.is_some_and(|leaf| leaf.edx & 1 << 26 != 0)
}

/// Width of the guest-physical addresses KVM can map, by its supported set: what it says it can
/// (EAX bits 23:16 of leaf 0x80000008), else the physical width, of which four-level nested page
/// tables reach 48 bits.
pub fn supported_phys_bits(supported: &[CpuidEntry]) -> Option<u8> {
    let leaf = supported
        .iter()
        .find(|entry| entry.function == 0x8000_0008)?;
    let [physical, _, mappable, _] = leaf.eax.to_le_bytes();
    match mappable {
        0 => Some(physical.min(48)),
        _ => Some(physical.min(mappable)),
    }
}

#[cfg(test)]
mod tests;
