//! The fixed description table: what the machine lacks, how it sleeps and how it is reset.

use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::x86_64::layout::{RESET_VALUE, port};

/// IA-PC boot architecture (ACPI 6.5 table 5.10): there are user-visible devices on the ISA bus
/// (the serial port).
const LEGACY_DEVICES: u16 = 1 << 0;
/// There is no VGA. Two bits stay 0 on purpose: there is no keyboard controller to probe (the
/// i8042's reset command works, no more), and "no CMOS RTC" would be untrue.
const NO_VGA: u16 = 1 << 2;

/// What the guest may rely on; the power and sleep buttons and the RTC have no fixed registers.
const FLAGS: [Flags; 8] = [
    Flags::Wbinvd,
    Flags::ProcC1,
    Flags::PwrButton,
    Flags::SlpButton,
    Flags::FixRtc,
    Flags::ResetRegSup,
    Flags::Headless,
    Flags::HwReducedAcpi,
];

pub(super) fn table(dsdt: u64) -> FADT {
    let mut table = FLAGS.into_iter().fold(
        FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
            .preferred_pm_profile(PmProfile::EnterpriseServer)
            .dsdt_64(dsdt),
        FADTBuilder::flag,
    );
    table.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA).into();
    table.reset_reg = register(port::RESET);
    table.reset_value = RESET_VALUE;
    table.sleep_control_reg = register(port::SLEEP_CONTROL);
    table.sleep_status_reg = register(port::SLEEP_STATUS);
    table.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    table.finalize()
}

/// An 8-bit register at an I/O port.
fn register(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(port),
    )
}
