//! The plan: everything decided before anything is acquired. Pure and printable.

use std::collections::BTreeMap;

use serde::Serialize;
use testudo_arch::Span;
use testudo_arch::x86_64::acpi::{self, AcpiTables, DescribeError, MachineDesc};
use testudo_arch::x86_64::layout::{gsi, port};
use testudo_arch::x86_64::mtrr::{self, MtrrError, MtrrPlan};
use testudo_arch::x86_64::{MapError, MapRequest, MemoryMap, Topology};
use testudo_boot::{Cmdline, CmdlineError};
use testudo_legacy::I6300Esb;
use testudo_pci::Bdf;
use thiserror::Error;
use virtio_devices::VirtioPci;
use vm_allocator::{AddressAllocator, AllocPolicy};

use crate::devices::{DeviceError, Space};
use crate::host::HostFacts;
use crate::spec::Spec;

/// The root bus's own function.
pub(crate) const HOST_BRIDGE: &str = "host-bridge";
/// The watchdog.
pub(crate) const WATCHDOG: &str = "i6300esb";

/// Highest PCI bus number: there is no bridge yet to put a bus behind.
const LAST_BUS: u8 = 0;

/// What will be built.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// The host it was planned for.
    pub host: HostFacts,
    /// Guest-physical address space.
    pub memory: MemoryMap,
    /// Memory types, the same for every vCPU.
    pub mtrr: MtrrPlan,
    /// vCPUs.
    pub cpus: Vec<CpuPlan>,
    /// Devices at fixed places.
    pub platform: Vec<PlatformPlan>,
    /// PCI functions.
    pub pci: Vec<PciPlan>,
    /// Firmware tables by name.
    pub acpi: BTreeMap<&'static str, Span>,
    /// Kernel command line.
    pub cmdline: String,
    #[serde(skip)]
    pub(crate) tables: AcpiTables,
    #[serde(skip)]
    pub(crate) topology: Topology,
    #[serde(skip)]
    pub(crate) parsed_cmdline: Cmdline,
}

/// One vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CpuPlan {
    /// Index, from 0.
    pub index: u16,
    /// APIC id.
    pub apic_id: u32,
    /// Host CPUs its thread is bound to, as a list.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_cpus: Option<String>,
}

/// A device at a fixed place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlatformPlan {
    /// What it is.
    pub device: &'static str,
    /// First port.
    pub port: u16,
    /// Ports.
    pub ports: u16,
    /// Interrupt line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gsi: Option<u32>,
}

/// A PCI function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PciPlan {
    /// Bus, device and function.
    #[serde(serialize_with = "display")]
    pub bdf: Bdf,
    /// What it is.
    pub device: &'static str,
    /// The device's id, if it is one of the configuration's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// BARs by index.
    pub bars: BTreeMap<u8, Span>,
    /// Guest memory of the device's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Span>,
}

fn display<S: serde::Serializer>(bdf: &Bdf, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(bdf)
}

/// No machine can be planned.
#[derive(Debug, Error)]
pub enum PlanError {
    /// The host runs fewer vCPUs.
    #[error("{vcpus} vCPUs: this host's KVM allows {max}")]
    TooManyVcpus {
        /// Asked for.
        vcpus: u16,
        /// What the host allows.
        max: u32,
    },
    /// The host knows no such CPU ids.
    #[error(
        "the CPU topology needs ids up to {id}: this host's KVM allows ids below {max}; use fewer sockets, or powers of two"
    )]
    VcpuId {
        /// Highest id.
        id: u32,
        /// What the host allows.
        max: u32,
    },
    /// A wider address than the host maps.
    #[error("{bits} physical address bits: this host's KVM maps {max}")]
    PhysBits {
        /// Asked for.
        bits: u8,
        /// What the host maps.
        max: u8,
    },
    /// The address space.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Memory types.
    #[error(transparent)]
    Mtrr(#[from] MtrrError),
    /// Firmware tables.
    #[error("firmware tables")]
    Describe(#[from] DescribeError),
    /// Command line.
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    /// The 64-bit PCI window is full.
    #[error(
        "no room for BAR {bar} of {device} ({size:#x} bytes) in the 64-bit PCI window {window}; raise --phys-bits"
    )]
    NoBarRoom {
        /// The function.
        device: &'static str,
        /// BAR index.
        bar: u8,
        /// Bytes.
        size: u64,
        /// The window.
        window: Span,
    },
    /// The space behind guest RAM is full.
    #[error(
        "no room for {size:#x} bytes of {device} behind guest RAM; raise --phys-bits or make it smaller"
    )]
    NoMemoryRoom {
        /// The function.
        device: &'static str,
        /// Bytes.
        size: u64,
    },
    /// A device whose needs are not known.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The root bus is full.
    #[error("no PCI slot left for {device}: the root bus has 32")]
    NoSlot {
        /// The function.
        device: &'static str,
    },
}

