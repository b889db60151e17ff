//! cargo-deny: licences, advisories, sources and the arrows between layers (deny.toml). Built once
//! into the cache when the machine has none.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use super::tally::Tally;
use crate::cache::Cache;
use crate::{sh, workspace};

/// What is built when there is none.
const VERSION: &str = "0.20.2";
/// Checks that need the tree only, and the one that needs the advisory database.
const OFFLINE: &[&str] = &["bans", "licenses", "sources"];
const ONLINE: &str = "advisories";

/// Each check counts for one.
pub fn run(cache: &Cache) -> Result<Tally> {
    let root = workspace::root()?;
    let mut tally = Tally::default();
    if !root.join("deny.toml").exists() {
        println!("SKIP deny: the checkout has no deny.toml");
        return Ok(Tally::SKIPPED);
    }
    let program = match program(cache) {
        Ok(program) => program,
        Err(error) => {
            println!("SKIP deny: cargo-deny could not be installed: {error:#}");
            return Ok(Tally::SKIPPED);
        }
    };
    for check in OFFLINE.iter().chain([&ONLINE]) {
        let mut command = Command::new(&program);
        command
            .current_dir(&root)
            .args(["--workspace", "--log-level", "error"]);
        command.args(["check", "--hide-inclusion-graph", check]);
        match sh::quiet(&mut command) {
            Ok(()) => {
                println!("PASS deny {check}");
                tally += Tally::PASSED;
            }
            Err(error) if *check == ONLINE && no_database(&format!("{error:#}")) => {
                println!("SKIP deny {check}: the advisory database cannot be fetched");
                tally += Tally::SKIPPED;
            }
            Err(error) => {
                println!("FAIL deny {check}: {error:#}");
                tally += Tally::FAILED;
            }
        }
    }
    Ok(tally)
}

fn no_database(said: &str) -> bool {
    said.contains("failed to fetch advisory database")
        || said.contains("failed to load advisory database")
}

fn program(cache: &Cache) -> Result<PathBuf> {
    if sh::works("cargo-deny", &["--version"]) {
        return Ok(PathBuf::from("cargo-deny"));
    }
    let entry = cache.entry("cargo-deny", &[VERSION.as_bytes()]);
    let dir = entry.get_or_build(|dir| {
        eprintln!("building cargo-deny {VERSION}: minutes, once");
        let mut command = workspace::cargo();
        command
            .args([
                "install",
                "--locked",
                "--quiet",
                "--version",
                VERSION,
                "--root",
            ])
            .arg(dir);
        // Its build is not worth keeping, and must not wait for (or hold up) the checkout's.
        command
            .arg("--target-dir")
            .arg(dir.join("target"))
            .arg("cargo-deny");
        sh::quiet(&mut command)?;
        Ok(std::fs::remove_dir_all(dir.join("target"))?)
    })?;
    Ok(dir.join("bin/cargo-deny"))
}
