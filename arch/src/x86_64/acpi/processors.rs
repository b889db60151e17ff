//! A processor device for every CPU the guest may have (ACPI 6.5 §8.4); its UID is its index, as
//! in the MADT.

use acpi_tables::Aml;
use acpi_tables::aml::{Device, Name, Path};

use super::MachineDesc;

/// `_STA`: present, enabled, shown, working.
const PRESENT: u8 = 0xf;
/// `_STA`: not there.
const ABSENT: u8 = 0;

pub(super) fn devices(machine: &MachineDesc<'_>, to: &mut Vec<u8>) {
    for index in 0..machine.topology.vcpus() {
        let status = if index < machine.present_vcpus {
            PRESENT
        } else {
            ABSENT
        };
        Device::new(
            Path::new(&format!("C{index:03X}")),
            vec![
                &Name::new("_HID".into(), &"ACPI0007"),
                &Name::new("_UID".into(), &index),
                &Name::new("_STA".into(), &status),
            ],
        )
        .to_aml_bytes(to);
    }
}
