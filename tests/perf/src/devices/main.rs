//! `perf-devices`: the same guest, userland and workload under testudo-vmm and under QEMU, in one lab.
//!
//! ```text
//!  perf-devices run (root in the lab)                    guest (512 MiB, one CPU, our kernel)
//!   ├ cgroup: VMM, and virtiofsd where there is one ◀───▶ bash: READY step · work · DONE step
//!   ├ peer threads: TCP, vsock                     ◀───▶ perf-devices work tcp|vsock|fs …, fio
//!   └ report
//! ```
//! A step's rate is told by the guest's own clock. What the VMM spent is the cgroup's CPU time less
//! the time its vCPU ran the guest, between READY and DONE, at each of which the guest waits for us. In
//! a lab with `--icount` the clock counts instructions of the one CPU that everything shares: a rate
//! is a measure of all work that was done for it, in guest, VMM and host kernel.
//!
//! `cargo xtask perf devices` starts it.
#![allow(
    clippy::print_stdout,
    clippy::cast_precision_loss,
    clippy::indexing_slicing,
    reason = "a measuring tool: it talks to a terminal and sees no guest-controlled data"
)]

mod bars;
mod case;
mod hang;
mod host;
mod kit;
mod report;
mod session;
mod steps;
mod usage;
mod work;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use crate::case::Group;
use crate::kit::Kit;
use crate::report::Report;

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// In the lab: everything.
    Run(Run),
    /// In the guest: one step's work.
    Work(work::Args),
}

#[derive(clap::Args)]
struct Run {
    /// Where kernel, initramfs, userland and VMMs are: a JSON file, see `kit`.
    #[arg(long)]
    kit: PathBuf,
    /// Folder for `devices.json`, `devices.md` and the guests' consoles.
    #[arg(long)]
    out: PathBuf,
    /// Only these groups.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Group>,
    /// Before each step run this in a shell, with its name in $STEP, the VMM's process in $PID, and
    /// tell it to end after the step: a profiler.
    #[arg(long)]
    beside: Option<String>,
    /// Only steps whose name contains this.
    #[arg(long, default_value = "")]
    step: String,
    /// Only our VMM.
    #[arg(long)]
    ours: bool,
}

fn main() -> Result<()> {
    match Cli::parse().what {
        What::Run(args) => run(&args),
        What::Work(args) => work::run(&args),
    }
}

fn run(args: &Run) -> Result<()> {
    let kit = Kit::read(&args.kit)?.staged()?;
    std::fs::create_dir_all(&args.out)
        .with_context(|| format!("cannot create {}", args.out.display()))?;
    let host = host::prepare()?;
    let mut report = Report::new(&kit);
    for group in Group::ALL {
        if !args.only.is_empty() && !args.only.contains(&group) {
            continue;
        }
        for case in case::cases(group).iter().copied() {
            if args.ours && case.compared_with().is_some() {
                continue;
            }
            let wanted = session::Wanted {
                beside: args.beside.as_deref(),
                step: &args.step,
            };
            report.add(session::run(&kit, &host, case, &wanted, &args.out));
        }
    }
    report.write(&args.out)?;
    print!("{}", report.markdown());
    Ok(())
}
