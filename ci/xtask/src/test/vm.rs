//! Tests of virtual machines. The runner `vm-tests` says which labs it needs (batches); each is
//! booted once and runs its batch. What the runner is given:
//!
//! ```text
//! vm-tests --list-batches                                    on this machine; a JSON line each: Batch
//! vm-tests --batch NAME --junit FILE --journal FILE --kernels KIT.json [--filter TEXT]    in the lab
//! ```
//! KIT.json is a [`GuestKit`]. It prints `PASS name (secs)`, `FAIL name: why`, `SKIP name: why`,
//! closes with `N passed, N failed, N skipped`, and its exit status is 0 if and only if none failed.

use std::collections::VecDeque;
use std::fs;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use testudo_lab::{Kit, LabSpec};

use super::kvm;
use super::lab_run::run_in_lab;
use super::tally::Tally;
use crate::cache::Cache;
use crate::guest::Contents;
use crate::lab::Out;
use crate::{guest, lab, sh, workspace};

/// Labs that one batch may use up. Each goes on where the one before stopped, and a test that takes
/// two labs with it fails, so the batch as a whole gets on.
const LABS: u32 = 8;

/// Labs beside one another. Each has one emulated CPU and a few gigabytes.
const LABS_AT_A_TIME: usize = 2;

/// The shape of a lab and the name of what runs in it.
#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Batch {
    batch: String,
    #[serde(default = "one")]
    cpus: u32,
    #[serde(default = "two_gib")]
    memory: String,
    #[serde(default)]
    icount: bool,
    #[serde(default)]
    iommu: bool,
    #[serde(default)]
    hugepages: u64,
    #[serde(default)]
    devices: Vec<String>,
    #[serde(default)]
    modules: Vec<String>,
    /// Seconds.
    #[serde(default = "half_an_hour")]
    timeout: u64,
}

fn one() -> u32 {
    1
}

fn two_gib() -> String {
    "2G".to_owned()
}

fn half_an_hour() -> u64 {
    1800
}

/// What guests are made of: paths, the same in the lab as here.
#[derive(Clone, Serialize)]
struct GuestKit {
    /// testudo-vmm, static, profile `lab`.
    vmm: PathBuf,
    /// testudo, static, profile `release`.
    testudo: PathBuf,
    /// Our kernel.
    own: KernelForms,
    /// Debian's cloud kernel.
    stock: KernelForms,
    /// Our init, with the modules that the stock kernel needs.
    initramfs: PathBuf,
    /// Our init and nothing else, for our kernel.
    initramfs_bare: PathBuf,
    /// The same, padded to 2 MiB, for measurements.
    initramfs_2m: PathBuf,
    /// The agent and nothing else, for our kernel.
    initramfs_agent: PathBuf,
    /// A Debian userland, as a disk.
    userland: PathBuf,
    /// The same, as a folder.
    userland_folder: PathBuf,
}

#[derive(Clone, Serialize)]
struct KernelForms {
    bzimage: PathBuf,
    vmlinux: PathBuf,
}

impl From<guest::Images> for KernelForms {
    fn from(images: guest::Images) -> KernelForms {
        KernelForms {
            bzimage: images.bzimage,
            vmlinux: images.vmlinux,
        }
    }
}

