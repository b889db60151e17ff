//! The PCI host bridge: segment 0, its windows, its interrupt lines and what the guest may take
//! over from the firmware there is not (PCI Firmware 3.3 §4.5).

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    If, Local, Method, Name, NotEqual, Or, Package, PackageBuilder, Path, ResourceTemplate, Return,
    Store, Uuid,
};
use acpi_tables::{Aml, AmlSink};

use super::dsdt::io;
use super::{DescribeError, MachineDesc, low_span};
use crate::x86_64::layout::{PCI_SLOTS, gsi, port};

/// `_OSC` of a PCI host bridge.
const OSC_UUID: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
/// What the guest gets control of: native hot plug (bit 0), PME (2), AER (3) and the PCI Express
/// capability structure (4). There is no SHPC (1).
const OSC_GRANTED: u32 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 4;
/// `_OSC` results: unknown UUID, unknown revision, some capability was masked.
const OSC_BAD_UUID: u32 = 1 << 2;
const OSC_BAD_REVISION: u32 = 1 << 3;
const OSC_MASKED: u32 = 1 << 4;

pub(super) fn host_bridge(
    machine: &MachineDesc<'_>,
    to: &mut Vec<u8>,
) -> Result<(), DescribeError> {
    Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &0u8),
            &Name::new("_BBN".into(), &0u8),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CBA".into(), &machine.map.ecam().base()),
            &windows(machine)?,
            &Name::new("_PRT".into(), &interrupt_lines()),
            &Osc,
        ],
    )
    .to_aml_bytes(to);
    Ok(())
}

/// `_CRS`: the buses, all ports but those of configuration mechanism 1, and the two memory
/// windows.
fn windows(machine: &MachineDesc<'_>) -> Result<Name, DescribeError> {
    let config = port::PCI_CONFIG;
    let after_config = config + port::PCI_CONFIG_SIZE;
    let (low, low_size) = low_span("32-bit PCI window", machine.map.mmio32())?;
    let high = machine.map.mmio64();
    let uncached = AddressSpaceCacheable::NotCacheable;
    Ok(Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![
            &AddressSpace::new_bus_number(0u16, machine.last_pci_bus.into()),
            &io(config, port::PCI_CONFIG_SIZE),
            &AddressSpace::new_io(0u16, config - 1, None),
            &AddressSpace::new_io(after_config, u16::MAX, None),
            &AddressSpace::new_memory(uncached, true, low, low + (low_size - 1), None),
            &AddressSpace::new_memory(uncached, true, high.base(), high.last(), None),
        ]),
    ))
}

/// `_PRT`: each pin of each slot goes straight to an IOAPIC pin (ACPI 6.5 §6.2.13).
fn interrupt_lines() -> PackageBuilder {
    let mut table = PackageBuilder::new();
    for slot in 0..PCI_SLOTS {
        for pin in 0..4 {
            let every_function = u32::from(slot) << 16 | 0xffff;
            let line = gsi::pci_intx(slot, pin);
            table.add_element(&Package::new(vec![&every_function, &pin, &0u8, &line]));
        }
    }
    table
}

/// `_OSC(UUID, revision, count, capabilities)`: answers the capabilities with those granted.
struct Osc;

impl Aml for Osc {
    fn to_aml_bytes(&self, to: &mut dyn AmlSink) {
        let status = Path::new("CDW1");
        let control = Path::new("CDW3");
        Method::new(
            "_OSC".into(),
            4,
            false,
            vec![
                &CreateDWordField::new(&status, &Arg(3), &0u8),
                &If::new(
                    &Equal::new(&Arg(0), &Uuid::new(OSC_UUID)),
                    vec![
                        &CreateDWordField::new(&control, &Arg(3), &8u8),
                        &And::new(&Local(0), &control, &OSC_GRANTED),
                        &If::new(
                            &NotEqual::new(&Arg(1), &1u8),
                            vec![&Or::new(&status, &status, &OSC_BAD_REVISION)],
                        ),
                        &If::new(
                            &NotEqual::new(&control, &Local(0)),
                            vec![&Or::new(&status, &status, &OSC_MASKED)],
                        ),
                        &Store::new(&control, &Local(0)),
                    ],
                ),
                &Else::new(vec![&Or::new(&status, &status, &OSC_BAD_UUID)]),
                &Return::new(&Arg(3)),
            ],
        )
        .to_aml_bytes(to);
    }
}
