//! The machine: its RAM, its board, its console, its phase. Owned by the control thread.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use testudo_arch::x86_64::host::ProbeError;
use testudo_boot::{Image, KernelError};
use testudo_kvm::{Hypervisor, OpenError, install_kick_handler};
use testudo_legacy::ged;
use testudo_memory::{GuestRam, RamError};
use testudo_protocol::{Counters, CpuState, Info, MemoryState, Phase};
use thiserror::Error;
use virtio_devices::{Attachment, IoThread};

use crate::board::{Board, BuildError, Devices, Parts};
use crate::console::{Console, ConsoleOpenError};
use crate::devices::{Adjust, AdjustError, DeviceError, HostContext};
use crate::host::Host;
use crate::letters::{Letter, Letters};
use crate::plan::{Plan, PlanError};
use crate::seccomp::ThreadKind;
use crate::spec::{Source, SourceError, Spec};
use crate::vcpu::VcpuThread;

/// How long the console's reader may take nothing before its last output is given up.
const DRAIN_PATIENCE: Duration = Duration::from_secs(10);

/// The machine could not be started.
#[derive(Debug, Error)]
pub enum StartError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] OpenError),
    /// What KVM offers.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// A file.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// An image file.
    #[error(transparent)]
    Image(#[from] testudo_boot::SourceError),
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The console.
    #[error(transparent)]
    Console(#[from] ConsoleOpenError),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Guest RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The board.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The io thread.
    #[error(transparent)]
    Io(#[from] virtio_devices::SpawnError),
    /// Something of the host's that every VMM needs.
    #[error("cannot set up {what}")]
    Host {
        /// What.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// A vCPU does not leave the device access it is in.
#[derive(Debug, Error)]
#[error("vCPU {index} does not stop: a device access keeps it")]
pub(crate) struct StuckVcpu {
    /// Its index.
    pub(crate) index: u16,
}

type ConsoleEvents = Attachment<Arc<Mutex<Console>>>;

/// A built machine.
pub(crate) struct Machine {
    // Dropped first: the console's events stop before the board that feeds it goes.
    console_events: Option<ConsoleEvents>,
    board: Board,
    console: Arc<Mutex<Console>>,
    ram: GuestRam,
    letters: Letters,
    files: Files,
    io: IoThread,
    plan: Plan,
    spec: Spec,
    phase: Phase,
    started: Instant,
    first_run: Option<Duration>,
    resets: u32,
    mending: Mending,
}

/// How many pages had been mended when each vCPU failed last: one that fails again without any having
/// been mended meanwhile fails for another reason.
type Mending = BTreeMap<u16, u64>;

/// What was opened at start and is needed again when the guest boots again.
struct Files {
    hypervisor: Hypervisor,
    host: Host,
    kernel: Image,
    initrd: Option<testudo_boot::Source>,
    devices: Devices,
    watchdog_fired: Arc<AtomicBool>,
}

impl Files {
    fn open(spec: &Spec, letters: &Letters) -> Result<Self, StartError> {
        let hypervisor = open_kvm(&spec.kvm)?;
        let host = Host::probe(&hypervisor)?;
        let image = |source: &Source, what| -> Result<_, StartError> {
            let file = source.open(what)?;
            let name = format!("{what} {source}");
            Ok(testudo_boot::Source::from_file(&name, file)?)
        };
        let kernel = Image::identify(image(&spec.boot.kernel, "kernel")?)?;
        let initrd = spec.boot.initrd.as_ref();
        let initrd = initrd.map(|i| image(i, "initrd")).transpose()?;
        let context = HostContext {
            seccomp: spec.seccomp,
            letters: letters.clone(),
        };
        let devices = spec
            .devices
            .iter()
            .map(|device| Ok((device.id().to_owned(), device.open(&context)?)))
            .collect::<Result<_, DeviceError>>()?;
        Ok(Self {
            hypervisor,
            host,
            kernel,
            initrd,
            devices,
            watchdog_fired: Arc::default(),
        })
    }
}

/// Opens the KVM device a specification names.
pub fn open_kvm(source: &Source) -> Result<Hypervisor, StartError> {
    match source {
        Source::Path(path) => Ok(Hypervisor::open(path)?),
        Source::Fd(_) => Ok(Hypervisor::from_fd(source.open("KVM device")?.into())?),
    }
}

impl Machine {
    /// Opens what the specification names and builds the machine. Nothing runs yet.
    pub(crate) fn new(spec: Spec, letters: Letters, started: Instant) -> Result<Self, StartError> {
        let host_error = |what| move |source| StartError::Host { what, source };
        let files = Files::open(&spec, &letters)?;
        log::debug!("files are open, KVM has been asked");
        let plan = Plan::new(&spec, files.host.facts)?;
        install_kick_handler().map_err(host_error("the vCPU signal"))?;
        let seccomp = spec.seccomp;
        let io = IoThread::spawn("io", move || {
            crate::seccomp::apply(ThreadKind::IO, seccomp).map_err(io::Error::other)
        })
        .map_err(StartError::Io)?;
        let end = letters.clone();
        let mut console = Console::open(
            &spec.console,
            Box::new(move || end.send(Letter::EndRequested)),
        )?;
        log::debug!("the io thread and the console stand");
        let mut ram = GuestRam::new();
        for span in plan.memory.ram() {
            ram.add(span.base(), span.size(), &spec.memory.backing)?;
        }
        let board = Board::build(
            &files.parts(&spec, &plan, &letters, &io),
            &mut ram,
            &mut console,
        )?;
        log::debug!("the board stands");
        let console = Arc::new(Mutex::new(console));
        let console_events = attach(&io, &console)?;
        Ok(Self {
            console_events: Some(console_events),
            board,
            console,
            ram,
            letters,
            files,
            io,
            plan,
            spec,
            phase: Phase::Paused,
            started,
            first_run: None,
            resets: 0,
            mending: Mending::default(),
        })
    }

    pub(crate) fn spec(&self) -> &Spec {
        &self.spec
    }

    pub(crate) fn phase(&self) -> Phase {
        self.phase
    }

    /// Lets the devices and the vCPUs run. Running already is fine.
    pub(crate) fn run(&mut self) {
        if self.first_run.is_none() {
            self.first_run = Some(self.started.elapsed());
        }
        self.board.resume_devices();
        for vcpu in self.board.vcpus() {
            vcpu.run();
        }
        self.phase = Phase::Running;
        drop(self.board.leftovers.take());
    }

    /// Stops the vCPUs, then the devices. Stopped already is fine.
    pub(crate) fn pause(&mut self) -> Result<(), StuckVcpu> {
        self.board.vcpus().iter().for_each(VcpuThread::pause);
        for vcpu in self.board.vcpus() {
            if !vcpu.wait_parked() {
                return Err(StuckVcpu {
                    index: vcpu.index(),
                });
            }
        }
        self.board.pause_devices();
        self.phase = Phase::Paused;
        Ok(())
    }

    /// Changes a running device; `None` if there is none of that id.
    pub(crate) fn adjust(&self, id: &str, what: &Adjust) -> Option<Result<(), AdjustError>> {
        Some(self.files.devices.get(id)?.adjust(what))
    }

    /// Makes the changes of guest RAM that devices have asked for.
    pub(crate) fn attend_devices(&mut self) {
        let backing = &self.spec.memory.backing;
        for device in self.files.devices.values() {
            device.attend(&mut self.ram, backing);
        }
    }

    /// A vCPU has touched memory that the host cannot provide: mends what devices can mend, and lets it
    /// run again. `false` if that is of no use.
    pub(crate) fn mend(&mut self, index: u16) -> bool {
        let mended = self.files.devices.values().map(|device| device.mend());
        let mended = mended.fold(0, u64::saturating_add);
        let seen = self.mending.entry(index).or_default();
        if *seen == mended {
            return false;
        }
        *seen = mended;
        if self.phase == Phase::Running {
            let mut vcpus = self.board.vcpus().iter();
            if let Some(vcpu) = vcpus.find(|vcpu| vcpu.index() == index) {
                vcpu.run();
            }
        }
        true
    }

    /// How much memory there is, and may be.
    fn memory(&self) -> MemoryState {
        let boot = self.spec.memory.size;
        let growth = self.files.devices.values().find_map(|d| d.memory());
        let growth = growth.unwrap_or_default();
        MemoryState {
            boot_bytes: boot,
            plugged_bytes: growth.plugged,
            requested_bytes: boot.saturating_add(growth.requested),
            max_bytes: boot.saturating_add(growth.max),
        }
    }

    /// The VMM's terminal has another size.
    pub(crate) fn window_changed(&self) {
        let devices = self.files.devices.values();
        devices.for_each(|device| device.window_changed());
    }

    /// Presses the power button.
    pub(crate) fn power_button(&self) {
        self.board.ged.raise(ged::POWER_BUTTON);
    }

    /// Throws the board away and builds it again on emptied RAM. Nothing runs afterwards.
    pub(crate) fn reset(&mut self) -> Result<(), StartError> {
        // A vCPU that is stuck would keep the drop below waiting; it says so first.
        if let Err(stuck) = self.pause() {
            log::error!("{stuck}");
            // Even so: RAM that is about to be emptied must have no transfers in flight.
            self.board.pause_devices();
        }
        self.console_events = None;
        self.console().drain(DRAIN_PATIENCE);
        self.letters.clear();
        self.mending.clear();
        self.ram.recycle()?;
        for device in self.files.devices.values() {
            device.forget_guest(&mut self.ram);
        }
        let mut console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        let parts = self
            .files
            .parts(&self.spec, &self.plan, &self.letters, &self.io);
        // The old board goes when the new one takes its place: until then its vCPUs are parked.
        self.board = Board::build(&parts, &mut self.ram, &mut console)?;
        drop(console);
        self.console_events = Some(attach(&self.io, &self.console)?);
        self.resets = self.resets.saturating_add(1);
        Ok(())
    }

    /// Ends the machine: stops the vCPUs, sends what the console still holds, puts the terminal and
    /// the console's path back.
    pub(crate) fn end(&mut self) {
        self.phase = Phase::Ending;
        for vcpu in self.board.vcpus() {
            vcpu.pause();
        }
        for vcpu in self.board.vcpus() {
            if !vcpu.wait_parked() {
                log::error!(
                    "{}",
                    StuckVcpu {
                        index: vcpu.index()
                    }
                );
            }
        }
        self.console_events = None;
        let mut console = self.console();
        console.drain(DRAIN_PATIENCE);
        console.put_back();
        drop(console);
        self.files.devices.values().for_each(|device| device.end());
    }

    fn console(&self) -> MutexGuard<'_, Console> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn info(&self) -> Info {
        let cpus = self.plan.cpus.iter().zip(self.board.vcpus());
        let names = self.plan.pci.iter().map(|f| (f.bdf, f.device));
        let here: Vec<_> = self.board.functions().collect();
        let start = self.first_run.unwrap_or_default();
        let memory = self.memory();
        Info {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            phase: self.phase,
            cpus: cpus
                .map(|(plan, thread)| CpuState {
                    index: plan.index.into(),
                    id: plan.apic_id,
                    tid: thread.tid(),
                })
                .collect(),
            memory_bytes: memory.boot_bytes.saturating_add(memory.plugged_bytes),
            memory,
            pci: names
                .filter(|(bdf, _)| here.contains(bdf))
                .map(|(bdf, name)| (bdf.to_string(), name.to_owned()))
                .collect(),
            start_us: u64::try_from(start.as_micros()).unwrap_or(u64::MAX),
            resets: self.resets,
        }
    }

    pub(crate) fn counters(&self) -> Counters {
        let mut counters = self.board.counters.read();
        let exits = |v: &VcpuThread| {
            (
                format!("vcpu-{}", v.index()),
                [
                    ("exits".to_owned(), v.exits()),
                    ("ignored_writes".to_owned(), v.ignored_writes()),
                ]
                .into(),
            )
        };
        counters.extend(self.board.vcpus().iter().map(exits));
        counters.insert(
            "serial".to_owned(),
            [("bytes_lost".to_owned(), self.console().lost())].into(),
        );
        counters.insert(
            "debug-port".to_owned(),
            [("bytes_lost".to_owned(), self.letters.debug_bytes_lost())].into(),
        );
        counters
    }
}

impl Files {
    fn parts<'a>(
        &'a self,
        spec: &'a Spec,
        plan: &'a Plan,
        letters: &'a Letters,
        io: &'a IoThread,
    ) -> Parts<'a> {
        Parts {
            spec,
            plan,
            hypervisor: &self.hypervisor,
            host: &self.host,
            kernel: &self.kernel,
            initrd: self.initrd.as_ref(),
            devices: &self.devices,
            letters,
            io,
            watchdog_fired: &self.watchdog_fired,
        }
    }
}

fn attach(io: &IoThread, console: &Arc<Mutex<Console>>) -> Result<ConsoleEvents, StartError> {
    io.handle()
        .attach(Arc::clone(console))
        .map_err(|source| StartError::Host {
            what: "the console",
            source: io::Error::other(source),
        })
}
