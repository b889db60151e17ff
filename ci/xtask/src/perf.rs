//! `cargo xtask perf`: measurements, made in the lab in virtual time.

mod boot;
mod devices;
mod run;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde::Serialize;
use testudo_lab::{LabSpec, Streams};

use crate::cache::Cache;
use crate::lab::Out;
use crate::{lab, workspace};

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// Firmware of both machine types, and where it is linked to.
const FIRMWARE: &[&str] = &["/usr/share/qemu", "/usr/share/seabios"];

/// Measures Testudo beside its peers, in the lab, in virtual time (one instruction is 1 ns).
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// From exec of the VMM to the guest's init and to the end, for testudo-vmm and for QEMU.
    Boot(boot::Args),
    /// Disks, network, vsock, shared folders and memory, for testudo-vmm and for QEMU.
    Devices(devices::Args),
    /// `testudo run`: from exec to the first output, exec, memory.
    Run(run::Args),
}

/// The chore.
pub fn run(args: &Args) -> Result<ExitCode> {
    match &args.what {
        What::Boot(args) => boot::run(args),
        What::Devices(args) => devices::run(args),
        What::Run(args) => run::run(args),
    }
}

/// The build of testudo-vmm that was asked for, or the release one.
fn vmm(asked: Option<&Path>) -> Result<PathBuf> {
    match asked {
        Some(vmm) => Ok(std::path::absolute(vmm)?),
        None => workspace::static_binary("testudo-vmm", "testudo-vmm", "release"),
    }
}

/// Where results go, with the kit that says what is measured in `kit.json`.
fn claim(
    root: &Path,
    dir: Option<&Path>,
    name: &str,
    kit: &impl Serialize,
) -> Result<(Out, PathBuf)> {
    let usual = root.join("out/perf").join(name);
    let out = Out::claim(root, Some(dir.unwrap_or(&usual)))?;
    let kit_file = out.path.join("kit.json");
    fs::write(&kit_file, serde_json::to_vec_pretty(kit)?)
        .with_context(|| format!("cannot write {}", kit_file.display()))?;
    Ok((out, kit_file))
}

/// Runs a measuring tool in a lab of virtual time, to its end.
fn in_lab(cache: &Cache, spec: &LabSpec) -> Result<ExitCode> {
    let (mut stdout, mut stderr) = (io::stdout(), io::stderr());
    let streams = Streams {
        out: &mut stdout,
        err: &mut stderr,
        stdin: None,
    };
    let outcome = testudo_lab::run(&lab::kit(cache)?, spec, lab::environment(spec), streams)?;
    eprintln!("perf: results in {}", spec.out.display());
    Ok(ExitCode::from(
        u8::try_from(outcome.status).unwrap_or(u8::MAX),
    ))
}

/// Files to bring into the lab's memory: these, the libraries they need, and QEMU's firmware.
fn staged(files: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut stage = lab::staged(files)?;
    stage.extend(FIRMWARE.iter().map(PathBuf::from).filter(|p| p.exists()));
    Ok(stage)
}

fn text(path: &Path) -> Result<String> {
    path.to_str()
        .map(str::to_owned)
        .with_context(|| format!("{} is not UTF-8", path.display()))
}
