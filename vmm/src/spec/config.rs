//! The configuration as it is written: JSON, or flags turned into the same shape.
//!
//! Nothing here is checked beyond its form. [`Spec`](super::Spec) is the checked type, and the
//! only way to one is through [`Config::check`].

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{ByteSize, Source};
use crate::devices::{
    BalloonConfig, DiskConfig, FsConfig, NetConfig, PmemConfig, PortConfig, RngConfig,
    VhostUserConfig, VsockConfig, WatchdogConfig,
};

/// A virtual machine, as a configuration file describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// What the guest boots.
    pub boot: Option<BootConfig>,
    /// Its processors.
    pub cpus: CpusConfig,
    /// Its memory.
    pub memory: MemoryConfig,
    /// The serial port.
    pub console: ConsoleConfig,
    /// The entropy device; on by default.
    pub rng: RngConfig,
    /// The balloon; on by default.
    pub balloon: BalloonConfig,
    /// Disks, in the order in which the guest finds them.
    pub disks: Vec<DiskConfig>,
    /// Files that the guest reaches as memory.
    pub pmem: Vec<PmemConfig>,
    /// Network devices, in the order in which the guest finds them.
    pub nets: Vec<NetConfig>,
    /// A virtio console, `/dev/hvc0` of the guest; default: none.
    pub virtio_console: Option<ConsoleConfig>,
    /// Ports of the guest with names, `/dev/virtio-ports/NAME`.
    pub ports: Vec<PortConfig>,
    /// Stream sockets between guest and host.
    pub vsock: Option<VsockConfig>,
    /// A watchdog; off by default.
    pub watchdog: WatchdogConfig,
    /// Devices whose queues other processes serve.
    pub vhost_user: Vec<VhostUserConfig>,
    /// Folders shared with the guest.
    pub fs: Vec<FsConfig>,
    /// Control socket: a path to bind, or `fd:N` for a listening `SOCK_SEQPACKET` socket.
    pub control: Option<Source>,
    /// The KVM device: a path, or `fd:N`. Default `/dev/kvm`.
    pub kvm: Option<Source>,
    /// What happens when the guest resets itself.
    pub on_reset: OnReset,
    /// What happens when the guest's kernel panics.
    pub on_panic: OnPanic,
    /// System call filters of the VMM's threads.
    pub seccomp: Seccomp,
}

/// What the guest boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// bzImage, or ELF vmlinux.
    pub kernel: Source,
    /// Initial RAM file system, as the kernel takes it.
    #[serde(default)]
    pub initrd: Option<Source>,
    /// Kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// How an ELF kernel is entered.
    #[serde(default)]
    pub protocol: Protocol,
}

/// How a kernel is entered.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// bzImage: Linux 64-bit; ELF with a PVH note: PVH; other ELF: Linux 64-bit.
    #[default]
    Auto,
    /// The Linux 64-bit boot protocol.
    Linux64,
    /// PVH.
    Pvh,
}

/// Processors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CpusConfig {
    /// vCPUs at boot, 1 to 254.
    pub count: u32,
    /// Sockets, cores per socket and threads per core; their product is `count`. Default: one
    /// socket, one thread per core.
    pub topology: Option<TopologyConfig>,
    /// Which host CPUs each vCPU may use, for example `{"cpu": 0, "host": "0-3,8"}`.
    pub affinity: Vec<AffinityConfig>,
    /// Guest-physical address width in bits; at most what the host and KVM offer.
    pub phys_bits: Option<u8>,
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            count: 1,
            topology: None,
            affinity: Vec::new(),
            phys_bits: None,
        }
    }
}

/// Shape of the processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TopologyConfig {
    /// Sockets.
    pub sockets: u32,
    /// Cores per socket.
    pub cores: u32,
    /// Threads per core.
    pub threads: u32,
}

/// Host CPUs of one vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AffinityConfig {
    /// vCPU index, from 0.
    pub cpu: u32,
    /// Host CPUs as a list of numbers and ranges.
    pub host: String,
}

/// Memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// Guest RAM, 32 MiB to 1 TiB, a multiple of 2 MiB.
    pub size: ByteSize,
    /// What it may grow to while the guest runs; default: it does not.
    pub max: Option<ByteSize>,
    /// Back it by a memfd that other processes can map.
    pub shared: bool,
    /// hugetlb page size, `2M` or `1G`. The pages must have been reserved on the host.
    pub hugepages: Option<ByteSize>,
    /// Ask for transparent huge pages where no hugetlb pages are used; `false` refuses them.
    pub thp: bool,
    /// Let KSM merge equal pages.
    pub mergeable: bool,
    /// Account the memory at start, so that a host that cannot hold it says so.
    pub reserve: bool,
    /// Fault the memory in at start, by this many threads; 0 is one per host CPU, up to 16.
    pub prefault: Option<u32>,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: ByteSize(256 << 20),
            max: None,
            shared: false,
            hugepages: None,
            thp: true,
            mergeable: false,
            reserve: false,
            prefault: None,
        }
    }
}

/// Where a console goes: `stdio`, `off`, `file:PATH`, `unix:PATH` (a listening stream socket),
/// `pty:PATH` (a terminal to which a link at PATH leads) or `fd:N`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub enum ConsoleConfig {
    /// Output to stdout, input from stdin.
    #[default]
    Stdio,
    /// The port is there, its output is dropped.
    Off,
    /// Output to a file that is created or truncated.
    File(std::path::PathBuf),
    /// A listening stream socket; one client at a time.
    Unix(std::path::PathBuf),
    /// A new pseudo-terminal, to which a symbolic link at this path leads.
    Pty(std::path::PathBuf),
    /// An inherited descriptor: output, and input too if it is a socket.
    Fd(std::os::fd::RawFd),
}

/// What was written is not a console.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("`{0}` is not a console: write stdio, off, file:PATH, unix:PATH, pty:PATH or fd:N")]
pub struct ConsoleError(String);

impl std::str::FromStr for ConsoleConfig {
    type Err = ConsoleError;
    fn from_str(text: &str) -> Result<Self, ConsoleError> {
        let error = || ConsoleError(text.to_owned());
        match text.split_once(':') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "off" => Ok(Self::Off),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("pty", path)) if !path.is_empty() => Ok(Self::Pty(path.into())),
            Some(("fd", number)) => number
                .parse()
                .ok()
                .filter(|fd| *fd > 2)
                .map(Self::Fd)
                .ok_or_else(error),
            _ => Err(error()),
        }
    }
}

impl TryFrom<String> for ConsoleConfig {
    type Error = ConsoleError;
    fn try_from(text: String) -> Result<Self, ConsoleError> {
        text.parse()
    }
}

impl From<ConsoleConfig> for String {
    fn from(console: ConsoleConfig) -> Self {
        match console {
            ConsoleConfig::Stdio => "stdio".to_owned(),
            ConsoleConfig::Off => "off".to_owned(),
            ConsoleConfig::File(path) => format!("file:{}", path.display()),
            ConsoleConfig::Unix(path) => format!("unix:{}", path.display()),
            ConsoleConfig::Pty(path) => format!("pty:{}", path.display()),
            ConsoleConfig::Fd(fd) => format!("fd:{fd}"),
        }
    }
}

/// What happens when the guest resets itself.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum OnReset {
    /// The VM ends with exit status 3.
    #[default]
    Exit,
    /// The guest boots again.
    Reboot,
}

/// What happens when the guest's kernel says that it panicked.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum OnPanic {
    /// The VM ends with exit status 4.
    #[default]
    Exit,
    /// The guest goes on: it may print, dump, reboot or hang.
    Continue,
}

/// System call filters.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Seccomp {
    /// A call that is not listed kills the VMM.
    #[default]
    Kill,
    /// A call that is not listed is logged by the kernel and allowed: for debugging.
    Log,
    /// No filters: for debugging.
    Off,
}

/// The text is not a configuration.
#[derive(Debug, Error)]
#[error("not a VM configuration: {source}")]
pub struct ParseError {
    #[from]
    source: serde_json::Error,
}

impl Config {
    /// Reads a configuration. Unknown keys are errors.
    pub fn from_json(text: &str) -> Result<Self, ParseError> {
        Ok(serde_json::from_str(text)?)
    }
}
