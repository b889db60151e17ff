//! `cargo xtask fuzz`: builds the targets of `tests/fuzz` and runs each for a while.
//!
//! No cargo-fuzz and no nightly Rust: coverage instrumentation is an LLVM pass that any rustc can be
//! told to run, and libFuzzer comes with the crate `libfuzzer-sys`. What a run has learnt is kept in
//! `target/fuzz/corpus`; a failure leaves its input and a log in `out/fuzz`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};

use crate::test::Tally;
use crate::{setup, sh, workspace};

/// Edges counted inline, comparisons traced: what libFuzzer feeds on. `cfg(fuzzing)` is what
/// cargo-fuzz sets, and crates know it.
const RUSTFLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1";
/// A single input may take so long and a target so much memory.
const INPUT_SECONDS: u32 = 10;
const MEMORY_MIB: u32 = 1024;
/// Lines of a log that a failure shows.
const TAIL: usize = 25;

/// Fuzzes what guests, images and clients control. Prints one line per target.
#[derive(clap::Args)]
pub struct Args {
    /// How long each target runs.
    #[arg(long, default_value_t = 10, value_name = "N")]
    seconds: u32,
    /// Run this one input instead, against the one target named.
    #[arg(long, value_name = "FILE", requires = "targets")]
    input: Option<PathBuf>,
    /// Only these targets. [default: all in tests/fuzz/targets]
    targets: Vec<String>,
}

/// The chore.
pub fn run(args: &Args) -> Result<ExitCode> {
    setup::ensure()?;
    let tally = match &args.input {
        Some(input) => reproduce(&args.targets, input)?,
        None => run_targets(&args.targets, args.seconds)?,
    };
    println!("{tally}");
    Ok(if tally.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Runs the targets named, or all, for so many seconds each.
pub fn run_targets(names: &[String], seconds: u32) -> Result<Tally> {
    let targets = targets(names)?;
    let binaries = match build(&targets)? {
        Ok(dir) => dir,
        Err(why) => {
            let mut tally = Tally::default();
            for target in &targets {
                println!("SKIP fuzz {target}: {why}");
                tally += Tally::SKIPPED;
            }
            return Ok(tally);
        }
    };
    let mut tally = Tally::default();
    for target in &targets {
        tally += fuzz(&binaries, target, seconds)?;
    }
    Ok(tally)
}

/// The names of all targets, or those asked for.
fn targets(names: &[String]) -> Result<Vec<String>> {
    let dir = here()?.join("targets");
    let mut all: Vec<String> = fs::read_dir(&dir)
        .with_context(|| format!("cannot list {}", dir.display()))?
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let rust = path.extension()? == "rs";
            rust.then(|| Some(path.file_stem()?.to_str()?.to_owned()))?
        })
        .collect();
    all.sort();
    if names.is_empty() {
        return Ok(all);
    }
    match names.iter().find(|name| !all.contains(name)) {
        Some(name) => bail!("no fuzz target {name}; there are {}", all.join(", ")),
        None => Ok(names.to_vec()),
    }
}

/// The folder with the binaries, or why they cannot be had here.
fn build(targets: &[String]) -> Result<Result<PathBuf, String>> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    if !sh::works(&compiler, &["--version"]) {
        return Ok(Err(format!(
            "no C++ compiler `{compiler}`; libFuzzer is C++"
        )));
    }
    let target_dir = target_dir()?;
    let mut command = workspace::cargo();
    command
        .current_dir(here()?)
        .env("RUSTFLAGS", RUSTFLAGS)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .args([
            "build",
            "--quiet",
            "--release",
            "--target",
            workspace::TARGET,
        ])
        .arg("--target-dir")
        .arg(&target_dir);
    for target in targets {
        command.args(["--bin", target]);
    }
    sh::live(&mut command).context("cannot build the fuzz targets")?;
    Ok(Ok(target_dir.join(workspace::TARGET).join("release")))
}

fn fuzz(binaries: &Path, target: &str, seconds: u32) -> Result<Tally> {
    let corpus = target_dir()?.join("corpus").join(target);
    let out = workspace::root()?.join("out/fuzz").join(target);
    for dir in [&corpus, &out] {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let log = out.join("log");
    let file = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
    let mut command = Command::new(binaries.join(target));
    command
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-timeout={INPUT_SECONDS}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
        .arg(format!("-artifact_prefix={}/", out.display()))
        .args(["-print_final_stats=1", "-detect_leaks=0"])
        .arg(&corpus)
        .arg(here()?.join("seeds").join(target))
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(file);
    let status = command
        .status()
        .with_context(|| format!("cannot start the fuzz target {target}"))?;
    let said = fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
    let said = String::from_utf8_lossy(&said);
    if status.success() {
        println!("PASS fuzz {target}: {}", effort(&said, seconds));
        return Ok(Tally::PASSED);
    }
    println!(
        "FAIL fuzz {target}: {status}; input and log in {}",
        out.display()
    );
    let lines: Vec<&str> = said.lines().collect();
    for line in lines.iter().skip(lines.len().saturating_sub(TAIL)) {
        println!("    {line}");
    }
    Ok(Tally::FAILED)
}

/// Runs one input against one target, with everything it says on the terminal.
fn reproduce(names: &[String], input: &Path) -> Result<Tally> {
    let [target] = targets(names)?
        .try_into()
        .map_err(|_| anyhow::anyhow!("--input goes with one target"))?;
    let input = input
        .canonicalize()
        .with_context(|| format!("cannot find {}", input.display()))?;
    match build(std::slice::from_ref(&target))? {
        Ok(binaries) => {
            let status = Command::new(binaries.join(&target)).arg(input).status()?;
            Ok(if status.success() {
                Tally::PASSED
            } else {
                Tally::FAILED
            })
        }
        Err(why) => bail!("cannot fuzz here: {why}"),
    }
}

/// `123456 inputs in 10 s, 582 edges`, from libFuzzer's last words.
fn effort(said: &str, seconds: u32) -> String {
    let inputs = said
        .lines()
        .find_map(|l| l.strip_prefix("stat::number_of_executed_units:"))
        .map_or("?", str::trim);
    let edges = said
        .lines()
        .rev()
        .find_map(|l| l.split_once(" cov: ")?.1.split_whitespace().next())
        .unwrap_or("?");
    format!("{inputs} inputs in {seconds} s, {edges} edges covered")
}

fn here() -> Result<PathBuf> {
    Ok(workspace::root()?.join("tests/fuzz"))
}

/// Apart from the workspace's own, whose artifacts are built without instrumentation.
fn target_dir() -> Result<PathBuf> {
    Ok(workspace::target_dir(&workspace::root()?).join("fuzz"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_seeds() {
        let targets = targets(&[]).unwrap();
        assert!(targets.len() >= 5, "{targets:?}");
        for target in targets {
            let seeds = here().unwrap().join("seeds").join(&target);
            assert!(fs::read_dir(&seeds).unwrap().next().is_some(), "{target}");
        }
        let error = super::targets(&["nothing".to_owned()])
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("no fuzz target nothing; there are "),
            "{error}"
        );
    }

    #[test]
    fn effort_is_read_from_the_log() {
        let log = "#5\tINITED cov: 359 ft: 403\n#99\tDONE   cov: 582 ft: 2502 corp: 4\nstat::number_of_executed_units: 646465\n";
        assert_eq!(effort(log, 3), "646465 inputs in 3 s, 582 edges covered");
    }
}
