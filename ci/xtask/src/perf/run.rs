//! `cargo xtask perf run`: what `testudo run` costs: time to the first output, exec, memory.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use testudo_lab::LabSpec;

use super::{claim, in_lab, text};
use crate::cache::Cache;
use crate::{demo, guest, lab, setup, workspace};

/// Programs, guest, image twice (as a layout and unpacked), and a few guests.
const LAB_MIB: u64 = 3072;

#[derive(clap::Args)]
pub struct Args {
    /// Folder for results. [default: out/perf/run]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Without virtual time.
    #[arg(long)]
    wall: bool,
    /// Seconds after which the lab is killed.
    #[arg(long, default_value_t = 900, value_name = "SECS")]
    timeout: u64,
}

/// `perf-run`'s `Kit`.
#[derive(Serialize)]
struct Kit {
    programs: PathBuf,
    image: PathBuf,
}

/// The chore.
pub fn run(args: &Args) -> Result<ExitCode> {
    setup::ensure()?;
    let cache = Cache::open()?;
    let root = workspace::root()?;
    let cli = workspace::static_binary("testudo-cli", "testudo", "release")?;
    workspace::static_binary("testudo-vmm", "testudo-vmm", "release")?;
    let programs = cli.parent().context("a program without a folder")?;
    guest::install(&cache, programs)?;
    let kit = Kit {
        programs: programs.to_owned(),
        image: demo::image(&cache)?,
    };
    let tool = workspace::static_binary("testudo-perf", "perf-run", "lab")?;
    let (out, kit_file) = claim(&root, args.out.as_deref(), "run", &kit)?;
    let command = vec![
        text(&tool)?,
        "--kit".to_owned(),
        text(&kit_file)?,
        "--out".to_owned(),
        text(&out.path)?,
    ];
    let spec = LabSpec {
        icount: !args.wall,
        memory_mib: LAB_MIB,
        stage: lab::staged(std::slice::from_ref(&tool))?,
        timeout: Duration::from_secs(args.timeout),
        ..LabSpec::new(root, out.path.clone(), command)
    };
    in_lab(&cache, &spec)
}
