//! One KVM VM with everything on it: what a reset throws away and builds again.
//!
//! Built on the control thread in one pass, from what the plan says and files that were opened
//! before: nothing is opened here.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use testudo_arch::x86_64::cpuid::{self, CpuidError, CpuidRequest};
use testudo_arch::x86_64::host::{
    self as kvm_half, PrepareVcpuError, PrepareVmError, VcpuPlan, VmPlan,
};
use testudo_arch::x86_64::layout::{gsi, port};
use testudo_arch::x86_64::{BootState, VcpuState, boot_params};
use testudo_boot::x86_64::{BootProtocol, BootRequest, Entry, Leftovers, LoadError};
use testudo_boot::{BlobError, Image, write_blobs};
use testudo_bus::{Bus, Device, IrqError, Mailbox, MapError, Mapping, Range, Slot, Target};
use testudo_kvm::{
    Hypervisor, Interrupts, KvmDoorbells, LineError, MemslotError, Memslots, Vcpu, Vm, VmError,
};
use testudo_legacy::{
    AcpiRegisters, Cmos, DebugPort, GedHandle, I8042, Pvpanic, Serial, SystemControl,
};
use testudo_memory::{GuestRam, GuestWindows, RamError};
use testudo_pci::{Bdf, HostBridge, PlugError, Plugged, Segment};
use thiserror::Error;
use virtio_devices::{VirtioPciError, Wiring};

use crate::console::Console;
use crate::devices::{DeviceError, OpenDevice, Place};
use crate::host::Host;
use crate::letters::Letters;
use crate::plan::{PciPlan, Plan, WATCHDOG};
use crate::spec::{Protocol, Seccomp, Spec};
use crate::vcpu::{Guest, VcpuThread};
use crate::watchdog::WatchdogTimer;

