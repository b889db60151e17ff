//! The command line: the one place where commands and flags are defined. Help, completions and man pages
//! come from it.

mod run;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use run::RunArgs;

use crate::values::{Detach, EnvWord, Signal, UserWord};

/// Runs containers in small virtual machines.
#[derive(Debug, Parser)]
#[command(
    name = "testudo",
    version,
    about,
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a command in a new pod: a virtual machine with one container.
    Run(Box<RunArgs>),
    /// List pods.
    Ps(PsArgs),
    /// Run a further command in a running pod.
    Exec(Box<ExecArgs>),
    /// Show a pod's output as it comes, and send it input.
    Attach(AttachArgs),
    /// Print what a pod has written.
    Logs(LogsArgs),
    /// Ask pods to end; end them if they do not.
    Stop(StopArgs),
    /// Send a signal to pods.
    Kill(KillArgs),
    /// Remove pods that have ended.
    Rm(RmArgs),
    /// Print all that is known of pods, as JSON.
    Inspect(PodsArgs),
    /// Print what pods use.
    Stats(StatsArgs),
    /// Print what the guest's kernel and agent have said.
    Console(ConsoleArgs),
    /// Print what has happened to pods.
    Events(EventsArgs),
    /// Copy files between a pod and this machine.
    Cp(CpArgs),
    /// Wait for the end of pods; print their exit codes.
    Wait(PodsArgs),
    /// Let nothing in pods run until they are resumed.
    Pause(PodsArgs),
    /// Let paused pods run again.
    Resume(PodsArgs),
    /// Fetch images, or fetch them anew.
    Pull(PullArgs),
    /// List images.
    Images(ImagesArgs),
    /// Remove images.
    Rmi(RmiArgs),
    /// Say whether this machine can run pods, and what to do where it cannot.
    Check(CheckArgs),
    /// Ask about the configuration.
    Config(ConfigArgs),
    /// Print a script that completes commands, for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Write manual pages into a folder.
    Man {
        /// The folder.
        folder: std::path::PathBuf,
    },
}

/// How to print.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
}

/// `testudo ps`
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Also those that have ended.
    #[arg(short, long)]
    pub all: bool,
    /// Only ids.
    #[arg(short, long)]
    pub quiet: bool,
    /// How to print.
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}

/// Pods.
#[derive(Debug, Args)]
pub struct PodsArgs {
    /// Names, ids, or the beginnings of ids.
    #[arg(required = true, value_name = "POD")]
    pub pods: Vec<String>,
}

/// `testudo exec`
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Send it this command's input.
    #[arg(short, long)]
    pub interactive: bool,
    /// Give it a terminal.
    #[arg(short, long)]
    pub tty: bool,
    /// Do not wait for it.
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    pub detach: bool,
    /// A variable of its environment: NAME=VALUE, or NAME for the value it has here. May be repeated.
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<EnvWord>,
    /// Its working folder.
    #[arg(short, long, value_name = "FOLDER")]
    pub workdir: Option<String>,
    /// Who it is: USER[:GROUP]; numbers only.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<UserWord>,
    /// With every capability.
    #[arg(long)]
    pub privileged: bool,
    /// The pod.
    #[arg(value_name = "POD")]
    pub pod: String,
    /// The command and its arguments.
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    pub command: Vec<String>,
}

/// `testudo attach`
#[derive(Debug, Args)]
pub struct AttachArgs {
    /// Do not send input.
    #[arg(long)]
    pub no_stdin: bool,
    /// Keys that leave the pod to itself.
    #[arg(long, value_name = "KEYS")]
    pub detach_keys: Option<Detach>,
    /// The pod.
    pub pod: String,
}

/// `testudo logs`
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Go on as there is more, until the pod ends.
    #[arg(short, long)]
    pub follow: bool,
    /// When each piece was written, before its lines.
    #[arg(short, long)]
    pub timestamps: bool,
    /// Only so many lines, the last.
    #[arg(short = 'n', long, value_name = "LINES")]
    pub tail: Option<usize>,
    /// The pod.
    pub pod: String,
}

/// `testudo stop`
#[derive(Debug, Args)]
pub struct StopArgs {
    /// Seconds before a pod is ended [default: stop.timeout of the configuration].
    #[arg(short, long, value_name = "SECONDS")]
    pub time: Option<u64>,
    /// Which.
    #[command(flatten)]
    pub pods: PodsArgs,
}

/// `testudo kill`
#[derive(Debug, Args)]
pub struct KillArgs {
    /// The signal.
    #[arg(short, long, default_value = "KILL", value_name = "SIGNAL")]
    pub signal: Signal,
    /// Which.
    #[command(flatten)]
    pub pods: PodsArgs,
}

/// `testudo rm`
#[derive(Debug, Args)]
pub struct RmArgs {
    /// End those that run.
    #[arg(short, long)]
    pub force: bool,
    /// All that have ended.
    #[arg(short, long, conflicts_with = "pods")]
    pub all: bool,
    /// Names, ids, or the beginnings of ids.
    #[arg(value_name = "POD", required_unless_present = "all")]
    pub pods: Vec<String>,
}

/// `testudo stats`
#[derive(Debug, Args)]
pub struct StatsArgs {
    /// How to print.
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Which; all that run, if none is named.
    #[arg(value_name = "POD")]
    pub pods: Vec<String>,
}

/// `testudo console`
#[derive(Debug, Args)]
pub struct ConsoleArgs {
    /// Go on as there is more, until the pod ends.
    #[arg(short, long)]
    pub follow: bool,
    /// The pod.
    pub pod: String,
}

/// `testudo events`
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Go on as more happens.
    #[arg(short, long)]
    pub follow: bool,
    /// How to print.
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}

/// `testudo cp`
#[derive(Debug, Args)]
pub struct CpArgs {
    /// POD:PATH or a path of this machine.
    pub source: String,
    /// POD:PATH or a path of this machine.
    pub destination: String,
}

/// `testudo pull`
#[derive(Debug, Args)]
pub struct PullArgs {
    /// Registry references, OCI layouts (folders), OCI or Docker archives.
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<String>,
}

/// `testudo images`
#[derive(Debug, Args)]
pub struct ImagesArgs {
    /// How to print.
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}

/// `testudo rmi`
#[derive(Debug, Args)]
pub struct RmiArgs {
    /// Whatever no name leads to, and downloads that are unpacked.
    #[arg(long, conflicts_with = "images")]
    pub unused: bool,
    /// Names, digests, or the beginnings of digests.
    #[arg(value_name = "IMAGE", required_unless_present = "unused")]
    pub images: Vec<String>,
}

/// When to fetch an image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Pull {
    /// If it is not there.
    #[default]
    Missing,
    /// Each time.
    Always,
    /// Not at all.
    Never,
}

/// `testudo check`
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// As JSON.
    #[arg(long)]
    pub json: bool,
    /// Do not try a guest.
    #[arg(long)]
    pub no_guest: bool,
}

/// `testudo config`
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// What to ask.
    #[command(subcommand)]
    pub command: ConfigCommand,
}

/// What to ask.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// What a key is for, what it is set to, and where; of all keys, if none is named.
    Explain {
        /// As in the file: guest.memory.
        key: Option<String>,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// The page of all keys, as Markdown.
    #[command(hide = true)]
    Page,
}
