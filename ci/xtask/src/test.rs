//! `cargo xtask test`: everything that is checked, in the order of what it costs.
//!
//! ```text
//! set-up ▶ fmt ▶ clippy ▶ deny ▶ unit tests ▶ fuzz ▶ VM tests (one lab per batch)
//! ```
//! Each stage runs whatever the one before said, and adds to one [`Tally`]; the last line is its sum.

mod deny;
#[cfg(test)]
mod known_holes;
mod kvm;
mod lab_run;
mod tally;
mod unit;
mod vm;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::ValueEnum;

use crate::cache::Cache;
use crate::{fuzz, setup, sh, workspace};
pub use tally::Tally;

/// How long each fuzz target runs: enough to find what is shallow, and the corpus grows.
const FUZZ_SECONDS: u32 = 5;

/// Checks everything and closes with `N passed, N failed, N skipped`.
#[derive(clap::Args)]
pub struct Args {
    /// Only these stages.
    #[arg(value_enum)]
    stages: Vec<Stage>,
    /// VM tests: only these batches. Repeatable.
    #[arg(long, value_name = "NAME")]
    batch: Vec<String>,
    /// VM tests: only tests whose name contains this.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stage {
    /// Formatting.
    Fmt,
    /// Lints, of which none may be left.
    Clippy,
    /// Licences, advisories and layers of dependencies.
    Deny,
    /// Tests that run on this machine.
    Unit,
    /// Fuzz targets, a few seconds each.
    Fuzz,
    /// Tests of virtual machines, in the lab.
    Vm,
}

/// The chore.
pub fn run(args: &Args) -> Result<ExitCode> {
    setup::ensure()?;
    let cache = Cache::open()?;
    let all = [
        Stage::Fmt,
        Stage::Clippy,
        Stage::Deny,
        Stage::Unit,
        Stage::Fuzz,
        Stage::Vm,
    ];
    let mut sum = Tally::default();
    for stage in all {
        if !args.stages.is_empty() && !args.stages.contains(&stage) {
            continue;
        }
        let name = stage
            .to_possible_value()
            .map_or_else(String::new, |v| v.get_name().to_owned());
        println!("== {name}");
        let begun = Instant::now();
        let tally = match stage {
            Stage::Fmt => one("fmt", &["fmt", "--version"], &["fmt", "--all", "--check"])?,
            Stage::Clippy => one(
                "clippy",
                &["clippy", "--version"],
                &[
                    "clippy",
                    "--workspace",
                    "--all-targets",
                    "--quiet",
                    "--",
                    "-D",
                    "warnings",
                ],
            )?,
            Stage::Deny => deny::run(&cache)?,
            Stage::Unit => unit::run()?,
            Stage::Fuzz => fuzz::run_targets(&[], FUZZ_SECONDS)?,
            Stage::Vm => vm::run(&cache, &args.batch, args.filter.as_deref())?,
        };
        println!(
            "== {name}: {tally} ({:.1} s)",
            begun.elapsed().as_secs_f64()
        );
        sum += tally;
    }
    println!("{sum}");
    Ok(if sum.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// A check that passes or fails as a whole, or is skipped where cargo has no such command.
fn one(name: &str, probe: &[&str], arguments: &[&str]) -> Result<Tally> {
    let mut command = workspace::cargo();
    if !command
        .args(probe)
        .output()
        .is_ok_and(|o| o.status.success())
    {
        println!("SKIP {name}: this cargo has no `cargo {name}`; install it with rustup or apt");
        return Ok(Tally::SKIPPED);
    }
    let mut command = workspace::cargo();
    match sh::live(command.current_dir(workspace::root()?).args(arguments)) {
        Ok(()) => {
            println!("PASS {name}");
            Ok(Tally::PASSED)
        }
        Err(error) => {
            println!("FAIL {name}: {error:#}");
            Ok(Tally::FAILED)
        }
    }
}
