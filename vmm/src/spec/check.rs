//! The checked specification and the only way to it.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::os::fd::RawFd;
use std::sync::Arc;

use testudo_arch::x86_64::layout::{RAM_GRANULE, RAM_MAX, RAM_MIN};
use testudo_arch::x86_64::topology::VCPUS_MAX;
use testudo_arch::x86_64::{Topology, TopologyError};
use testudo_memory::{Backing, HugePages, Prefault, Share};
use thiserror::Error;

use crate::devices::{self, BadDevice, DeviceSpec, OnWatchdog};

use super::config::{Config, ConsoleConfig, CpusConfig, MemoryConfig};
use super::{ByteSize, CpuList, CpuListError, OnPanic, OnReset, Protocol, Seccomp, Source};

/// Threads that prefault when the configuration leaves it to the VMM: more do not help, the
/// host's zeroing is bound by memory bandwidth long before.
const PREFAULT_THREADS_MAX: usize = 16;

/// Narrowest guest-physical address the layout makes sense with, and the widest there is.
const PHYS_BITS: std::ops::RangeInclusive<u8> = 36..=52;

/// A virtual machine that can be built, as far as the words alone can tell.
#[derive(Debug, Clone)]
pub struct Spec {
    /// What the guest boots.
    pub boot: Boot,
    /// Processors.
    pub cpus: Cpus,
    /// Memory.
    pub memory: Memory,
    /// The serial port.
    pub console: ConsoleConfig,
    /// Virtio devices in the order of their PCI slots.
    pub(crate) devices: Vec<Arc<dyn DeviceSpec>>,
    /// What happens when the guest is hung; `None` without a watchdog.
    pub watchdog: Option<OnWatchdog>,
    /// Control socket.
    pub control: Option<Source>,
    /// The KVM device.
    pub kvm: Source,
    /// What happens when the guest resets itself.
    pub on_reset: OnReset,
    /// What happens when the guest's kernel panics.
    pub on_panic: OnPanic,
    /// System call filters.
    pub seccomp: Seccomp,
}

/// What the guest boots.
#[derive(Debug, Clone)]
pub struct Boot {
    /// Kernel image.
    pub kernel: Source,
    /// Initial RAM file system.
    pub initrd: Option<Source>,
    /// Command line.
    pub cmdline: String,
    /// How an ELF kernel is entered.
    pub protocol: Protocol,
}

/// Processors.
#[derive(Debug, Clone)]
pub struct Cpus {
    /// Their shape; all of them are there at boot.
    pub topology: Topology,
    /// Host CPUs of some of them.
    pub affinity: Vec<Affinity>,
    /// Guest-physical address width asked for.
    pub phys_bits: Option<u8>,
}

/// Host CPUs of one vCPU.
#[derive(Debug, Clone)]
pub struct Affinity {
    /// vCPU index.
    pub cpu: u16,
    /// Host CPUs it may use.
    pub host: CpuList,
}

/// Memory.
#[derive(Debug, Clone)]
pub struct Memory {
    /// Guest RAM in bytes.
    pub size: u64,
    /// How it is backed.
    pub backing: Backing,
}

/// The configuration does not describe a VM that can be built.
#[derive(Debug, Error)]
pub enum SpecError {
    /// Nothing to boot.
    #[error("no kernel: name one with --kernel, or as boot.kernel in the configuration")]
    NoKernel,
    /// Too few or too many vCPUs.
    #[error("{count} vCPUs: a VM has 1 to {VCPUS_MAX}")]
    CpuCount {
        /// What was asked for.
        count: u32,
    },
    /// The topology's product is not the count.
    #[error("{sockets} sockets × {cores} cores × {threads} threads are {} vCPUs, not {count}; make the product equal the count", u64::from(*.sockets) * u64::from(*.cores) * u64::from(*.threads))]
    TopologyProduct {
        /// Sockets.
        sockets: u32,
        /// Cores per socket.
        cores: u32,
        /// Threads per core.
        threads: u32,
        /// vCPUs asked for.
        count: u32,
    },
    /// The topology cannot be expressed.
    #[error("CPU topology")]
    Topology(#[from] TopologyError),
    /// An affinity for a vCPU that does not exist, or a second one for the same.
    #[error("CPU affinity of vCPU {cpu}: there is no such vCPU, or it has one already; vCPUs are numbered 0 to {}", count.saturating_sub(1))]
    AffinityCpu {
        /// vCPU named.
        cpu: u32,
        /// How many there are.
        count: u32,
    },
    /// An affinity's host CPUs cannot be read.
    #[error("CPU affinity of vCPU {cpu}")]
    AffinityList {
        /// vCPU named.
        cpu: u32,
        /// Why.
        #[source]
        source: CpuListError,
    },
    /// An address width outside what the architecture has.
    #[error("{bits} physical address bits: write {} to {}", PHYS_BITS.start(), PHYS_BITS.end())]
    PhysBits {
        /// What was asked for.
        bits: u8,
    },
    /// Too little or too much memory, or a size no huge page fits.
    #[error(
        "{size} of memory: a VM has {} to {}, in steps of {}",
        ByteSize(RAM_MIN),
        ByteSize(RAM_MAX),
        ByteSize(RAM_GRANULE)
    )]
    MemorySize {
        /// What was asked for.
        size: ByteSize,
    },
    /// A page size that is not there.
    #[error("hugepages of {size}: write 2M or 1G")]
    HugePages {
        /// What was asked for.
        size: ByteSize,
    },
    /// The size does not consist of such pages.
    #[error("{memory} of memory do not consist of hugepages of {page}; make the size a multiple")]
    HugePageMultiple {
        /// Guest RAM.
        memory: ByteSize,
        /// Page size.
        page: ByteSize,
    },
    /// KSM does not look at memory it cannot merge.
    #[error("mergeable memory cannot be {with}: KSM merges private pages of the base size only")]
    Mergeable {
        /// What it cannot be at the same time.
        with: &'static str,
    },
    /// A device.
    #[error(transparent)]
    Device(#[from] BadDevice),
    /// One descriptor under two names.
    #[error("fd:{fd} is named twice; pass one descriptor for each use")]
    FdTwice {
        /// The descriptor.
        fd: RawFd,
    },
}

