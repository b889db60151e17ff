use proptest::prelude::*;

use super::*;

fn leaf(function: u32, index: u32, registers: [u32; 4]) -> CpuidEntry {
    let [eax, ebx, ecx, edx] = registers;
    let flags = match function {
        4 | 7 | 0xb | 0xd | 0x8000_001d => FLAG_SIGNIFICANT_INDEX,
        _ => 0,
    };
    CpuidEntry {
        function,
        index,
        flags,
        eax,
        ebx,
        ecx,
        edx,
    }
}

fn name(text: &[u8; 12]) -> [u32; 3] {
    let word = |at: usize| u32::from_le_bytes(text[at..at + 4].try_into().unwrap());
    [word(0), word(4), word(8)]
}

fn host(vendor: &[u8; 12]) -> Vec<CpuidEntry> {
    let [ebx, edx, ecx] = name(vendor);
    let [kvm_b, kvm_c, kvm_d] = name(b"KVMKVMKVM\0\0\0");
    vec![
        leaf(0, 0, [0x16, ebx, ecx, edx]),
        leaf(1, 0, [0x50654, 0x0710_0800, 0x8820_8028, 0x1f8b_ebff]),
        leaf(4, 0, [0x7c00_4121, 0x01c0_003f, 0x3f, 0]),
        leaf(4, 1, [0x7c00_4122, 0x01c0_003f, 0x3f, 0]),
        leaf(4, 2, [0x7c00_4143, 0x03c0_003f, 0x3ff, 0]),
        leaf(4, 3, [0x7c07_c163, 0x0280_003f, 0x6fff, 0]),
        leaf(6, 0, [0, 0, 9, 0]),
        leaf(7, 0, [0, 0x4, 0x4000_0000, 0]),
        leaf(0xa, 0, [0x0730_0404, 0, 0, 0x603]),
        leaf(0xb, 0, [1, 2, 0x100, 7]),
        leaf(0xb, 1, [5, 32, 0x201, 7]),
        leaf(0xd, 0, [7, 0x340, 0x340, 0]),
        leaf(0xd, 1, [0xf, 0, 0, 0]),
        leaf(0x4000_0000, 0, [0x4000_0001, kvm_b, kvm_c, kvm_d]),
        leaf(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
        leaf(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
        leaf(0x8000_0001, 0, [0, 0, 0x121, 0x2c10_0800]),
        leaf(0x8000_0008, 0, [0x3028, 0, 0, 0]),
    ]
}

fn intel() -> Vec<CpuidEntry> {
    host(b"GenuineIntel")
}

fn amd() -> Vec<CpuidEntry> {
    let mut host = host(b"AuthenticAMD");
    host.retain(|entry| !matches!(entry.function, 4 | 0xa));
    host.extend([
        leaf(0x8000_0005, 0, [0, 0, 0x4002_0140, 0x4002_0140]),
        leaf(0x8000_0006, 0, [0, 0, 0x0200_8140, 0x0080_9140]),
        leaf(0x8000_000a, 0, [1, 16, 0, 0]),
        leaf(0x8000_001f, 0, [0xf, 0, 0, 0]),
    ]);
    for entry in &mut host {
        if entry.function == 0x8000_0001 {
            entry.ecx |= 1 << 2;
        }
    }
    host
}

fn request(topology: Topology, index: u16) -> CpuidRequest {
    CpuidRequest {
        topology,
        index,
        guest_phys_bits: 40,
        tsc_khz: Some(2_900_000),
        tsc_deadline: true,
        pmu: false,
        nested: false,
    }
}

fn find(entries: &[CpuidEntry], function: u32, index: u32) -> CpuidEntry {
    let found = entries
        .iter()
        .find(|e| e.function == function && e.index == index);
    *found.unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"))
}

#[test]
fn intel_topology_and_caches() {
    let topology = Topology::new(2, 1, 3, 2).unwrap();
    let entries = plan(&intel(), &request(topology, 9)).unwrap();
    let features = find(&entries, 1, 0);
    assert_eq!(
        features.ebx, 0x0b08_0800,
        "APIC id 11, 8 ids per socket, CLFLUSH 64"
    );
    assert_ne!(features.ecx & 1 << 31, 0);
    assert_ne!(features.ecx & 1 << 24, 0);
    assert_eq!(features.ecx & (1 << 5 | 1 << 3 | 1 << 15), 0);
    assert_eq!(
        features.edx & (1 << 12 | 1 << 16 | 1 << 28),
        1 << 12 | 1 << 16 | 1 << 28
    );

    assert_eq!(
        find(&entries, 4, 0).eax,
        0x0c00_4121,
        "two threads, four core ids"
    );
    assert_eq!(
        find(&entries, 4, 3).eax,
        0x0c01_c163,
        "eight ids share level 3"
    );
    for function in [0xb, 0x1f] {
        let level = |index| {
            let CpuidEntry {
                eax, ebx, ecx, edx, ..
            } = find(&entries, function, index);
            [eax, ebx, ecx, edx]
        };
        assert_eq!(level(0), [1, 2, 0x100, 11]);
        assert_eq!(level(1), [3, 6, 0x201, 11]);
        assert_eq!(level(2), [0, 0, 2, 11]);
    }
    assert!(find(&entries, 0, 0).eax >= 0x1f);
    assert_eq!(find(&entries, 0xa, 0).eax, 0);
    assert_eq!(find(&entries, 6, 0).eax & 4, 4);
    assert_eq!(find(&entries, 7, 0).ebx & 4, 0);
    assert_eq!(find(&entries, 0x8000_0008, 0).eax, 0x3028);
}

#[test]
fn dies_are_told_in_leaf_0x1f_only() {
    let topology = Topology::new(1, 2, 2, 1).unwrap();
    let entries = plan(&intel(), &request(topology, 3)).unwrap();
    assert_eq!(find(&entries, 0xb, 1).ebx, 4);
    let die = find(&entries, 0x1f, 2);
    assert_eq!([die.eax, die.ebx, die.ecx, die.edx], [2, 4, 0x502, 3]);
}

#[test]
fn intel_frequencies() {
    let entries = plan(&intel(), &request(Topology::flat(1).unwrap(), 0)).unwrap();
    let tsc = find(&entries, 0x15, 0);
    assert_eq!([tsc.eax, tsc.ebx, tsc.ecx], [1, 1, 2_900_000_000]);
    let mhz = find(&entries, 0x16, 0);
    assert_eq!([mhz.eax, mhz.ebx, mhz.ecx], [2900, 2900, 100]);
    assert_eq!(find(&entries, 0x4000_0010, 0).eax, 2_900_000);
    assert_eq!(find(&entries, 0x4000_0000, 0).eax, 0x4000_0010);
    assert_eq!(find(&entries, 1, 0).edx & 1 << 28, 0, "one CPU: no HTT");
}

#[test]
fn a_fast_tsc_is_told_as_two_times_the_crystal() {
    let mut fast = request(Topology::flat(1).unwrap(), 0);
    fast.tsc_khz = Some(5_000_000);
    let entries = plan(&intel(), &fast).unwrap();
    let tsc = find(&entries, 0x15, 0);
    assert_eq!([tsc.eax, tsc.ebx, tsc.ecx], [1, 2, 2_500_000_000]);
    fast.tsc_deadline = false;
    let entries = plan(&intel(), &fast).unwrap();
    assert!(entries.iter().all(|entry| entry.function != 0x15));
}

#[test]
fn amd_topology_and_caches() {
    let topology = Topology::new(1, 1, 4, 2).unwrap();
    let entries = plan(&amd(), &request(topology, 5)).unwrap();
    assert_eq!(find(&entries, 1, 0).ebx, 0x0508_0800);
    let extended = find(&entries, 0x8000_0001, 0);
    assert_eq!(
        extended.ecx & (1 << 1 | 1 << 22 | 1 << 2),
        1 << 1 | 1 << 22,
        "no SVM"
    );
    assert_eq!(find(&entries, 0x8000_0008, 0).ecx, 0x3007);
    let node = find(&entries, 0x8000_001e, 0);
    assert_eq!([node.eax, node.ebx, node.ecx], [5, 0x102, 0]);
    assert!(find(&entries, 0x8000_0000, 0).eax >= 0x8000_001e);
    assert_eq!(find(&entries, 0xb, 1).ebx, 8);
    for gone in [0x15, 0x16, 0x1f, 0x8000_000a, 0x8000_001f] {
        assert!(
            entries.iter().all(|entry| entry.function != gone),
            "{gone:#x}"
        );
    }

    let caches: Vec<_> = (0..4)
        .map(|index| find(&entries, 0x8000_001d, index))
        .collect();
    let shared: Vec<_> = caches
        .iter()
        .map(|c| (c.eax & 0x1f, c.eax >> 5 & 7, (c.eax >> 14 & 0xfff) + 1))
        .collect();
    assert_eq!(shared[..3], [(1, 1, 2), (2, 1, 2), (3, 2, 2)]);
    let level_1 = caches[0];
    let ways = (level_1.ebx >> 22) + 1;
    let line = (level_1.ebx & 0xfff) + 1;
    assert_eq!(ways * line * (level_1.ecx + 1), 64 << 10);
    assert_eq!(
        caches[3].eax, 0,
        "level 3 has no associativity there: it ends the list"
    );
}

#[test]
fn nested_guests_are_opt_in() {
    let mut wanted = request(Topology::flat(1).unwrap(), 0);
    wanted.nested = true;
    wanted.pmu = true;
    let entries = plan(&amd(), &wanted).unwrap();
    assert_ne!(find(&entries, 0x8000_0001, 0).ecx & 1 << 2, 0);
    assert_eq!(find(&entries, 0x8000_000a, 0).ebx, 16);
    let entries = plan(&intel(), &wanted).unwrap();
    assert_ne!(find(&entries, 1, 0).ecx & 1 << 5, 0);
    assert_eq!(find(&entries, 0xa, 0).edx, 0x603);
}

#[test]
fn kvm_features_are_kept_but_asynchronous_page_faults() {
    let entries = plan(&amd(), &request(Topology::flat(2).unwrap(), 1)).unwrap();
    let kept = find(&entries, 0x4000_0001, 0).eax;
    assert_eq!(kept & (1 << 4 | 1 << 10 | 1 << 14), 0);
    let wanted = 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 9 | 1 << 11 | 1 << 24;
    assert_eq!(kept & wanted, wanted);
}

#[test]
fn a_missing_cpu_or_leaf_is_an_error() {
    let topology = Topology::flat(2).unwrap();
    let missing = plan(&intel(), &request(topology, 2));
    assert_eq!(missing, Err(CpuidError::NoSuchCpu { index: 2, vcpus: 2 }));
    let mut host = intel();
    host.retain(|entry| entry.function != 0x8000_0008);
    let missing = plan(&host, &request(topology, 0));
    assert_eq!(
        missing,
        Err(CpuidError::MissingLeaf {
            function: 0x8000_0008
        })
    );
}

#[test]
fn the_mappable_width_wins_over_the_physical_one() {
    let host = |eax| vec![leaf(0x8000_0008, 0, [eax, 0, 0, 0])];
    assert_eq!(supported_phys_bits(&host(0x3028)), Some(40));
    assert_eq!(supported_phys_bits(&host(0x3934)), Some(48));
    assert_eq!(supported_phys_bits(&host(0x0034_3934)), Some(52));
    assert_eq!(supported_phys_bits(&host(0x0030_3934)), Some(48));
    assert_eq!(supported_phys_bits(&[]), None);
    assert!(has_gib_pages(&intel()));
}

proptest! {
    #[test]
    fn every_cpu_of_every_shape_has_leaves(
        s in 1u16..5, d in 1u16..4, c in 1u16..20, t in 1u16..4, pick in any::<prop::sample::Index>(),
        is_amd in any::<bool>(),
    ) {
        let Ok(topology) = Topology::new(s, d, c, t) else { return Ok(()) };
        let index = u16::try_from(pick.index(usize::from(topology.vcpus()))).unwrap();
        let host = if is_amd { amd() } else { intel() };
        let entries = plan(&host, &request(topology, index)).unwrap();
        let id = topology.apic_id(index).unwrap();
        prop_assert_eq!(find(&entries, 0xb, 0).edx, id);
        prop_assert_eq!(find(&entries, 0xb, 1).eax, topology.socket_shift());
        let mut keys: Vec<_> = entries.iter().map(|e| (e.function, e.index)).collect();
        let all = keys.len();
        keys.dedup();
        prop_assert_eq!(keys.len(), all);
    }
}
