//! The `testudo-vmm` binary: parses, runs, and turns what came of it into an exit status.

use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use testudo_vmm::cli::{Cli, Command, PlanArgs};
use testudo_vmm::plan::Plan;
use testudo_vmm::{heap, host, run, seccomp, spec};

mod logger;

fn main() -> ExitCode {
    let started = Instant::now();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    logger::install(cli.log_level);
    match dispatch(cli.command, started) {
        Ok(code) => code,
        Err(error) => {
            complain(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: Command, started: Instant) -> anyhow::Result<ExitCode> {
    let mut stdout = std::io::stdout().lock();
    match command {
        Command::Run(machine) => {
            drop(stdout);
            heap::fix_arenas();
            let ended = run::run(machine.into_spec()?, started)?;
            return Ok(ExitCode::from(run::exit_status(ended)));
        }
        Command::Plan(args) => writeln!(stdout, "{}", plan(*args)?)?,
        Command::Schema => {
            let schema = schemars::schema_for!(spec::Config);
            writeln!(stdout, "{}", serde_json::to_string_pretty(&schema)?)?;
        }
        Command::Ctl(args) => args.run(&mut stdout)?,
        Command::SeccompProbe { thread } => {
            let kind = seccomp::ThreadKind::from_name(&thread)
                .ok_or_else(|| anyhow::anyhow!("{thread} is no kind of thread"))?;
            seccomp::probe(kind)?;
            anyhow::bail!("the call was let through");
        }
        Command::KeepTerminal { saved } => testudo_vmm::keep_terminal(&saved)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn plan(args: PlanArgs) -> anyhow::Result<String> {
    if args.host_json {
        let kvm = args
            .machine
            .kvm
            .unwrap_or(spec::Source::Path("/dev/kvm".into()));
        let facts = host::Host::probe(&run::open_kvm(&kvm)?)?.facts;
        return Ok(serde_json::to_string_pretty(&facts)?);
    }
    let spec = args.machine.into_spec()?;
    let facts = match args.host {
        Some(path) => {
            let text = std::fs::read_to_string(&path)
                .map_err(|e| anyhow::anyhow!("cannot read {}: {e}", path.display()))?;
            serde_json::from_str(&text)
                .map_err(|e| anyhow::anyhow!("{} is not a host description: {e}", path.display()))?
        }
        None => host::Host::probe(&run::open_kvm(&spec.kvm)?)?.facts,
    };
    Ok(serde_json::to_string_pretty(&Plan::new(&spec, facts)?)?)
}

/// Help and version go to stdout; a wrong command line is one line on stderr.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let text = error.to_string();
    let first = text.lines().next().unwrap_or("wrong command line");
    let first = first.strip_prefix("error: ").unwrap_or(first);
    // A missing argument is named on the lines that follow.
    let more: Vec<&str> = text
        .lines()
        .skip(1)
        .take_while(|l| l.starts_with("  "))
        .map(str::trim)
        .collect();
    complain(&format!(
        "{first} {}(see testudo-vmm --help)",
        more.iter().fold(String::new(), |s, m| s + m + " ")
    ));
    ExitCode::FAILURE
}

fn complain(message: &str) {
    let _ = writeln!(
        std::io::stderr(),
        "testudo-vmm: {}",
        message.replace('\n', " ")
    );
}
