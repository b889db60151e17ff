//! KVM's own leaves: the signature, the paravirtual features and the frequencies.

use super::table::CpuidTable;
use super::{KVM_APIC_BUS_KHZ, Subject};

const SIGNATURE: u32 = 0x4000_0000;
const FEATURES: u32 = 0x4000_0001;
const TIMING: u32 = 0x4000_0010;

/// Features KVM may offer that this machine does not: the MMU hypercall (long gone), the three of
/// asynchronous page faults (guest RAM is not swapped, and a snapshot would have to carry them),
/// and the two of confidential guests.
const WITHHELD: u32 = 1 << 2 | 1 << 4 | 1 << 10 | 1 << 14 | 1 << 16 | 1 << 17;

pub(super) fn apply(table: &mut CpuidTable, subject: &Subject) {
    table.change(FEATURES, |leaf| leaf.eax &= !WITHHELD);
    if table.get(SIGNATURE, 0).is_none() {
        return;
    }
    let Some(tsc_khz) = subject.request.tsc_khz else {
        return;
    };
    table.replace(TIMING, &[[tsc_khz, KVM_APIC_BUS_KHZ, 0, 0]]);
    table.change(SIGNATURE, |leaf| leaf.eax = leaf.eax.max(TIMING));
}