/// The stage: all batches, or those named.
pub fn run(cache: &Cache, only: &[String], filter: Option<&str>) -> Result<Tally> {
    let labs = lab::kit(cache)?;
    let wanted = |name: &str| only.is_empty() || only.iter().any(|o| o == name);
    let mut tally = Tally::default();
    if wanted(kvm::BATCH) && filter.is_none() {
        tally += kvm::run(&labs)?;
    }
    if only.iter().all(|o| o == kvm::BATCH) && !only.is_empty() {
        return Ok(tally);
    }
    let userland = guest::userland(cache)?;
    let guests = GuestKit {
        vmm: workspace::static_binary("testudo-vmm", "testudo-vmm", "release")?,
        testudo: workspace::static_binary("testudo-cli", "testudo", "release")?,
        own: guest::kernel(cache)?.into(),
        stock: guest::stock(cache)?.into(),
        initramfs: guest::initramfs(cache, Contents::Modules)?,
        initramfs_bare: guest::initramfs(cache, Contents::Bare)?,
        initramfs_2m: guest::initramfs(cache, Contents::Padded(2 << 20))?,
        initramfs_agent: guest::initramfs(cache, Contents::Agent)?,
        userland: userland.image,
        userland_folder: userland.folder,
    };
    let runner = workspace::static_binary("testudo-vm-tests", "vm-tests", "lab")?;
    let mut queue = batches(&runner)?;
    queue.retain(|b| wanted(&b.batch));
    // The longest first, so that no lab is alone at the end.
    queue.sort_by_key(|b| std::cmp::Reverse(b.timeout));
    tally += side_by_side(queue, |batch| {
        run_batch(&labs, &guests, &runner, batch, filter)
    })?;
    Ok(tally)
}

/// Runs the batches, as many at a time as this machine has CPUs, up to [`LABS_AT_A_TIME`].
fn side_by_side(queue: Vec<Batch>, run: impl Fn(&Batch) -> Result<Tally> + Sync) -> Result<Tally> {
    let cpus = thread::available_parallelism().map_or(1, NonZero::get);
    let lanes = cpus.min(LABS_AT_A_TIME).min(queue.len());
    let queue = Mutex::new(VecDeque::from(queue));
    let next = || {
        let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.pop_front()
    };
    let lane = || {
        let mut tally = Tally::default();
        while let Some(batch) = next() {
            tally += run(&batch)?;
        }
        Ok(tally)
    };
    thread::scope(|scope| {
        let lanes: Vec<_> = (0..lanes).map(|_| scope.spawn(lane)).collect();
        lanes
            .into_iter()
            .try_fold(Tally::default(), |mut sum, lane| {
                let ended = lane.join().unwrap_or_else(|_| bail!("a lane panicked"));
                sum += ended?;
                Ok(sum)
            })
    })
}

fn batches(runner: &Path) -> Result<Vec<Batch>> {
    let listed = sh::read(Command::new(runner).arg("--list-batches"))?;
    listed
        .lines()
        .map(|l| {
            serde_json::from_str(l).with_context(|| format!("vm-tests lists a batch as `{l}`"))
        })
        .collect()
}

