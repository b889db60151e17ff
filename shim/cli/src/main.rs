//! The binary `testudo`: a command of a person, or a pod's supervisor.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use testudo_cli::args::Cli;
use testudo_cli::{commands, supervise};

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    // Before anything else: a supervisor has no use for flags, help and all that.
    if let Some((first, rest)) = words.split_first()
        && first == supervise::WORD
    {
        return match supervise::Orders::from_arguments(rest) {
            Some(orders) => supervise::main(&orders),
            None => {
                commands::complain("supervise is for testudo itself; see testudo run");
                ExitCode::FAILURE
            }
        };
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            // As Docker has it, and unlike what a container returns.
            return ExitCode::from(if error.use_stderr() { 125 } else { 0 });
        }
    };
    match commands::dispatch(cli.command) {
        Ok(code) => code,
        Err(error) => {
            commands::complain(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}
