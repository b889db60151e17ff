//! The command line: `run`, `plan`, `schema`, `ctl`.

mod ctl;
mod machine;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

pub use ctl::{CtlArgs, CtlError};
pub use machine::{ArgsError, MachineArgs};

/// A virtual machine monitor for containers, on KVM.
#[derive(Debug, Parser)]
#[command(name = "testudo-vmm", version, about, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// How much to say on stderr: error, warn, info, debug or trace.
    #[arg(long, global = true, default_value = "warn", value_name = "LEVEL")]
    pub log_level: log::LevelFilter,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a virtual machine.
    ///
    /// Exit status: 0 the guest powered off, or the VM was asked to end; 3 the guest reset itself;
    /// 4 the guest's kernel panicked; 1 any failure of the VMM, with one line on stderr.
    Run(Box<MachineArgs>),
    /// Show what `run` would build, without building it.
    Plan(Box<PlanArgs>),
    /// Print the JSON schema of the configuration file.
    Schema,
    /// Talk to a running virtual machine.
    Ctl(CtlArgs),
    /// Apply the system call filter of one kind of thread, then make a call it does not list.
    /// Ends in SIGSYS if filters work on this host.
    #[command(hide = true)]
    SeccompProbe {
        /// ctl, vcpu or io.
        thread: String,
    },
    /// Wait for stdin to end, then restore the terminal on stderr: the VMM starts this itself.
    #[command(hide = true)]
    KeepTerminal {
        /// The terminal's settings.
        saved: String,
    },
}

/// Arguments of `plan`.
#[derive(Debug, clap::Args)]
pub struct PlanArgs {
    /// The machine.
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Print JSON (the only form so far).
    #[arg(long)]
    pub json: bool,
    /// Plan for this host instead of asking KVM: a JSON file as `plan --host-json` prints it.
    #[arg(long, value_name = "FILE")]
    pub host: Option<PathBuf>,
    /// Print what KVM says of this host, and nothing else.
    #[arg(long)]
    pub host_json: bool,
}
