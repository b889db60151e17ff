//! Basic leaves: features, caches, power, performance counters, topology.

use super::table::{CpuidTable, keep_bit, set_bit, set_bits};
use super::{Subject, Vendor};
use crate::x86_64::topology::Topology;

/// Level types of leaves 0xB and 0x1F.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;
const LEVEL_DIE: u32 = 5;

pub(super) fn apply(table: &mut CpuidTable, subject: &Subject) {
    let topology = subject.request.topology;
    limit(table, subject.vendor);
    features(table, subject);
    table.change_all(4, |cache| {
        share_cache(&mut cache.eax, topology);
        if cache.eax & 0x1f != 0 {
            let cores = 1 << (topology.socket_shift() - topology.thread_bits());
            set_bits(&mut cache.eax, 26, 31, cores - 1);
        }
    });
    // ARAT: the LAPIC timer never stops. Of the rest of leaf 6 KVM virtualises nothing.
    table.change(6, |power| {
        power.eax |= 1 << 2;
        power.ecx = 0;
    });
    // SGX.
    table.change(7, |features| {
        set_bit(&mut features.ebx, 2, false);
        set_bit(&mut features.ecx, 30, false);
    });
    table.remove(0x12);
    if !subject.request.pmu {
        table.replace(0xa, &[[0; 4]]);
    }

    let with_dies = topology.dies() > 1;
    table.replace(0xb, &levels(subject, false));
    if subject.vendor == Vendor::Amd {
        table.remove(0x1f);
    } else {
        table.replace(0x1f, &levels(subject, with_dies));
    }
}

/// Raises the greatest basic leaf to those this plan adds.
fn limit(table: &mut CpuidTable, vendor: Vendor) {
    let least = if vendor == Vendor::Amd { 0xb } else { 0x1f };
    table.change(0, |leaf| leaf.eax = leaf.eax.max(least));
}

fn features(table: &mut CpuidTable, subject: &Subject) {
    let request = &subject.request;
    let topology = request.topology;
    let siblings = u32::from(topology.vcpus_per_socket());
    let addressable = match subject.vendor {
        Vendor::Amd => siblings,
        _ => 1 << topology.socket_shift(),
    };
    table.change(1, |leaf| {
        // CLFLUSH covers 8 quadwords; the APIC id shown here is the low 8 bits.
        set_bits(&mut leaf.ebx, 8, 15, 8);
        set_bits(&mut leaf.ebx, 16, 23, addressable);
        set_bits(&mut leaf.ebx, 24, 31, subject.apic_id & 0xff);

        set_bit(&mut leaf.ecx, 3, false); // MONITOR
        keep_bit(&mut leaf.ecx, 5, request.nested); // VMX
        keep_bit(&mut leaf.ecx, 15, request.pmu); // PDCM
        set_bit(&mut leaf.ecx, 21, true); // x2APIC
        set_bit(&mut leaf.ecx, 24, request.tsc_deadline);
        set_bit(&mut leaf.ecx, 27, false); // OSXSAVE follows CR4
        set_bit(&mut leaf.ecx, 31, true); // hypervisor

        set_bit(&mut leaf.edx, 12, true); // MTRR
        set_bit(&mut leaf.edx, 16, true); // PAT
        set_bit(&mut leaf.edx, 28, siblings > 1); // HTT
    });
}

/// Puts the number of APIC ids that share a cache into EAX bits 25:14 of a cache leaf: a core's
/// threads share levels 1 and 2, a die shares the rest.
pub(super) fn share_cache(eax: &mut u32, topology: Topology) {
    if *eax & 0x1f == 0 {
        return;
    }
    let level = *eax >> 5 & 0x7;
    let shift = if level < 3 {
        topology.thread_bits()
    } else {
        topology.die_shift()
    };
    set_bits(eax, 14, 25, (1 << shift) - 1);
}

/// Subleaves of the extended topology leaves: each level's shift to the next and how many CPUs
/// it holds. Without a die level the cores of all dies are one level.
fn levels(subject: &Subject, with_dies: bool) -> Vec<[u32; 4]> {
    let topology = subject.request.topology;
    let threads = (LEVEL_THREAD, topology.thread_bits(), topology.threads());
    let cores = (LEVEL_CORE, topology.die_shift(), topology.vcpus_per_die());
    let socket = |kind| (kind, topology.socket_shift(), topology.vcpus_per_socket());
    let levels = if with_dies {
        vec![threads, cores, socket(LEVEL_DIE)]
    } else {
        vec![threads, socket(LEVEL_CORE)]
    };
    let last = (0, 0, 0);
    levels
        .into_iter()
        .chain([last])
        .zip(0u32..)
        .map(|((kind, shift, count), index)| {
            [shift, u32::from(count), kind << 8 | index, subject.apic_id]
        })
        .collect()
}
