//! `cargo xtask size`: how big the release binaries are.

use std::process::Command;

use anyhow::{Context, Result};

use crate::{sh, workspace};

/// Builds every binary that is shipped (those of ci/ and tests/ are not) and prints a line for each.
pub fn run() -> Result<()> {
    let shipped = workspace::binaries()?;
    for binary in shipped
        .iter()
        .filter(|b| !b.folder.starts_with("ci") && !b.folder.starts_with("tests"))
    {
        let path = workspace::static_binary(&binary.package, &binary.name, "release")?;
        let bytes = std::fs::metadata(&path)
            .with_context(|| format!("no {}", path.display()))?
            .len();
        // Berkeley format: text data bss dec hex filename, under a heading.
        let sections = sh::read(Command::new("size").arg(&path))?;
        let numbers: Vec<&str> = sections
            .lines()
            .nth(1)
            .unwrap_or_default()
            .split_whitespace()
            .take(3)
            .collect();
        println!(
            "{}: {} KiB, statically linked (text data bss: {})",
            binary.name,
            bytes / 1024,
            numbers.join(" ")
        );
    }
    Ok(())
}
