//! `vm-tests`: runs one batch of VM tests, in the lab or on any host with a usable `/dev/kvm`.
#![allow(clippy::print_stdout, reason = "it reports on stdout")]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use testudo_vm_tests::batch::{BATCHES, SELF_TEST, tests_of};
use testudo_vm_tests::{Images, runner};

#[derive(Parser)]
#[command(about = "VM tests of testudo-vmm")]
struct Cli {
    /// Print the batches and the labs they need, one JSON object a line.
    #[arg(long)]
    list_batches: bool,
    /// Print the names of the batch's tests instead of running them.
    #[arg(long, requires = "batch")]
    list: bool,
    /// The batch to run.
    #[arg(long, required_unless_present = "list_batches")]
    batch: Option<String>,
    /// Run the tests whose names contain this.
    #[arg(long, default_value = "")]
    filter: String,
    /// Write a JUnit report.
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Keep in this file what has run, and do not run again what it says has.
    #[arg(long, value_name = "FILE")]
    journal: Option<PathBuf>,
    /// JSON file that says where the VMM, kernels and initramfs are.
    #[arg(long, value_name = "FILE")]
    kernels: Option<PathBuf>,
}

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    if cli.list_batches {
        for batch in &BATCHES {
            println!("{}", serde_json::to_string(batch)?);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let name = cli.batch.unwrap_or_default();
    let tests =
        tests_of(&name).with_context(|| format!("there is no batch {name}: see --list-batches"))?;
    if cli.list {
        for test in &tests {
            println!("{}", test.name);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let images = match &cli.kernels {
        Some(path) => images(path)?,
        None if name == SELF_TEST => Images::default(),
        None => bail!("--kernels is missing: the file that says where VMM and kernels are"),
    };
    let options = runner::Options {
        filter: &cli.filter,
        junit: cli.junit.as_deref(),
        journal: cli.journal.as_deref(),
    };
    let passed = runner::run(&name, &tests, &images, options)?;
    Ok(if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Reads the list. A missing file would fail every test with a riddle.
fn images(list: &Path) -> Result<Images> {
    let text =
        std::fs::read_to_string(list).with_context(|| format!("cannot read {}", list.display()))?;
    let images: Images = serde_json::from_str(&text)
        .with_context(|| format!("cannot understand {}", list.display()))?;
    for path in [
        &images.vmm,
        &images.testudo,
        &images.own.bzimage,
        &images.own.vmlinux,
        &images.stock.bzimage,
        &images.stock.vmlinux,
        &images.initramfs,
        &images.initramfs_bare,
        &images.initramfs_agent,
        &images.userland,
    ] {
        if !path.is_file() {
            bail!(
                "{} names {}, and there is no such file",
                list.display(),
                path.display()
            );
        }
    }
    Ok(images)
}
