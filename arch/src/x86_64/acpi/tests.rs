use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

use super::*;
use crate::x86_64::layout::{ACPI_AREA, port};

fn machine(map: &MemoryMap, vcpus: u16, present_vcpus: u16) -> MachineDesc<'_> {
    let topology = Topology::flat(vcpus).unwrap();
    MachineDesc {
        map,
        topology,
        present_vcpus,
        last_pci_bus: 0,
        serial: true,
        pvpanic: true,
    }
}

fn map() -> MemoryMap {
    MemoryMap::plan(256 << 20, 40).unwrap()
}

fn by_name(tables: &AcpiTables) -> BTreeMap<&str, &GuestBlob> {
    tables.blobs.iter().map(|blob| (blob.name, blob)).collect()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

#[test]
fn tables_point_at_each_other_and_add_up() {
    let map = map();
    let tables = describe(&machine(&map, 4, 2)).unwrap();
    let found = by_name(&tables);
    let (vector, tables_only) = tables.blobs.split_last().unwrap();
    assert_eq!((vector.name, vector.gpa), ("reset vector", 0xf_fff0));
    assert!(vector.bytes.len() <= 16, "it ends at 1 MiB");
    for blob in tables_only {
        let span = Span::new(blob.gpa, blob.bytes.len() as u64).unwrap();
        assert!(ACPI_AREA.covers(&span), "{} at {span}", blob.name);
        assert_eq!(blob.gpa % 16, 0);
        assert_eq!(sum(&blob.bytes), 0, "{}", blob.name);
        if blob.name != "RSDP" {
            assert_eq!(
                u32_at(&blob.bytes, 4) as usize,
                blob.bytes.len(),
                "{}",
                blob.name
            );
        }
    }
    let rsdp = found["RSDP"];
    assert_eq!((rsdp.gpa, tables.rsdp), (0xe_0000, 0xe_0000));
    assert_eq!(&rsdp.bytes[..8], b"RSD PTR ");
    assert_eq!((rsdp.bytes[15], sum(&rsdp.bytes[..20])), (2, 0));
    assert_eq!(u64_at(&rsdp.bytes, 24), found["XSDT"].gpa);
    let entries: Vec<_> = (36..60)
        .step_by(8)
        .map(|at| u64_at(&found["XSDT"].bytes, at))
        .collect();
    assert_eq!(
        entries,
        ["FADT", "MADT", "MCFG"].map(|name| found[name].gpa)
    );
    assert_eq!(u64_at(&found["FADT"].bytes, 140), found["DSDT"].gpa);
    assert_eq!(u64_at(&found["MCFG"].bytes, 44), 0xe000_0000);
    assert_eq!(found["MCFG"].bytes[54..56], [0, 0], "first and last bus");
}

#[test]
fn the_fadt_tells_a_hardware_reduced_machine() {
    let map = map();
    let tables = describe(&machine(&map, 1, 1)).unwrap();
    let fadt = &by_name(&tables)["FADT"].bytes;
    assert_eq!((fadt.len(), fadt[8], fadt[131]), (276, 6, 5));
    let flags = u32_at(fadt, 112);
    assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
    assert_eq!(fadt[109] & 1 << 1, 0, "no keyboard controller");
    let register = |at: usize| (fadt[at], fadt[at + 1], fadt[at + 3], u64_at(fadt, at + 4));
    assert_eq!(register(116), (1, 8, 1, u64::from(port::RESET)));
    assert_eq!(register(244), (1, 8, 1, u64::from(port::SLEEP_CONTROL)));
    assert_eq!(register(256), (1, 8, 1, u64::from(port::SLEEP_STATUS)));
}

/// Type, APIC id, flags, UID of the processors of a MADT.
fn processors(madt: &[u8]) -> Vec<(u8, u32, u32, u32)> {
    let mut found = Vec::new();
    let mut rest = &madt[44..];
    while let [kind, length, ..] = *rest {
        let (entry, after) = rest.split_at(usize::from(length));
        match kind {
            0 => found.push((0, entry[3].into(), u32_at(entry, 4), entry[2].into())),
            9 => found.push((9, u32_at(entry, 4), u32_at(entry, 8), u32_at(entry, 12))),
            _ => {}
        }
        rest = after;
    }
    found
}

#[test]
fn absent_processors_are_online_capable() {
    let map = map();
    let tables = describe(&machine(&map, 3, 2)).unwrap();
    let found = processors(&by_name(&tables)["MADT"].bytes);
    assert_eq!(found, [(0, 0, 1, 0), (0, 1, 1, 1), (0, 2, 2, 2)]);
}

#[test]
fn wide_apic_ids_are_x2apic_entries() {
    let map = map();
    let topology = Topology::new(3, 1, 65, 1).unwrap();
    let whole = MachineDesc {
        topology,
        present_vcpus: 195,
        ..machine(&map, 1, 1)
    };
    let tables = describe(&whole).unwrap();
    let found = processors(&by_name(&tables)["MADT"].bytes);
    assert_eq!(found.len(), 195);
    assert_eq!(found[65], (0, 128, 1, 65));
    assert_eq!(found[130], (9, 256, 1, 130));
    assert_eq!(found[194], (9, 320, 1, 194));
}

#[test]
fn the_largest_machine_fits_below_1_mib() {
    let map = MemoryMap::plan(1 << 40, 52).unwrap();
    describe(&machine(&map, 254, 254)).unwrap();
}

#[test]
fn impossible_counts_are_refused() {
    let map = map();
    for present in [0, 5] {
        let error = DescribeError::Present { present, vcpus: 4 };
        assert_eq!(describe(&machine(&map, 4, present)), Err(error));
    }
}

fn iasl(directory: &Path, arguments: &[&str]) -> Option<Output> {
    match Command::new("iasl")
        .args(arguments)
        .current_dir(directory)
        .output()
    {
        Ok(output) => Some(output),
        Err(error) => {
            println!("Skipped: iasl does not run ({error}); install acpica-tools");
            None
        }
    }
}

/// Every table survives disassembly and recompilation by ACPICA without a complaint, byte for
/// byte (but for the compiler's own id in the header).
#[test]
fn acpica_reads_what_we_wrote() {
    let narrow = map();
    let wide = MemoryMap::plan(1 << 40, 52).unwrap();
    for whole in [machine(&narrow, 1, 1), machine(&wide, 254, 250)] {
        let tables = describe(&whole).unwrap();
        let directory = tempfile::tempdir().unwrap();
        for blob in tables
            .blobs
            .iter()
            .filter(|blob| !["RSDP", "reset vector"].contains(&blob.name))
        {
            let path = |extension: &str| format!("{}.{extension}", blob.name);
            std::fs::write(directory.path().join(path("dat")), &blob.bytes).unwrap();
            let Some(out) = iasl(directory.path(), &["-d", &path("dat")]) else {
                return;
            };
            assert!(out.status.success(), "{}: {out:?}", blob.name);
            let Some(out) = iasl(directory.path(), &["-oa", &path("dsl")]) else {
                return;
            };
            let text = String::from_utf8_lossy(&out.stdout).into_owned()
                + &String::from_utf8_lossy(&out.stderr);
            assert!(out.status.success(), "{}: {text}", blob.name);
            if blob.name == "DSDT" {
                assert!(text.contains("0 Errors, 0 Warnings"), "{text}");
            }
            let again = std::fs::read(directory.path().join(path("aml"))).unwrap();
            assert_eq!(again.len(), blob.bytes.len(), "{}", blob.name);
            assert!(again[36..] == blob.bytes[36..], "{} differs", blob.name);
        }
    }
}