impl Plan {
    /// Plans the machine `spec` describes on `host`.
    pub fn new(spec: &Spec, host: HostFacts) -> Result<Self, PlanError> {
        let topology = spec.cpus.topology;
        let spaces: Vec<Space> = spec
            .devices
            .iter()
            .map(|device| device.space())
            .collect::<Result<_, _>>()?;
        let phys_bits = check_host(spec, &host)?;
        let memory = MemoryMap::plan_with(&MapRequest {
            ram_bytes: spec.memory.size,
            guest_phys_bits: phys_bits,
            hotplug_bytes: device_memory(&spaces),
        })?;
        let mtrr = mtrr::plan(&memory, phys_bits, host.mtrr_slots)?;
        let tables = acpi::describe(&MachineDesc {
            map: &memory,
            topology,
            present_vcpus: topology.vcpus(),
            last_pci_bus: LAST_BUS,
            serial: true,
            pvpanic: true,
        })?;
        let acpi = tables
            .blobs
            .iter()
            .filter_map(|b| {
                let size = u64::try_from(b.bytes.len()).ok()?;
                Some((b.name, Span::new(b.gpa, size)?))
            })
            .collect();
        let parsed_cmdline = Cmdline::new(&spec.boot.cmdline)?;
        Ok(Self {
            host,
            mtrr,
            cpus: cpus(spec),
            platform: platform(),
            pci: pci(spec, &spaces, &memory)?,
            acpi,
            cmdline: parsed_cmdline.as_str().to_owned(),
            memory,
            tables,
            topology,
            parsed_cmdline,
        })
    }
}

/// What the host cannot do, and the address width if it can.
fn check_host(spec: &Spec, host: &HostFacts) -> Result<u8, PlanError> {
    let topology = spec.cpus.topology;
    let vcpus = topology.vcpus();
    if u32::from(vcpus) > host.max_vcpus {
        let max = host.max_vcpus;
        return Err(PlanError::TooManyVcpus { vcpus, max });
    }
    let id = topology.max_apic_id();
    if id >= host.max_vcpu_id {
        let max = host.max_vcpu_id;
        return Err(PlanError::VcpuId { id, max });
    }
    let max = host.guest_phys_bits;
    match spec.cpus.phys_bits {
        Some(bits) if bits > max => Err(PlanError::PhysBits { bits, max }),
        Some(bits) => Ok(bits),
        None => Ok(max),
    }
}

fn cpus(spec: &Spec) -> Vec<CpuPlan> {
    (0..)
        .zip(spec.cpus.topology.apic_ids())
        .map(|(index, apic_id)| CpuPlan {
            index,
            apic_id,
            host_cpus: spec
                .cpus
                .affinity
                .iter()
                .find(|a| a.cpu == index)
                .map(|a| a.host.to_string()),
        })
        .collect()
}

