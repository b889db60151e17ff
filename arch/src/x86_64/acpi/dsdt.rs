//! The differentiated description table: the ACPI namespace, all of it static.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope,
};

use super::{DescribeError, MachineDesc, events, low_span, pci, processors};
use crate::x86_64::layout::{S5_SLEEP_TYPE, gsi, port};

pub(super) fn body(machine: &MachineDesc<'_>) -> Result<Vec<u8>, DescribeError> {
    let mut devices = Vec::new();
    motherboard(machine, &mut devices)?;
    pci::host_bridge(machine, &mut devices)?;
    if machine.serial {
        serial(&mut devices);
    }
    clock(&mut devices);
    if machine.pvpanic {
        pvpanic(&mut devices);
    }
    events::devices(&mut devices);
    processors::devices(machine, &mut devices);

    let mut body = Scope::raw(Path::new("\\_SB_"), devices);
    // The type goes to SLP_TYP of the one sleep control register there is.
    let soft_off = Package::new(vec![&S5_SLEEP_TYPE, &S5_SLEEP_TYPE, &0u8, &0u8]);
    Name::new("_S5_".into(), &soft_off).to_aml_bytes(&mut body);
    Ok(body)
}

/// Resources of no other device: configuration space, and the ACPI registers.
fn motherboard(machine: &MachineDesc<'_>, to: &mut Vec<u8>) -> Result<(), DescribeError> {
    let (base, size) = low_span("ECAM", machine.map.ecam())?;
    Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, base, size),
                    &io(port::ACPI, port::ACPI_SIZE),
                ]),
            ),
        ],
    )
    .to_aml_bytes(to);
    Ok(())
}

fn serial(to: &mut Vec<u8>) {
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &io(port::SERIAL, port::SERIAL_SIZE),
                    &Interrupt::new(true, true, false, false, gsi::SERIAL),
                ]),
            ),
        ],
    )
    .to_aml_bytes(to);
}

/// The CMOS clock: it tells the time and raises no interrupt.
fn clock(to: &mut Vec<u8>) {
    Device::new(
        "RTC_".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&io(port::CMOS, 2)]),
            ),
        ],
    )
    .to_aml_bytes(to);
}

fn pvpanic(to: &mut Vec<u8>) {
    Device::new(
        "PVPN".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&io(port::PVPANIC, 1)]),
            ),
        ],
    )
    .to_aml_bytes(to);
}

/// Fixed ports; no range here is longer than 255.
pub(super) fn io(base: u16, ports: u16) -> IO {
    IO::new(base, base, 1, u8::try_from(ports).unwrap_or(u8::MAX))
}
