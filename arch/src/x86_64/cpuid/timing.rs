//! Frequencies, so that a kernel need not measure them: Intel's leaves 0x15 and 0x16.
//!
//! Leaf 0x15 tells a crystal and a ratio. Here the crystal is the TSC itself (or half of it,
//! where 32 bits of Hz are too few), so that the TSC's frequency is exact. Linux also takes the
//! crystal for the clock of the LAPIC timer, which it is not; therefore the leaf is only there
//! together with TSC-deadline mode, which makes that guess moot. AMD has no such leaves: there
//! the hypervisor leaf tells.

use super::table::CpuidTable;
use super::{Subject, Vendor};

/// Bus frequency told in leaf 0x16; only shown to people.
const BUS_MHZ: u32 = 100;

pub(super) fn apply(table: &mut CpuidTable, subject: &Subject) {
    table.remove(0x15);
    table.remove(0x16);
    let request = &subject.request;
    let Some(tsc_khz) = request.tsc_khz else {
        return;
    };
    if subject.vendor != Vendor::Intel || !request.tsc_deadline {
        return;
    }
    let multiple = if tsc_khz.checked_mul(1000).is_some() {
        1
    } else {
        2
    };
    if let Some(crystal_hz) = (tsc_khz / multiple).checked_mul(1000) {
        table.replace(0x15, &[[1, multiple, crystal_hz, 0]]);
        let mhz = (tsc_khz / 1000).min(0xffff);
        table.replace(0x16, &[[mhz, mhz, BUS_MHZ, 0]]);
    }
}
