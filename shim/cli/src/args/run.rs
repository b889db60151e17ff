//! The flags of `testudo run`, as people know them.

use std::path::PathBuf;

use clap::Args;

use crate::values::{
    Cpus, Detach, EnvWord, KeyValue, NetWord, PodName, Publish, SecurityOption, Signal, Size,
    Tmpfs, Ulimit, UserWord, Volume,
};

/// `testudo run`
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Send the container this command's input.
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the container a terminal.
    #[arg(short, long)]
    pub tty: bool,
    /// Leave the pod to itself; print its id.
    #[arg(short, long)]
    pub detach: bool,
    /// Keep nothing of the pod when it has ended.
    #[arg(long)]
    pub rm: bool,
    /// Its name; made up if there is none.
    #[arg(long, value_name = "NAME")]
    pub name: Option<PodName>,
    /// A folder, a file or a named volume in the container: SOURCE:DESTINATION[:ro]. May be repeated.
    #[arg(short, long = "volume", value_name = "SOURCE:DESTINATION[:ro]")]
    pub volumes: Vec<Volume>,
    /// A file system in the guest's memory: DESTINATION[:size=SIZE,mode=MODE]. May be repeated.
    #[arg(long, value_name = "DESTINATION[:OPTIONS]")]
    pub tmpfs: Vec<Tmpfs>,
    /// A variable of the environment: NAME=VALUE, or NAME for the value it has here. May be repeated.
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<EnvWord>,
    /// A file of such variables, one a line. May be repeated.
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// The working folder.
    #[arg(short, long, value_name = "FOLDER")]
    pub workdir: Option<String>,
    /// Who the first process is: USER[:GROUP], names of the image or numbers.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<UserWord>,
    /// What is run instead of the image's entry point; empty: nothing.
    #[arg(long, value_name = "PROGRAM")]
    pub entrypoint: Option<String>,
    /// CPUs, as 1.5 [default: guest.cpus of the configuration].
    #[arg(long, value_name = "NUMBER")]
    pub cpus: Option<Cpus>,
    /// The container's memory, as 512m [default: guest.memory of the configuration].
    #[arg(short, long, value_name = "SIZE")]
    pub memory: Option<Size>,
    /// Processes at once.
    #[arg(long, value_name = "NUMBER")]
    pub pids_limit: Option<i64>,
    /// Nothing may be written to the root.
    #[arg(long)]
    pub read_only: bool,
    /// A capability more, or ALL. May be repeated.
    #[arg(long, value_name = "CAPABILITY")]
    pub cap_add: Vec<String>,
    /// A capability less, or ALL. May be repeated.
    #[arg(long, value_name = "CAPABILITY")]
    pub cap_drop: Vec<String>,
    /// seccomp=unconfined, seccomp=FILE, no-new-privileges or apparmor=PROFILE. May be repeated.
    #[arg(long, value_name = "OPTION")]
    pub security_opt: Vec<SecurityOption>,
    /// A port of this machine that leads to the container: [[IP:]HOST:]GUEST[/udp]. May be repeated.
    #[arg(short, long, value_name = "[[IP:]HOST:]GUEST")]
    pub publish: Vec<Publish>,
    /// The network: none, user or tap=NAME [default: network.default of the configuration].
    #[arg(long, value_name = "NETWORK", visible_alias = "network")]
    pub net: Option<NetWord>,
    /// A name server. May be repeated.
    #[arg(long, value_name = "ADDRESS")]
    pub dns: Vec<std::net::IpAddr>,
    /// The container's host name [default: the pod's id].
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<PodName>,
    /// The guest's kernel [default: guest.kernel of the configuration].
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The guest's initramfs with the agent [default: guest.initramfs of the configuration].
    #[arg(long, value_name = "FILE")]
    pub initramfs: Option<PathBuf>,
    /// An argument for testudo-vmm, as it is. May be repeated.
    #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true)]
    pub vmm_arg: Vec<String>,
    /// Seconds after which it is ended, with exit code 124.
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
    /// A resource limit: NAME=SOFT[:HARD]. May be repeated.
    #[arg(long, value_name = "NAME=SOFT[:HARD]")]
    pub ulimit: Vec<Ulimit>,
    /// A setting of the guest's kernel. May be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub sysctl: Vec<KeyValue>,
    /// What asks the container to end [default: the image's, else TERM].
    #[arg(long, value_name = "SIGNAL")]
    pub stop_signal: Option<Signal>,
    /// Keys that leave the pod to itself.
    #[arg(long, value_name = "KEYS")]
    pub detach_keys: Option<Detach>,
    /// When to fetch the image.
    #[arg(long, value_enum, default_value_t)]
    pub pull: super::Pull,
    /// The image: a registry reference, an OCI layout (a folder), an OCI or Docker archive, a root file
    /// system (a folder), or an EROFS file.
    pub image: String,
    /// The command and its arguments, instead of the image's.
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    pub command: Vec<String>,
}