impl Config {
    /// Checks everything the words alone can tell.
    pub fn check(self) -> Result<Spec, SpecError> {
        let devices = devices::from_config(&self)?;
        let watchdog = self.watchdog.check()?;
        let boot = self.boot.ok_or(SpecError::NoKernel)?;
        let spec = Spec {
            boot: Boot {
                kernel: boot.kernel,
                initrd: boot.initrd,
                cmdline: boot.cmdline,
                protocol: boot.protocol,
            },
            cpus: cpus(&self.cpus)?,
            memory: memory(&self.memory)?,
            console: self.console,
            devices,
            watchdog,
            control: self.control,
            kvm: self.kvm.unwrap_or_else(|| Source::Path("/dev/kvm".into())),
            on_reset: self.on_reset,
            on_panic: self.on_panic,
            seccomp: self.seccomp,
        };
        spec.each_fd_once()?;
        Ok(spec)
    }
}

impl Spec {
    fn each_fd_once(&self) -> Result<(), SpecError> {
        let sources = [
            Some(&self.boot.kernel),
            self.boot.initrd.as_ref(),
            self.control.as_ref(),
            Some(&self.kvm),
        ];
        let of_devices = self.devices.iter().flat_map(|device| device.sources());
        let console = match self.console {
            ConsoleConfig::Fd(fd) => Some(fd),
            _ => None,
        };
        let mut seen = BTreeSet::new();
        let fds = sources
            .into_iter()
            .flatten()
            .chain(of_devices)
            .filter_map(|s| match s {
                Source::Fd(fd) => Some(*fd),
                Source::Path(_) => None,
            });
        for fd in fds.chain(console) {
            if !seen.insert(fd) {
                return Err(SpecError::FdTwice { fd });
            }
        }
        Ok(())
    }
}

fn cpus(config: &CpusConfig) -> Result<Cpus, SpecError> {
    let count = config.count;
    let vcpus = u16::try_from(count)
        .ok()
        .filter(|n| (1..=VCPUS_MAX).contains(n))
        .ok_or(SpecError::CpuCount { count })?;
    let topology = match config.topology {
        None => Topology::flat(vcpus)?,
        Some(t) => {
            let product = || SpecError::TopologyProduct {
                sockets: t.sockets,
                cores: t.cores,
                threads: t.threads,
                count,
            };
            let narrow = |n: u32| u16::try_from(n).map_err(|_| product());
            let topology =
                Topology::new(narrow(t.sockets)?, 1, narrow(t.cores)?, narrow(t.threads)?)?;
            if topology.vcpus() != vcpus {
                return Err(product());
            }
            topology
        }
    };
    let mut seen = BTreeSet::new();
    let affinity = config
        .affinity
        .iter()
        .map(|a| {
            let cpu = u16::try_from(a.cpu)
                .ok()
                .filter(|cpu| *cpu < vcpus && seen.insert(*cpu))
                .ok_or(SpecError::AffinityCpu { cpu: a.cpu, count })?;
            let host = a
                .host
                .parse()
                .map_err(|source| SpecError::AffinityList { cpu: a.cpu, source })?;
            Ok(Affinity { cpu, host })
        })
        .collect::<Result<_, SpecError>>()?;
    if let Some(bits) = config.phys_bits
        && !PHYS_BITS.contains(&bits)
    {
        return Err(SpecError::PhysBits { bits });
    }
    Ok(Cpus {
        topology,
        affinity,
        phys_bits: config.phys_bits,
    })
}

