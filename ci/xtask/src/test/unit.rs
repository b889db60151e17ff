//! Unit and integration tests that need nothing but this machine.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use anyhow::{Context, Result};

use super::tally::Tally;
use crate::workspace;

/// Runs `cargo test` and shows what it says, without the names of tests that passed.
pub fn run() -> Result<Tally> {
    let mut command = workspace::cargo();
    command
        .current_dir(workspace::root()?)
        .args(["test", "--workspace", "--no-fail-fast", "--quiet"])
        .stdout(Stdio::piped());
    let mut child = command.spawn().context("cannot start cargo test")?;
    let said = child.stdout.take().context("cargo test has no stdout")?;
    let mut tally = Tally::default();
    for line in BufReader::new(said).lines() {
        let line = line.context("cannot read what cargo test says")?;
        match Tally::libtest(&line) {
            Some(more) => tally += more,
            None if is_news(&line) => println!("{line}"),
            None => {}
        }
    }
    let status = child.wait().context("cannot wait for cargo test")?;
    if !status.success() && tally.failed == 0 {
        println!(
            "FAIL unit: cargo test failed without a failed test ({status}): it did not build?"
        );
        tally.failed = 1;
    }
    Ok(tally)
}

/// Neither a heading nor a row of dots.
fn is_news(line: &str) -> bool {
    let dots = line.trim_end_matches(|c: char| c.is_ascii_digit() || c == '/' || c == ' ');
    let heading =
        line.starts_with("running ") && (line.ends_with(" tests") || line.ends_with(" test"));
    !heading && !dots.bytes().all(|b| b == b'.')
}

#[cfg(test)]
mod tests {
    use super::is_news;

    #[test]
    fn only_failures_are_news() {
        for dull in [
            "",
            "running 12 tests",
            "running 1 test",
            "......",
            "........ 87/120",
        ] {
            assert!(!is_news(dull), "{dull}");
        }
        for news in [
            "failures:",
            "..F.",
            "thread 'x' panicked at y",
            "running guests",
        ] {
            assert!(is_news(news), "{news}");
        }
    }
}