fn platform() -> Vec<PlatformPlan> {
    let at = |device, port, ports, gsi| PlatformPlan {
        device,
        port,
        ports,
        gsi,
    };
    vec![
        at("i8042", port::I8042, 1, None),
        at("system-control", 0x61, 1, None),
        at("i8042-command", port::I8042 + 4, 1, None),
        at("cmos", port::CMOS, 2, None),
        at("debug-port", port::DEBUG, 1, None),
        at("serial", port::SERIAL, port::SERIAL_SIZE, Some(gsi::SERIAL)),
        at("pvpanic", port::PVPANIC, 1, None),
        at("acpi", port::ACPI, port::ACPI_SIZE, Some(gsi::GED)),
        at("pci-config", port::PCI_CONFIG, port::PCI_CONFIG_SIZE, None),
    ]
}

/// Rooms of one kind for devices: the 64-bit PCI window, or the space behind guest RAM.
struct Room(Option<AddressAllocator>);

impl Room {
    fn new(span: Option<Span>) -> Self {
        Self(span.and_then(|s| AddressAllocator::new(s.base(), s.size()).ok()))
    }

    fn take(&mut self, size: u64, alignment: u64) -> Option<Span> {
        let room = self.0.as_mut()?;
        let range = room.allocate(size, alignment, AllocPolicy::FirstMatch);
        Span::new(range.ok()?.start(), size)
    }
}

fn pci(spec: &Spec, spaces: &[Space], map: &MemoryMap) -> Result<Vec<PciPlan>, PlanError> {
    let window = map.mmio64();
    let mut bar_room = Room::new(Some(window));
    let mut memory_room = Room::new(map.hotplug_ram());
    let mut functions = vec![PciPlan {
        bdf: Bdf::HOST_BRIDGE,
        device: HOST_BRIDGE,
        id: None,
        bars: BTreeMap::new(),
        memory: None,
    }];
    for (slot, (device, space)) in (1..).zip(spec.devices.iter().zip(spaces)) {
        let kind = device.kind();
        let bdf = Bdf::new(0, slot, 0).ok_or(PlanError::NoSlot { device: kind })?;
        let mut bars = BTreeMap::new();
        let wanted = [
            (VirtioPci::BAR, VirtioPci::BAR_SIZE),
            (VirtioPci::SHARED_BAR, space.shared_memory),
        ];
        for (bar, size) in wanted.into_iter().filter(|(_, size)| *size != 0) {
            let at = bar_room.take(size, size).ok_or(PlanError::NoBarRoom {
                device: kind,
                bar,
                size,
                window,
            })?;
            bars.insert(bar, at);
        }
        let memory = match space.guest_memory {
            0 => None,
            size => Some(
                memory_room
                    .take(size, space.alignment.max(1))
                    .ok_or(PlanError::NoMemoryRoom { device: kind, size })?,
            ),
        };
        functions.push(PciPlan {
            bdf,
            device: kind,
            id: Some(device.id().to_owned()),
            bars,
            memory,
        });
    }
    if spec.watchdog.is_some() {
        functions.push(watchdog(functions.len(), map)?);
    }
    Ok(functions)
}

/// The watchdog in `slot`; its BAR has 32 bits.
fn watchdog(slot: usize, map: &MemoryMap) -> Result<PciPlan, PlanError> {
    let device = WATCHDOG;
    let slot = u8::try_from(slot).map_err(|_| PlanError::NoSlot { device })?;
    let bdf = Bdf::new(0, slot, 0).ok_or(PlanError::NoSlot { device })?;
    let (bar, size, window) = (I6300Esb::BAR, I6300Esb::BAR_SIZE, map.mmio32());
    let at = Room::new(Some(window)).take(size, size);
    let at = at.ok_or(PlanError::NoBarRoom {
        device,
        bar,
        size,
        window,
    })?;
    Ok(PciPlan {
        bdf,
        device,
        id: None,
        bars: BTreeMap::from([(bar, at)]),
        memory: None,
    })
}

/// Bytes of guest address space to keep for the devices' own memory, alignment included.
fn device_memory(spaces: &[Space]) -> u64 {
    spaces.iter().fold(0, |sum, space| {
        sum.saturating_add(space.guest_memory)
            .saturating_add(space.alignment)
    })
}
