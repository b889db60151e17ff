//! The machine in ACPI tables: hardware-reduced (ACPI 6.5 §4.1), so there is no SCI, no PM timer
//! and no fixed power button; events come through a generic event device.
//!
//! ```text
//! RSDP ─► XSDT ─► FADT ─► DSDT: PCI host bridge, GED, serial, RTC, pvpanic, processors
//!              ├► MADT: LAPICs, IOAPIC
//!              └► MCFG: ECAM
//! ```
//!
//! All tables stand in the read-only firmware area below 1 MiB. The VMM calls [`describe`] once,
//! before the first vCPU runs.

mod dsdt;
mod events;
mod fadt;
mod madt;
mod pci;
mod processors;

use acpi_tables::{Aml, mcfg::MCFG, rsdp::Rsdp, sdt::Sdt, xsdt::XSDT};
use thiserror::Error;

use super::layout;
use super::map::MemoryMap;
use super::reset_vector;
use super::topology::Topology;
use crate::{BlobArea, BlobAreaError, GuestBlob, Span};

const OEM_ID: [u8; 6] = *b"TSTUDO";
const OEM_TABLE_ID: [u8; 8] = *b"TESTUDO ";
const OEM_REVISION: u32 = 1;
/// Length of the header every table but the RSDP starts with.
const HEADER: u32 = 36;
/// Tables start on this boundary.
const ALIGN: u64 = 16;

/// What the tables describe. Ports and interrupt lines are the constants of
/// [`super::layout::port`] and [`super::layout::gsi`].
#[derive(Debug, Clone, Copy)]
pub struct MachineDesc<'a> {
    /// Where everything is.
    pub map: &'a MemoryMap,
    /// All CPUs the guest may ever have.
    pub topology: Topology,
    /// How many of them are there at boot: those with the lowest indices.
    pub present_vcpus: u16,
    /// The highest PCI bus number. Linux looks at every slot of every bus it is told of, one exit
    /// each: tell it of no more buses than there may be.
    pub last_pci_bus: u8,
    /// The serial port is there.
    pub serial: bool,
    /// The pvpanic port is there.
    pub pvpanic: bool,
}

/// The tables, ready to be put into guest RAM, and with them the code at the reset vector that a
/// hardware-reduced machine needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiTables {
    /// Address of the RSDP, for `boot_params.acpi_rsdp_addr` and PVH's `rsdp_paddr`.
    pub rsdp: u64,
    /// The tables and the reset vector.
    pub blobs: Vec<GuestBlob>,
}

/// Why there are no tables.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DescribeError {
    /// More CPUs are present than the topology has, or none is.
    #[error("{present} CPUs are present in a topology of {vcpus}: give between 1 and {vcpus}")]
    Present {
        /// CPUs present.
        present: u16,
        /// CPUs of the topology.
        vcpus: u16,
    },
    /// Too large for the firmware area.
    #[error("ACPI tables are too large")]
    NoRoom(#[from] BlobAreaError),
    /// A span of the map cannot be told in a 32-bit field.
    #[error("{name} at {span} does not lie below 4 GiB: ACPI cannot describe it so")]
    Above4Gib {
        /// What lies there.
        name: &'static str,
        /// Where.
        span: Span,
    },
}

/// The tables of a machine.
pub fn describe(machine: &MachineDesc<'_>) -> Result<AcpiTables, DescribeError> {
    let (present, vcpus) = (machine.present_vcpus, machine.topology.vcpus());
    if present == 0 || present > vcpus {
        return Err(DescribeError::Present { present, vcpus });
    }

    let rsdp = layout::ACPI_AREA.base();
    let rest = Span::between(rsdp + 64, layout::ACPI_AREA.end());
    let mut area = BlobArea::new(rest.unwrap_or(layout::ACPI_AREA));
    let mut place = |name, bytes| area.place(name, ALIGN, bytes);

    let dsdt = place("DSDT", table(*b"DSDT", 2, &dsdt::body(machine)?))?;
    let fadt = place("FADT", bytes(&fadt::table(dsdt)))?;
    let madt = place(
        "MADT",
        table(*b"APIC", madt::REVISION, &madt::body(machine)),
    )?;
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(machine.map.ecam().base(), 0, 0, machine.last_pci_bus);
    let mcfg = place("MCFG", bytes(&mcfg))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for address in [fadt, madt, mcfg] {
        xsdt.add_entry(address);
    }
    let xsdt = place("XSDT", bytes(&xsdt))?;

    let mut blobs = area.into_blobs();
    let pointer = bytes(&Rsdp::new(OEM_ID, xsdt));
    blobs.push(GuestBlob {
        name: "RSDP",
        gpa: rsdp,
        bytes: pointer,
    });
    blobs.push(reset_vector::blob());
    Ok(AcpiTables { rsdp, blobs })
}

fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = Sdt::new(
        signature,
        HEADER,
        revision,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(body);
    table.as_slice().to_vec()
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Base and size of a span that must lie below 4 GiB.
fn low_span(name: &'static str, span: Span) -> Result<(u32, u32), DescribeError> {
    match (
        u32::try_from(span.base()),
        u32::try_from(span.last()),
        u32::try_from(span.size()),
    ) {
        (Ok(base), Ok(_), Ok(size)) => Ok((base, size)),
        _ => Err(DescribeError::Above4Gib { name, span }),
    }
}

#[cfg(test)]
mod tests;
