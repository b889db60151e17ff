//! A pod as it shall be: everything the supervisor needs, decided before it starts.
//!
//! The command that makes a pod resolves flags, configuration and image into this, and writes it to the
//! pod's folder (`pod.json`). The supervisor reads it and asks nobody anything.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::values::{Cpus, NetWord, Publish, Signal, Size, Ulimit};

/// All of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Pod {
    /// 12 hexadecimal digits; the name of its folders.
    pub id: String,
    /// Chosen by a person, or made up.
    pub name: String,
    /// As the person named it.
    pub image: String,
    /// Milliseconds since 1970.
    pub created_ms: u64,
    /// The container's root.
    pub root: Root,
    /// Nobody may write to it.
    pub root_readonly: bool,
    /// Its first process.
    pub process: ProcessPlan,
    /// The container's host name.
    pub hostname: String,
    /// What is mounted besides the usual.
    pub mounts: Vec<MountPlan>,
    /// `KEY`, `VALUE` of /proc/sys.
    pub sysctls: Vec<(String, String)>,
    /// System calls.
    pub seccomp: SeccompPlan,
    /// Limits of the container within the guest.
    pub limits: Limits,
    /// The network.
    pub net: NetPlan,
    /// The machine.
    pub machine: MachinePlan,
    /// Nothing of it is kept when it has ended.
    pub remove: bool,
    /// It outlives the command that made it.
    pub detached: bool,
    /// What asks it to end.
    pub stop_signal: Signal,
    /// Seconds after which it is ended, if any.
    pub timeout_s: Option<u64>,
    /// Bytes of output that are kept, twice.
    pub log_bytes: u64,
    /// Seconds for the guest to come up.
    pub start_timeout_s: u64,
}

/// Where a root file system is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Root {
    /// A folder, shared with the guest read-only.
    Directory(PathBuf),
    /// A file that is a read-only disk.
    Erofs(PathBuf),
}

/// The first process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessPlan {
    /// Program and arguments; never empty.
    pub args: Vec<String>,
    /// `NAME=VALUE`.
    pub env: Vec<String>,
    /// Absolute.
    pub cwd: String,
    /// In the guest.
    pub uid: u32,
    /// In the guest.
    pub gid: u32,
    /// In the guest.
    pub groups: Vec<u32>,
    /// It has a terminal.
    pub terminal: bool,
    /// Somebody may write to it.
    pub stdin: bool,
    /// Rows and columns.
    pub size: (u16, u16),
    /// With CAP_.
    pub capabilities: Vec<String>,
    /// setuid programs give nothing.
    pub no_new_privileges: bool,
    /// A profile of the guest's.
    pub apparmor: String,
    /// Resource limits.
    pub ulimits: Vec<Ulimit>,
}

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MountPlan {
    /// Of a folder of the host.
    Folder {
        /// On the host, absolute, without links.
        source: PathBuf,
        /// In the container.
        destination: String,
        /// For the guest.
        readonly: bool,
    },
    /// Of one file of the host.
    File {
        /// On the host.
        source: PathBuf,
        /// In the container.
        destination: String,
    },
    /// In the guest's memory.
    Tmpfs {
        /// In the container.
        destination: String,
        /// As mount(8) writes them.
        options: Vec<String>,
    },
}

/// Which system calls the container may make.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SeccompPlan {
    /// What containers usually may.
    #[default]
    Default,
    /// All.
    Unconfined,
    /// What this profile, JSON as Docker has it, says.
    Profile(String),
}

/// Limits in the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes.
    pub memory: Option<Size>,
    /// Time.
    pub cpus: Option<Cpus>,
    /// Processes.
    pub pids: Option<i64>,
}

/// The network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetPlan {
    /// Which.
    pub kind: NetWord,
    /// The program of the user-mode stack.
    pub passt: PathBuf,
    /// Ports of the host that lead to the container.
    pub publish: Vec<Publish>,
    /// Name servers; empty: the host's.
    pub dns: Vec<String>,
}

/// The machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachinePlan {
    /// testudo-vmm.
    pub vmm: PathBuf,
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The agent and what it needs.
    pub initramfs: PathBuf,
    /// vCPUs.
    pub cpus: u32,
    /// Guest RAM.
    pub memory: Size,
    /// More words for the guest's kernel.
    pub cmdline: String,
    /// More arguments for the VMM.
    pub args: Vec<String>,
}
