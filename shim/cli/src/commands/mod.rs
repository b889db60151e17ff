//! What each command does.

mod attach;
mod check;
mod config;
mod cp;
mod exec;
mod images;
mod lifecycle;
mod list;
mod run;
mod show;

use std::io::Write;
use std::process::ExitCode;

use clap::CommandFactory;

use crate::args::{Cli, Command};
use crate::config::{Config, Sources, load};
use crate::state::Directories;

/// What commands work with.
pub(crate) struct Context {
    pub(crate) config: Config,
    pub(crate) directories: Directories,
}

impl Context {
    fn open() -> anyhow::Result<Self> {
        let (config, _) = load(&Sources::of_process())?;
        let directories = Directories::open(&config)?;
        Ok(Self {
            config,
            directories,
        })
    }
}

/// Carries a command out.
pub fn dispatch(command: Command) -> anyhow::Result<ExitCode> {
    let context = Context::open;
    match command {
        Command::Run(args) => run::run(&context()?, &args),
        Command::Ps(args) => list::ps(&context()?, &args),
        Command::Exec(args) => exec::exec(&context()?, &args),
        Command::Attach(args) => attach::attach(&context()?, &args),
        Command::Logs(args) => show::logs(&context()?, &args),
        Command::Console(args) => show::console(&context()?, &args),
        Command::Events(args) => show::events(&context()?, &args),
        Command::Inspect(args) => list::inspect(&context()?, &args),
        Command::Stats(args) => list::stats(&context()?, &args),
        Command::Stop(args) => lifecycle::stop(&context()?, &args),
        Command::Kill(args) => lifecycle::kill(&context()?, &args),
        Command::Rm(args) => lifecycle::rm(&context()?, &args),
        Command::Wait(args) => lifecycle::wait(&context()?, &args),
        Command::Pause(args) => lifecycle::pause(&context()?, &args, true),
        Command::Resume(args) => lifecycle::pause(&context()?, &args, false),
        Command::Cp(args) => cp::cp(&context()?, &args),
        Command::Pull(args) => images::pull(&context()?, &args),
        Command::Images(args) => images::images(&context()?, &args),
        Command::Rmi(args) => images::rmi(&context()?, &args),
        Command::Check(args) => check::check(&args),
        Command::Config(args) => config::config(&args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "testudo", &mut script);
            print(&script)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Man { folder } => {
            std::fs::create_dir_all(&folder)?;
            clap_mangen::generate_to(Cli::command(), &folder)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// To standard output; whoever closed it does not want to hear more.
pub(crate) fn print(bytes: &[u8]) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// One line.
pub(crate) fn say(line: &str) -> std::io::Result<()> {
    print(format!("{line}\n").as_bytes())
}

/// One line on standard error, after the program's name.
pub fn complain(line: &str) {
    let _ = writeln!(std::io::stderr(), "testudo: {}", line.replace('\n', " "));
}

/// Does one thing to each pod; tells all that went wrong.
pub(crate) fn each(pods: &[String], mut one: impl FnMut(&str) -> anyhow::Result<()>) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for pod in pods {
        if let Err(e) = one(pod) {
            complain(&format!("{e:#}"));
            code = ExitCode::FAILURE;
        }
    }
    code
}
