//! Extended leaves: address widths, and AMD's way of telling caches and topology.

use super::basic::share_cache;
use super::table::{CpuidEntry, CpuidTable, FLAG_SIGNIFICANT_INDEX, keep_bit, set_bit, set_bits};
use super::{Subject, Vendor};

/// Cache types of leaf 0x8000001D.
const DATA: u32 = 1;
const INSTRUCTION: u32 = 2;
const UNIFIED: u32 = 3;

pub(super) fn apply(table: &mut CpuidTable, subject: &Subject) {
    let request = &subject.request;
    let topology = request.topology;
    let siblings = u32::from(topology.vcpus_per_socket());
    let amd = subject.vendor == Vendor::Amd;

    table.change(0x8000_0001, |leaf| {
        keep_bit(&mut leaf.ecx, 2, request.nested); // SVM
        if amd {
            set_bit(&mut leaf.ecx, 1, siblings > 1); // CmpLegacy
            set_bit(&mut leaf.ecx, 22, true); // TOPOEXT: leaves 0x8000001D and 0x8000001E
            keep_bit(&mut leaf.ecx, 23, request.pmu); // PerfCtrExtCore
        }
    });
    table.change(0x8000_0008, |leaf| {
        set_bits(&mut leaf.eax, 0, 7, u32::from(request.guest_phys_bits));
        set_bits(&mut leaf.eax, 16, 23, 0);
        leaf.ecx = 0;
        if amd {
            set_bits(&mut leaf.ecx, 0, 7, siblings - 1);
            set_bits(&mut leaf.ecx, 12, 15, topology.socket_shift());
        }
    });
    if !request.nested {
        table.remove(0x8000_000a);
    }
    // Memory encryption is no part of this machine; extended topology is told by leaf 0xB.
    table.remove(0x8000_001f);
    table.remove(0x8000_0026);
    if amd {
        table.change(0x8000_0000, |leaf| leaf.eax = leaf.eax.max(0x8000_001e));
        if !request.pmu {
            table.remove(0x8000_0022);
        }
        caches(table, subject);
        node(table, subject);
    }
}

/// Leaf 0x8000001D: the host's, else made from the older leaves 0x80000005 and 0x80000006.
fn caches(table: &mut CpuidTable, subject: &Subject) {
    const LEAF: u32 = 0x8000_001d;
    let told = table.get(LEAF, 0).is_some_and(|leaf| leaf.eax & 0x1f != 0);
    if !told {
        let zero = CpuidEntry::default();
        let level_1 = *table.get(0x8000_0005, 0).unwrap_or(&zero);
        let level_23 = *table.get(0x8000_0006, 0).unwrap_or(&zero);
        let found = [
            first_level(DATA, level_1.ecx),
            first_level(INSTRUCTION, level_1.edx),
            outer_level(2, level_23.ecx, level_23.ecx >> 16),
            outer_level(3, level_23.edx, (level_23.edx >> 18) * 512),
        ];
        let mut subleaves: Vec<_> = found.into_iter().flatten().collect();
        subleaves.push([0; 4]);
        table.replace(LEAF, &subleaves);
    }
    table.change_all(LEAF, |cache| {
        cache.flags |= FLAG_SIGNIFICANT_INDEX;
        share_cache(&mut cache.eax, subject.request.topology);
    });
}

/// A level 1 cache: size in KiB, associativity and line size are bytes of `register`.
fn first_level(kind: u32, register: u32) -> Option<[u32; 4]> {
    let [line, _, ways, kib] = register.to_le_bytes().map(u32::from);
    let ways = if ways == 0xff {
        kib * 1024 / line.max(1)
    } else {
        ways
    };
    cache(kind, 1, kib, ways, line)
}

/// A level 2 or 3 cache: the associativity of `register` is a code.
fn outer_level(level: u32, register: u32, kib: u32) -> Option<[u32; 4]> {
    let line = register & 0xff;
    let ways = match register >> 12 & 0xf {
        code @ 1..=4 => code,
        6 => 8,
        8 => 16,
        0xa => 32,
        0xb => 48,
        0xc => 64,
        0xd => 96,
        0xe => 128,
        0xf => kib * 1024 / line.max(1),
        _ => 0,
    };
    cache(UNIFIED, level, kib, ways, line)
}

/// Registers for one cache; `None` when the host tells nothing usable about it.
fn cache(kind: u32, level: u32, kib: u32, ways: u32, line: u32) -> Option<[u32; 4]> {
    const SELF_INITIALISING: u32 = 1 << 8;
    let sets = (kib * 1024).checked_div(ways * line)?;
    let (line, ways, sets) = (
        line.checked_sub(1)?,
        ways.checked_sub(1)?,
        sets.checked_sub(1)?,
    );
    Some([
        kind | level << 5 | SELF_INITIALISING,
        line & 0xfff | ways << 22,
        sets,
        0,
    ])
}

/// Leaf 0x8000001E: APIC id, core and node.
fn node(table: &mut CpuidTable, subject: &Subject) {
    let topology = subject.request.topology;
    let apic_id = subject.apic_id;
    let (mut ebx, mut ecx) = (0, 0);
    set_bits(&mut ebx, 0, 7, apic_id >> topology.thread_bits() & 0xff);
    set_bits(&mut ebx, 8, 15, u32::from(topology.threads() - 1));
    set_bits(&mut ecx, 0, 7, apic_id >> topology.die_shift() & 0xff);
    set_bits(&mut ecx, 8, 10, u32::from(topology.dies() - 1));
    table.replace(0x8000_001e, &[[apic_id, ebx, ecx, 0]]);
}
