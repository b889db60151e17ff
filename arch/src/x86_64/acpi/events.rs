//! The generic event device (ACPI 6.5 §5.6.9) and the power button it notifies.
//!
//! The VMM sets bits in the pending-events register and raises the line; the guest's `_EVT` reads
//! the register, which clears it, and notifies the devices the bits stand for.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If,
    Interrupt, Local, Method, Name, Notify, OpRegion, OpRegionSpace, Path, ResourceTemplate, Store,
    ZERO,
};

use crate::x86_64::layout::{ged_event, gsi, port};

/// The button was pressed while the machine runs (ACPI 6.5 §5.6.6, table 5.169).
const BUTTON_PRESSED: u8 = 0x80;

pub(super) fn devices(to: &mut Vec<u8>) {
    Device::new(
        "PWRB".into(),
        vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C"))],
    )
    .to_aml_bytes(to);

    let pending = Path::new("PEND");
    Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(true, true, false, false, gsi::GED)]),
            ),
            &OpRegion::new(
                "GEDR".into(),
                OpRegionSpace::SystemIO,
                &port::GED_EVENTS,
                &4u8,
            ),
            &Field::new(
                "GEDR".into(),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"PEND", 32)],
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &Store::new(&Local(0), &pending),
                    &If::new(
                        &And::new(&ZERO, &Local(0), &ged_event::POWER_BUTTON),
                        vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &BUTTON_PRESSED)],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(to);
}