/// The machine could not be built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// VM or vCPU.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// What the architecture sets up in the VM.
    #[error(transparent)]
    PrepareVm(#[from] PrepareVmError),
    /// What the architecture sets up in a vCPU.
    #[error("vCPU {index}")]
    PrepareVcpu {
        /// Its index.
        index: u16,
        /// Why.
        #[source]
        source: PrepareVcpuError,
    },
    /// A vCPU's CPUID.
    #[error("CPUID of vCPU {index}")]
    Cpuid {
        /// Its index.
        index: u16,
        /// Why.
        #[source]
        source: CpuidError,
    },
    /// Memslots.
    #[error(transparent)]
    Memslots(#[from] MemslotError),
    /// Guest RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// Interrupt routes.
    #[error(transparent)]
    Irq(#[from] IrqError),
    /// Interrupt lines.
    #[error(transparent)]
    Line(#[from] LineError),
    /// Two devices at one place: a defect of the plan.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A PCI function has no place.
    #[error(transparent)]
    Plug(#[from] PlugError),
    /// A device of the host's could not be made.
    #[error("cannot set up {what}")]
    Device {
        /// The guest's device.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// A virtio device's place on the bus.
    #[error(transparent)]
    Virtio(#[from] VirtioPciError),
    /// A device of the configuration's.
    #[error(transparent)]
    Configured(#[from] DeviceError),
    /// Firmware tables.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// Kernel.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A vCPU thread.
    #[error("cannot start the thread of vCPU {index}")]
    Thread {
        /// Its index.
        index: u16,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The configuration's devices by id.
pub(crate) type Devices = BTreeMap<String, Box<dyn OpenDevice>>;

/// What a board is built from; it outlives the board.
pub(crate) struct Parts<'a> {
    pub(crate) spec: &'a Spec,
    pub(crate) plan: &'a Plan,
    pub(crate) hypervisor: &'a Hypervisor,
    pub(crate) host: &'a Host,
    pub(crate) kernel: &'a Image,
    pub(crate) initrd: Option<&'a testudo_boot::Source>,
    /// As the plan's functions name them.
    pub(crate) devices: &'a Devices,
    pub(crate) letters: &'a Letters,
    pub(crate) io: &'a virtio_devices::IoThread,
    /// The watchdog ended the guest's last life.
    pub(crate) watchdog_fired: &'a Arc<AtomicBool>,
}

/// One VM. Fields are dropped in this order: first the vCPUs stop, then the devices go.
pub(crate) struct Board {
    vcpus: Vec<VcpuThread>,
    #[expect(dead_code, reason = "the guard of its timer's events")]
    watchdog: Option<WatchdogTimer>,
    functions: Vec<Plugged>,
    #[expect(dead_code, reason = "guards of the platform devices' ranges")]
    platform: Vec<Mapping>,
    pub(crate) ged: GedHandle,
    pub(crate) counters: crate::virtio::DeviceCounters,
    /// What loading left behind, to be dropped once the guest runs.
    pub(crate) leftovers: Option<Leftovers>,
    #[expect(dead_code, reason = "the VM goes after everything that is on it")]
    vm: Vm,
}

impl Board {
    /// Builds the board on `ram`, which gets its memslots, and connects `console`. All vCPU
    /// threads stand parked.
    pub(crate) fn build(
        parts: &Parts<'_>,
        ram: &mut GuestRam,
        console: &mut Console,
    ) -> Result<Self, BuildError> {
        let plan = parts.plan;
        let vm = parts.hypervisor.create_vm()?;
        kvm_half::prepare_vm(
            vm.fd(),
            &VmPlan {
                max_apic_id: plan.topology.max_apic_id(),
                pmu: false,
                pit: false,
                halt_in_guest: false,
            },
        )?;
        let slots = Memslots::new(&vm)?;
        ram.listen(slots.listener())?;
        log::debug!("the VM has its RAM");

        let buses = Guest {
            pio: Bus::new("I/O port"),
            mmio: Bus::new("memory"),
            letters: parts.letters.clone(),
        };
        let interrupts = Interrupts::new(&vm)?;
        let mut platform = Platform {
            pio: &buses.pio,
            held: Vec::new(),
        };
        let ged = platform.devices(parts.letters, &interrupts, console)?;

        let windows: Arc<dyn GuestWindows> = Arc::new(slots);
        let segment = Segment::new(buses.mmio.clone(), apertures(plan));
        platform.target(port::PCI_CONFIG, port::PCI_CONFIG_SIZE, segment.cf8())?;
        if let Some(ecam) = Range::new(plan.memory.ecam().base(), plan.memory.ecam().size()) {
            platform.held.push(buses.mmio.map(ecam, segment.ecam())?);
        }
        let mut counters = crate::virtio::DeviceCounters::default();
        let mut watchdog = None;
        let functions = plan
            .pci
            .iter()
            .map(|f| {
                let wiring = Wiring {
                    ram: ram.handle(),
                    msi: &interrupts,
                    doorbells: Arc::new(KvmDoorbells::new(&vm)),
                    windows: Arc::clone(&windows),
                };
                let extras = (&mut counters, &mut watchdog);
                plug(f, parts, &segment, wiring, extras)
            })
            .collect::<Result<_, _>>()?;

        for device in parts.devices.values() {
            if let Some(listener) = device.ram_listener() {
                ram.listen(listener)?;
            }
        }
        log::debug!("devices are in place");
        let (entry, leftovers) = load(parts, ram)?;
        log::debug!("the kernel is loaded");
        let platform = platform.held;
        let vcpus = vcpus(parts, &vm, &entry.vcpu, &buses)?;
        Ok(Self {
            vcpus,
            watchdog,
            functions,
            platform,
            ged,
            counters,
            leftovers: Some(leftovers),
            vm,
        })
    }

    pub(crate) fn vcpus(&self) -> &[VcpuThread] {
        &self.vcpus
    }

    /// Stops what the devices do by themselves; no vCPU runs.
    pub(crate) fn pause_devices(&self) {
        self.functions.iter().for_each(Plugged::pause);
    }

    /// Lets the devices go on, before the vCPUs do.
    pub(crate) fn resume_devices(&self) {
        self.functions.iter().for_each(Plugged::resume);
    }

    /// PCI functions in place.
    pub(crate) fn functions(&self) -> impl Iterator<Item = Bdf> {
        self.functions.iter().map(Plugged::bdf)
    }
}

struct Platform<'a> {
    pio: &'a Bus,
    held: Vec<Mapping>,
}

impl Platform<'_> {
    fn target(&mut self, port: u16, ports: u16, target: Arc<dyn Target>) -> Result<(), BuildError> {
        if let Some(range) = Range::new(port.into(), ports.into()) {
            self.held.push(self.pio.map(range, target)?);
        }
        Ok(())
    }

    fn device(
        &mut self,
        port: u16,
        ports: u16,
        device: impl Device + 'static,
    ) -> Result<(), BuildError> {
        let slot: Slot<dyn Device> = Slot::new(Box::new(device));
        self.target(port, ports, Arc::new(slot))
    }

    /// Everything at fixed ports but the PCI configuration mechanism.
    fn devices(
        &mut self,
        letters: &Letters,
        interrupts: &Interrupts,
        console: &mut Console,
    ) -> Result<GedHandle, BuildError> {
        let mailbox: Arc<dyn Mailbox> = Arc::new(letters.clone());
        let io = |what| move |source| BuildError::Device { what, source };

        let sink = console.sink().map_err(io("the serial port"))?;
        let line = interrupts.line(gsi::SERIAL)?;
        let (serial, handle) = Serial::new(line, sink).map_err(io("the serial port"))?;
        console.connect(handle);
        self.device(port::SERIAL, port::SERIAL_SIZE, serial)?;

        let i8042 = I8042::new(Arc::clone(&mailbox));
        self.target(port::I8042, 1, i8042.data_port())?;
        self.target(port::I8042 + 4, 1, i8042.command_port())?;
        self.device(0x61, 1, SystemControl::new())?;
        self.device(port::CMOS, 2, Cmos::new())?;
        self.device(port::DEBUG, 1, DebugPort::new(Arc::clone(&mailbox)))?;
        self.device(port::PVPANIC, 1, Pvpanic::new(Arc::clone(&mailbox)))?;
        let (acpi, ged) = AcpiRegisters::new(mailbox, interrupts.line(gsi::GED)?);
        self.device(port::ACPI, port::ACPI_SIZE, acpi)?;
        Ok(ged)
    }
}

fn apertures(plan: &Plan) -> Vec<Range> {
    [plan.memory.mmio32(), plan.memory.mmio64()]
        .iter()
        .filter_map(|s| Range::new(s.base(), s.size()))
        .collect()
}

fn plug(
    function: &PciPlan,
    parts: &Parts<'_>,
    segment: &Segment,
    wiring: Wiring<'_>,
    (counters, watchdog): (
        &mut crate::virtio::DeviceCounters,
        &mut Option<WatchdogTimer>,
    ),
) -> Result<Plugged, BuildError> {
    let device = function.id.as_ref();
    let device = device.and_then(|id| Some((id, parts.devices.get(id)?)));
    let device: Box<dyn testudo_pci::PciFunction> = match device {
        None if function.device == WATCHDOG => {
            let mailbox: Arc<dyn Mailbox> = Arc::new(parts.letters.clone());
            let io = parts.io.handle();
            let made = crate::watchdog::watchdog(mailbox, parts.watchdog_fired, &io);
            let (device, timer) = made.map_err(|source| BuildError::Device {
                what: "the watchdog",
                source,
            })?;
            *watchdog = Some(timer);
            Box::new(device)
        }
        None => Box::new(HostBridge::new()),
        Some((id, device)) => {
            let model = device.model(&Place {
                io: parts.io.handle(),
                windows: &wiring.windows,
                letters: parts.letters,
                memory: function.memory,
            })?;
            counters.function(id, model, wiring)?
        }
    };
    let bars: Vec<(u8, u64)> = function
        .bars
        .iter()
        .map(|(bar, at)| (*bar, at.base()))
        .collect();
    Ok(segment.plug(function.bdf, device, &bars)?)
}

/// Puts tables and kernel into guest RAM; returns the state the first vCPU starts in.
fn load(parts: &Parts<'_>, ram: &GuestRam) -> Result<(BootState, Leftovers), BuildError> {
    let view = ram.view();
    let e820: &[boot_params::E820Entry] = parts.plan.memory.e820();
    let mut layout = testudo_boot::x86_64::layout(&view, e820);
    write_blobs(&mut layout, &view, &parts.plan.tables.blobs)?;
    let loaded = testudo_boot::x86_64::load(
        &mut layout,
        &view,
        &BootRequest {
            kernel: parts.kernel,
            initrd: parts.initrd,
            cmdline: &parts.plan.parsed_cmdline,
            e820,
            rsdp: Some(parts.plan.tables.rsdp),
            protocol: match parts.spec.boot.protocol {
                Protocol::Auto => BootProtocol::Auto,
                Protocol::Linux64 => BootProtocol::Linux64,
                Protocol::Pvh => BootProtocol::Pvh,
            },
            ram_is_zero: true,
        },
    )?;
    let state = match loaded.entry {
        Entry::Linux64 { rip, boot_params } => {
            let gib_pages = cpuid::has_gib_pages(parts.host.capabilities.supported_cpuid());
            BootState::linux_64(rip, boot_params, gib_pages)
        }
        Entry::Pvh { eip, start_info } => BootState::pvh(eip, start_info),
    };
    write_blobs(&mut layout, &view, &state.blobs)?;
    Ok((state, loaded.leftovers))
}

fn vcpus(
    parts: &Parts<'_>,
    vm: &Vm,
    boot: &VcpuState,
    guest: &Guest,
) -> Result<Vec<VcpuThread>, BuildError> {
    parts
        .plan
        .cpus
        .iter()
        .map(|cpu| {
            let vcpu = vm.create_vcpu(cpu.apic_id.into())?;
            let index = cpu.index;
            prepare(parts, &vcpu, index, (index == 0).then_some(boot))?;
            let host_cpus = parts.spec.cpus.affinity.iter().find(|a| a.cpu == index);
            let host_cpus = host_cpus.map(|a| a.host.clone());
            let seccomp = parts.spec.seccomp;
            let first = Box::new(move || begin(host_cpus.as_ref(), seccomp));
            VcpuThread::spawn(index, vcpu, guest.clone(), first)
                .map_err(|source| BuildError::Thread { index, source })
        })
        .collect()
}

fn prepare(
    parts: &Parts<'_>,
    vcpu: &Vcpu,
    index: u16,
    boot: Option<&VcpuState>,
) -> Result<(), BuildError> {
    let leaves = cpuid::plan(
        parts.host.capabilities.supported_cpuid(),
        &CpuidRequest {
            topology: parts.plan.topology,
            index,
            guest_phys_bits: parts.plan.memory.guest_phys_bits(),
            tsc_khz: kvm_half::tsc_khz(vcpu.fd()),
            tsc_deadline: true,
            pmu: false,
            nested: false,
        },
    )
    .map_err(|source| BuildError::Cpuid { index, source })?;
    kvm_half::prepare_vcpu(
        vcpu.fd(),
        &VcpuPlan {
            cpuid: &leaves,
            mtrr: &parts.plan.mtrr,
            boot,
        },
    )
    .map_err(|source| BuildError::PrepareVcpu { index, source })
}

/// What a vCPU thread does before anything else.
fn begin(host_cpus: Option<&crate::spec::CpuList>, seccomp: Seccomp) -> io::Result<()> {
    if let Some(cpus) = host_cpus {
        crate::affinity::bind_this_thread(cpus)?;
    }
    crate::seccomp::apply(crate::seccomp::ThreadKind::VCPU, seccomp).map_err(io::Error::other)
}
