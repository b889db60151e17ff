//! The multiple APIC description table (ACPI 6.5 §5.2.12).

use super::MachineDesc;
use crate::x86_64::layout::{IOAPIC, LAPIC};

/// Revision of ACPI 6.3, the first with the online-capable flag.
pub(super) const REVISION: u8 = 5;

const TYPE_LAPIC: u8 = 0;
const TYPE_IOAPIC: u8 = 1;
const TYPE_LAPIC_NMI: u8 = 4;
const TYPE_X2APIC: u8 = 9;
const TYPE_X2APIC_NMI: u8 = 10;

const ENABLED: u32 = 1 << 0;
const ONLINE_CAPABLE: u32 = 1 << 1;
/// The LINT pin that non-maskable interrupts arrive at.
const NMI_LINT: u8 = 1;

/// Everything after the header. CPUs come in order of their index, which is their UID; those
/// that are not there yet are online-capable.
pub(super) fn body(machine: &MachineDesc<'_>) -> Vec<u8> {
    let mut body = Vec::new();
    let low = |address: u64| u32::try_from(address).unwrap_or_default().to_le_bytes();
    body.extend(low(LAPIC.base()));
    // No 8259s: their flag stays 0.
    body.extend(0u32.to_le_bytes());

    let mut any_wide = false;
    for (index, apic_id) in (0u16..).zip(machine.topology.apic_ids()) {
        let flags = if index < machine.present_vcpus {
            ENABLED
        } else {
            ONLINE_CAPABLE
        };
        match (u8::try_from(index), u8::try_from(apic_id)) {
            (Ok(uid), Ok(id @ 0..=254)) => {
                body.extend([TYPE_LAPIC, 8, uid, id]);
                body.extend(flags.to_le_bytes());
            }
            _ => {
                any_wide = true;
                body.extend([TYPE_X2APIC, 16, 0, 0]);
                body.extend(apic_id.to_le_bytes());
                body.extend(flags.to_le_bytes());
                body.extend(u32::from(index).to_le_bytes());
            }
        }
    }

    body.extend([TYPE_IOAPIC, 12, 0, 0]);
    body.extend(low(IOAPIC.base()));
    body.extend(0u32.to_le_bytes());

    let every_cpu = u8::MAX;
    body.extend([TYPE_LAPIC_NMI, 6, every_cpu, 0, 0, NMI_LINT]);
    if any_wide {
        body.extend([TYPE_X2APIC_NMI, 12, 0, 0]);
        body.extend(u32::MAX.to_le_bytes());
        body.extend([NMI_LINT, 0, 0, 0]);
    }
    body
}
