//! `perf-boot`: the same kernel and initramfs under several VMMs, in one lab, timed from outside.
//!
//! ```text
//!  exec ──▶ first KVM_RUN ──▶ kernel entry ──▶ init ──▶ exit
//!   │           │                 │              │        └ sched_process_exit of the VMM
//!   │           │                 │              └ kvm_pio: init's first act is 0x41 to port 0x80
//!   │           │                 └ kvm_exit with the instruction pointer in the kernel's memory
//!   │           └ kvm_entry
//!   └ sched_process_exec
//! ```
//! All are the host kernel's own tracepoints on one clock, so they mean the same for every VMM and
//! ask nothing of it. In a lab with `--icount` the clock counts instructions, and figures repeat to
//! about 1 %. It runs as root in the lab; `cargo xtask perf boot` starts it there.
//!
//! Threads: one. A VMM is waited for without polling, as any wake-up would count against it.
#![allow(
    clippy::print_stdout,
    clippy::cast_precision_loss,
    clippy::indexing_slicing,
    reason = "a measuring tool: it talks to a terminal and sees no guest-controlled data"
)]

mod bars;
mod case;
mod kit;
mod measure;
mod report;
mod trace;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;

use crate::case::Case;
use crate::kit::Kit;
use crate::measure::Row;
use crate::report::Report;

#[derive(Parser)]
struct Args {
    /// Where kernels, initramfs and VMMs are: a JSON file, see `kit`.
    #[arg(long)]
    kit: PathBuf,
    /// Folder for `boot.json`, `boot.md` and the guests' consoles.
    #[arg(long)]
    out: PathBuf,
    /// Runs of each case, with and without the split; the median counts.
    #[arg(long, default_value_t = 1)]
    runs: u32,
    /// Set the host's transparent huge pages before measuring: always, madvise or never.
    #[arg(long)]
    thp: Option<String>,
    /// Only cases whose name contains one of these.
    filter: Vec<String>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let kit = Kit::read(&args.kit)?.staged()?;
    std::fs::create_dir_all(&args.out)
        .with_context(|| format!("cannot create {}", args.out.display()))?;
    if let Some(thp) = &args.thp {
        std::fs::write(testudo_perf::machine::THP, thp)
            .with_context(|| format!("cannot write `{thp}` to {}", testudo_perf::machine::THP))?;
    }
    let wanted =
        |case: &Case| args.filter.is_empty() || args.filter.iter().any(|f| case.name().contains(f));
    let mut rows: Vec<Row> = Vec::new();
    for case in case::all(&kit).iter().filter(|c| wanted(c)) {
        let warm = rows
            .iter()
            .any(|r| r.vmm == case.vmm.name() && r.times.is_some());
        let row = measure::case(case, args.runs, warm, &args.out);
        println!("{}", report::line(&row));
        rows.push(row);
    }
    let report = Report::new(&kit, rows);
    report.write(&args.out)?;
    print!("{}", report.markdown());
    Ok(())
}