/// One batch from start to end. Its programs are copied first, for the checkout may be built anew
/// while it runs.
fn run_batch(
    labs: &Kit,
    guests: &GuestKit,
    runner: &Path,
    batch: &Batch,
    filter: Option<&str>,
) -> Result<Tally> {
    let root = workspace::root()?;
    let out = Out::claim(&root, Some(&root.join("out/test").join(&batch.batch)))?;
    let copy = |program: &Path, name: &str| {
        let to = out.path.join(name);
        fs::copy(program, &to).with_context(|| format!("cannot copy {}", program.display()))?;
        Ok::<_, anyhow::Error>(to)
    };
    let runner = copy(runner, "vm-tests")?;
    let guests = GuestKit {
        vmm: copy(&guests.vmm, "testudo-vmm")?,
        testudo: copy(&guests.testudo, "testudo")?,
        ..guests.clone()
    };
    let kit_file = out.path.join("guests.json");
    fs::write(&kit_file, serde_json::to_vec_pretty(&guests)?)
        .with_context(|| format!("cannot write {}", kit_file.display()))?;
    let junit = out.path.join("junit.xml");
    // Of an earlier run; within this one it tells a second lab what the first has done.
    let journal = out.path.join("journal");
    let _ = fs::remove_file(&journal);
    let mut command = vec![path(&runner)?, "--batch".to_owned(), batch.batch.clone()];
    command.extend([
        "--junit".to_owned(),
        path(&junit)?,
        "--journal".to_owned(),
        path(&journal)?,
        "--kernels".to_owned(),
        path(&kit_file)?,
    ]);
    command.extend(
        filter
            .iter()
            .flat_map(|f| ["--filter".to_owned(), (*f).to_owned()]),
    );
    let memory = lab::mebibytes(&batch.memory).map_err(anyhow::Error::msg)?;
    let spec = LabSpec {
        cpus: batch.cpus,
        memory_mib: memory,
        icount: batch.icount,
        iommu: batch.iommu,
        hugepages: batch.hugepages,
        devices: batch.devices.clone(),
        modules: batch.modules.clone(),
        timeout: Duration::from_secs(batch.timeout),
        ..LabSpec::new(root, out.path.clone(), command)
    };
    let name = batch.batch.as_str();
    println!("-- batch {name} ({} CPUs, {})", batch.cpus, batch.memory);
    let ran = run_in_lab(labs, &spec, name, LABS).map(|ran| (ran.status, closing_line(&ran.said)));
    Ok(match ran {
        Ok((status, Some(tally))) if (status == 0) == (tally.failed == 0) => tally,
        Ok((status, Some(mut tally))) => {
            println!("FAIL {name}: vm-tests returned {status}, which its closing line contradicts");
            tally += Tally::FAILED;
            tally
        }
        Ok((status, None)) => {
            println!("FAIL {name}: vm-tests returned {status} without a closing line");
            Tally::FAILED
        }
        Err(error) => {
            println!("FAIL {name}: {:#}", anyhow::Error::from(error));
            Tally::FAILED
        }
    })
}

fn closing_line(said: &str) -> Option<Tally> {
    said.lines()
        .rfind(|l| !l.trim().is_empty())
        .and_then(Tally::closing)
}

fn path(path: &Path) -> Result<String> {
    path.to_str()
        .map(str::to_owned)
        .with_context(|| format!("{} is not UTF-8", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_batch_is_run_once_and_counted() {
        let batch = |n: u32| Batch {
            batch: format!("b{n}"),
            ..serde_json::from_str(r#"{"batch":"x"}"#).unwrap()
        };
        let seen = Mutex::new(Vec::new());
        let run = |batch: &Batch| {
            seen.lock().unwrap().push(batch.batch.clone());
            Ok(Tally::PASSED)
        };
        let tally = side_by_side((0..5).map(batch).collect(), run).unwrap();
        let mut seen = seen.into_inner().unwrap();
        seen.sort();
        assert_eq!(seen, ["b0", "b1", "b2", "b3", "b4"]);
        assert_eq!(tally.passed, 5);
        assert!(side_by_side(vec![batch(0)], |_| bail!("no")).is_err());
        assert_eq!(side_by_side(Vec::new(), |_| bail!("no")).unwrap().passed, 0);
    }

    #[test]
    fn a_batch_is_small_unless_it_says_more() {
        let plain: Batch = serde_json::from_str(r#"{"batch":"default"}"#).unwrap();
        assert_eq!(
            (plain.cpus, plain.memory.as_str(), plain.icount),
            (1, "2G", false)
        );
        let big: Batch = serde_json::from_str(
            r#"{"batch":"big","cpus":2,"memory":"8G","icount":false,"hugepages":64}"#,
        )
        .unwrap();
        assert_eq!((big.cpus, big.hugepages), (2, 64));
        assert!(serde_json::from_str::<Batch>(r#"{"batch":"x","cpu":2}"#).is_err());
    }

    #[test]
    fn the_closing_line_is_the_last_that_is_not_empty() {
        let said = "PASS a (1 s)\n1 passed, 0 failed, 0 skipped\n\n";
        assert_eq!(closing_line(said), Some(Tally::PASSED));
        assert_eq!(
            closing_line("1 passed, 0 failed, 0 skipped\nkilled\n"),
            None
        );
    }
}
