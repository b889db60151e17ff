//! `perf-run`: what `testudo run` costs, in one lab.
//!
//! ```text
//!  perf-run (root in the lab)
//!   ├ testudo run … echo hello    several times: exec ─▶ first output ─▶ end
//!   ├ testudo run … sleep         idle: its start's phases, PSS of CLI, supervisor and VMM, guest RAM
//!   │   └ testudo exec … true     several times
//!   └ report
//! ```
//! Everything is in memory before, and the image is unpacked. Of several runs the quickest counts: in a lab with
//! `--icount` they differ only when the clock leaps, which it does whenever the lab reads from the machine
//! below.
//!
//! `cargo xtask perf run` starts it.
#![allow(
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a measuring tool: it talks to a terminal and sees no guest-controlled data"
)]

mod report;
mod testudo;

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use serde::Serialize;
use testudo_perf::machine::Machine;

use testudo::{Kit, Stage, Timed};

#[derive(Parser)]
struct Cli {
    /// Where testudo and the image are: a JSON file, see `testudo::Kit`.
    #[arg(long)]
    kit: PathBuf,
    /// Folder for `run.json` and `run.md`.
    #[arg(long)]
    out: PathBuf,
}

/// Runs of each kind, after one that is not counted.
const RUNS: usize = 7;
/// When an idle pod has settled.
const SETTLED: Duration = Duration::from_secs(3);

/// Everything measured. Times in milliseconds, memory in KiB.
#[derive(Debug, Serialize)]
struct Measured {
    machine: Machine,
    /// `testudo run --rm … echo`: until the first output, and until its end.
    echo: Vec<Timed>,
    /// What the supervisor says of a start, in order.
    phases: Vec<(String, f64)>,
    /// `testudo exec … true`.
    exec: Vec<f64>,
    idle: Idle,
}

/// One pod that does nothing.
#[derive(Debug, Serialize)]
struct Idle {
    cli_kib: u64,
    supervisor_kib: u64,
    vmm_kib: u64,
    guest_ram_kib: u64,
}

fn main() -> Result<()> {
    let args = Cli::parse();
    let stage = Stage::make(&Kit::read(&args.kit)?)?;
    stage.echo().context("the first run")?;
    let echo: Result<Vec<Timed>> = (0..RUNS).map(|_| stage.echo()).collect();
    let pod = stage.idle()?;
    thread::sleep(SETTLED);
    let idle = pod.memory()?;
    pod.exec()?;
    let exec: Result<Vec<f64>> = (0..RUNS).map(|_| pod.exec()).collect();
    let measured = Measured {
        machine: Machine::read(None),
        echo: echo?,
        phases: pod.phases.clone(),
        exec: exec?,
        idle,
    };
    drop(pod);
    report::write(&measured, &args.out)
}
