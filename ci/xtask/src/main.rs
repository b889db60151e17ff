//! `cargo xtask …`: the one entry point for the workspace's chores. Each chore is a module with an
//! `Args` struct (its flags) and a `run` function (what it does); this file only lists them.
#![allow(
    clippy::print_stdout,
    clippy::indexing_slicing,
    reason = "a developer tool: it talks to a terminal and sees no guest-controlled data"
)]
#![allow(unreachable_pub, missing_docs, reason = "a binary has no public API")]

mod cache;
mod debian;
mod demo;
mod fuzz;
mod guest;
mod lab;
mod perf;
mod setup;
mod sh;
mod size;
mod test;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "Chores of the Testudo workspace"
)]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    Demo(demo::Args),
    Fuzz(fuzz::Args),
    /// Build or fetch what a guest boots: kernels, the test initramfs.
    Guest(guest::Args),
    Lab(lab::Args),
    /// Print where a Debian package's files are, fetching and unpacking them (not installing) first.
    Package(debian::Args),
    Perf(perf::Args),
    /// Install the Debian packages that the chores need and that are missing.
    Setup(setup::Args),
    /// Build the release binaries and print how big they are.
    Size,
    Test(test::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.chore {
        Chore::Demo(args) => demo::run(&args),
        Chore::Fuzz(args) => fuzz::run(&args),
        Chore::Guest(args) => guest::run(&args).map(|()| ExitCode::SUCCESS),
        Chore::Lab(args) => lab::run(args),
        Chore::Package(args) => debian::run(&args).map(|()| ExitCode::SUCCESS),
        Chore::Perf(args) => perf::run(&args),
        Chore::Setup(args) => setup::run(&args).map(|()| ExitCode::SUCCESS),
        Chore::Size => size::run().map(|()| ExitCode::SUCCESS),
        Chore::Test(args) => test::run(&args),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