fn memory(config: &MemoryConfig) -> Result<Memory, SpecError> {
    let size = config.size;
    if !(RAM_MIN..=RAM_MAX).contains(&size.0) || !size.0.is_multiple_of(RAM_GRANULE) {
        return Err(SpecError::MemorySize { size });
    }
    let huge = match config.hugepages {
        None if config.thp => HugePages::Transparent,
        None => HugePages::Never,
        Some(ByteSize(0x20_0000)) => HugePages::Huge2M,
        Some(ByteSize(0x4000_0000)) => HugePages::Huge1G,
        Some(size) => return Err(SpecError::HugePages { size }),
    };
    if let Some(page) = config.hugepages
        && !size.0.is_multiple_of(page.0)
    {
        return Err(SpecError::HugePageMultiple { memory: size, page });
    }
    if config.mergeable && config.shared {
        return Err(SpecError::Mergeable { with: "shared" });
    }
    if config.mergeable && config.hugepages.is_some() {
        return Err(SpecError::Mergeable {
            with: "in hugepages",
        });
    }
    let prefault = config.prefault.map(|threads| Prefault {
        threads: usize::try_from(threads)
            .ok()
            .and_then(NonZeroUsize::new)
            .unwrap_or_else(prefault_threads),
    });
    Ok(Memory {
        size: size.0,
        backing: Backing {
            share: if config.shared {
                Share::Shared
            } else {
                Share::Private
            },
            huge,
            mergeable: config.mergeable,
            reserve: config.reserve,
            prefault,
        },
    })
}

fn prefault_threads() -> NonZeroUsize {
    let host = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    NonZeroUsize::new(PREFAULT_THREADS_MAX).map_or(host, |max| host.min(max))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &str) -> Result<Spec, String> {
        Config::from_json(json)
            .map_err(|e| e.to_string())?
            .check()
            .map_err(|e| e.to_string())
    }

    fn with(extra: &str) -> Result<Spec, String> {
        check(&format!(r#"{{"boot":{{"kernel":"/k"}}{extra}}}"#))
    }

    #[test]
    fn the_least_configuration_is_a_vm() {
        let spec = with("").unwrap();
        assert_eq!(spec.cpus.topology.vcpus(), 1);
        assert_eq!(spec.memory.size, 256 << 20);
        assert_eq!(spec.memory.backing.huge, HugePages::Transparent);
        assert_eq!(spec.devices.len(), 2, "an entropy device and a balloon");
        assert_eq!(spec.kvm.to_string(), "/dev/kvm");
    }

    #[test]
    fn bad_input_is_one_clear_line() {
        for (json, says) in [
            (r#"{}"#, "no kernel"),
            (
                r#"{"boot":{"kernel":"/k","initramfs":"x"}}"#,
                "unknown field `initramfs`",
            ),
        ] {
            let error = check(json).unwrap_err();
            assert!(error.contains(says), "{json}: {error}");
        }
        for (extra, says) in [
            (r#","cpus":{"count":0}"#, "0 vCPUs: a VM has 1 to 254"),
            (r#","cpus":{"count":255}"#, "255 vCPUs"),
            (r#","cpus":{"count":-1}"#, "invalid value"),
            (
                r#","cpus":{"count":4,"topology":{"sockets":1,"cores":3,"threads":1}}"#,
                "1 sockets × 3 cores × 1 threads are 3 vCPUs, not 4",
            ),
            (
                r#","cpus":{"count":4,"topology":{"sockets":4294967295,"cores":4294967295,"threads":1}}"#,
                "vCPUs, not 4",
            ),
            (
                r#","cpus":{"affinity":[{"cpu":1,"host":"0"}]}"#,
                "there is no such vCPU",
            ),
            (
                r#","cpus":{"affinity":[{"cpu":0,"host":"9-1"}]}"#,
                "CPU affinity of vCPU 0",
            ),
            (
                r#","cpus":{"phys_bits":35}"#,
                "35 physical address bits: write 36 to 52",
            ),
            (
                r#","memory":{"size":"16M"}"#,
                "16M of memory: a VM has 32M to 1T",
            ),
            (r#","memory":{"size":"33M"}"#, "in steps of 2M"),
            (r#","memory":{"size":"2T"}"#, "2T of memory"),
            (r#","memory":{"size":"lots"}"#, "`lots` is not a size"),
            (
                r#","memory":{"hugepages":"4K"}"#,
                "hugepages of 4K: write 2M or 1G",
            ),
            (
                r#","memory":{"hugepages":"1G"}"#,
                "256M of memory do not consist of hugepages of 1G",
            ),
            (
                r#","memory":{"mergeable":true,"shared":true}"#,
                "cannot be shared",
            ),
            (r#","console":"tty"#, "EOF"),
            (r#","console":"tty""#, "`tty` is not a console"),
            (
                r#","rng":{"enabled":false,"source":"/dev/random"}"#,
                "has no effect while the device is off",
            ),
            (r#","rng":{"bytes_per_second":0}"#, "0 bytes a second"),
            (r#","kvm":"fd:9","control":"fd:9""#, "fd:9 is named twice"),
        ] {
            let error = with(extra).unwrap_err();
            assert!(error.contains(says), "{extra}: {error}");
            assert!(!error.contains('\n'));
        }
    }
}
