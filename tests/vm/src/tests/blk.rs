//! Disks: what a guest writes is what the host has, and the other way round.

mod control;
mod data;
mod host;
mod load;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::batch::Test;
use crate::context::Ctx;
use crate::outcome::{Outcome, Verdict};
use crate::{ensure, running::Running};

pub(crate) fn tests() -> Vec<Test> {
    [data::TESTS, host::TESTS, control::TESTS, load::TESTS].concat()
}

const MIB: u64 = 1 << 20;

/// A sparse file of this many MiB in the test's folder.
fn image(ctx: &Ctx, name: &str, mib: u64) -> Verdict<PathBuf> {
    let path = ctx.path(name);
    File::create(&path)?.set_len(mib * MIB)?;
    Ok(path)
}

/// The same, each sector of which says where it is.
fn marked(ctx: &Ctx, name: &str, mib: u64) -> Verdict<PathBuf> {
    let path = image(ctx, name, mib)?;
    let file = File::options().write(true).open(&path)?;
    let mut content = Vec::new();
    for sector in 0..mib * MIB / 512 {
        content.extend((0..64).flat_map(|n| (sector * 64 + n).to_le_bytes()));
    }
    file.write_all_at(&content, 0)?;
    Ok(path)
}

fn disk(path: &Path, more: &str) -> [String; 2] {
    let comma = if more.is_empty() { "" } else { "," };
    let disk = format!("path={}{comma}{more}", path.display());
    ["--disk".to_owned(), disk]
}

/// Fails the test unless both files have the same bytes.
fn same(one: &Path, other: &Path) -> Verdict {
    let (a, b) = (fs::read(one)?, fs::read(other)?);
    let differs = a.iter().zip(&b).position(|(a, b)| a != b);
    ensure!(
        a.len() == b.len() && differs.is_none(),
        "{} and {} differ at {differs:?}; {} and {} bytes",
        one.display(),
        other.display(),
        a.len(),
        b.len()
    );
    Ok(())
}

/// Runs a program of the host's that has to succeed; returns what it printed.
fn host(program: &str, args: &[&str]) -> Verdict<String> {
    let done = Command::new(program).args(args).output()?;
    ensure!(
        done.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&done.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&done.stdout).trim().to_owned())
}

/// A loop device on a file; gone when this is.
struct Loop(String);

impl Loop {
    fn new(path: &Path, more: &[&str]) -> Verdict<Loop> {
        let path = path.to_string_lossy();
        let args = [&["-f", "--show"], more, &[&*path]].concat();
        match Command::new("losetup").args(&args).output() {
            Ok(done) if done.status.success() => {
                let name = String::from_utf8_lossy(&done.stdout);
                Ok(Loop(name.trim().to_owned()))
            }
            Ok(done) => Err(Outcome::Skipped(format!(
                "no loop devices: {}",
                String::from_utf8_lossy(&done.stderr).trim()
            ))),
            Err(e) => Err(Outcome::Skipped(format!("no losetup: {e}"))),
        }
    }

    fn path(&self) -> &Path {
        Path::new(&self.0)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

/// A counter of a running VM's device.
fn counter(vm: &Running<'_>, device: &str, name: &str) -> Verdict<u64> {
    let text = vm.ctl_ok(&["counters"])?;
    let counters: serde_json::Value = serde_json::from_str(&text)?;
    counters
        .get(device)
        .and_then(|d| d.get(name)?.as_u64())
        .ok_or_else(|| Outcome::Failed(format!("no counter {device}.{name} in {text}")))
}
