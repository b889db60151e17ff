//! `testudo` as a person uses it, from files in memory.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{MountFlags, mount};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use testudo_perf::memory;

use crate::Idle;

/// A tmpfs of this process's own.
const STAGE: &str = "/run/perf-run";
const POD: &str = "perf";

/// What the caller has prepared.
#[derive(Debug, Deserialize)]
pub(crate) struct Kit {
    /// A folder with `testudo`, `testudo-vmm` and `testudo-guest`.
    programs: PathBuf,
    /// An OCI layout whose image has `echo`, `sleep` and `true`.
    image: PathBuf,
}

impl Kit {
    pub(crate) fn read(path: &Path) -> Result<Kit> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is no kit", path.display()))
    }
}

/// Everything in memory.
pub(crate) struct Stage {
    folder: PathBuf,
}

/// Milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Timed {
    pub(crate) first_output: f64,
    pub(crate) end: f64,
}

fn milliseconds(from: Instant) -> f64 {
    from.elapsed().as_secs_f64() * 1e3
}

impl Stage {
    pub(crate) fn make(kit: &Kit) -> Result<Stage> {
        fs::create_dir_all(STAGE).with_context(|| format!("cannot create {STAGE}"))?;
        mount("perf", STAGE, "tmpfs", MountFlags::empty(), None)
            .with_context(|| format!("cannot mount a tmpfs at {STAGE}; this needs root"))?;
        let folder = PathBuf::from(STAGE);
        for name in ["testudo", "testudo-vmm", "testudo-guest"] {
            copy(&kit.programs.join(name), &folder.join(name))?;
        }
        copy(&kit.image, &folder.join("image"))?;
        Ok(Stage { folder })
    }

    fn testudo(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.folder.join("testudo"));
        command.args(words).stdin(Stdio::null());
        for (name, at) in [
            ("TESTUDO_STATE_DIRECTORY", "state"),
            ("TESTUDO_STATE_RUNTIME", "run"),
            ("TESTUDO_IMAGE_STORE", "store"),
        ] {
            command.env(name, self.folder.join(at));
        }
        command
    }

    fn run(&self, flags: &[&str], words: &[&str]) -> Result<Command> {
        let image = self.folder.join("image");
        let image = image.to_str().context("the stage's path is text")?;
        Ok(self.testudo(&[&["run"], flags, &["--net", "none", image], words].concat()))
    }

    /// One container that says a word.
    pub(crate) fn echo(&self) -> Result<Timed> {
        let mut command = self.run(&["--rm"], &["echo", "hello"])?;
        let begun = Instant::now();
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        let mut stdout = child.stdout.take().context("no stdout")?;
        let mut said = vec![0; 1];
        stdout
            .read_exact(&mut said)
            .context("testudo run said nothing")?;
        let first_output = milliseconds(begun);
        stdout.read_to_end(&mut said)?;
        let status = child.wait()?;
        let end = milliseconds(begun);
        ensure!(status.success() && said == b"hello\n", "{status}: {said:?}");
        Ok(Timed { first_output, end })
    }

    /// A container that does nothing, with its command attached.
    pub(crate) fn idle(&self) -> Result<Pod<'_>> {
        let cli = self
            .run(&["--rm", "--name", POD], &["sleep", "1000"])?
            .spawn()?;
        let mut pod = Pod {
            stage: self,
            cli,
            supervisor: 0,
            vmm: 0,
            ram: 0,
            phases: Vec::new(),
        };
        for _ in 0..600 {
            thread::sleep(Duration::from_millis(100));
            if pod.is_running()? {
                return Ok(pod);
            }
        }
        bail!("the pod does not come up")
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp").arg("-r").args([from, to]).status()?;
    ensure!(status.success(), "cannot copy {}", from.display());
    Ok(())
}

/// A pod that runs until this is dropped.
pub(crate) struct Pod<'a> {
    stage: &'a Stage,
    cli: Child,
    supervisor: u32,
    vmm: u32,
    /// Bytes.
    ram: u64,
    /// Of its start, in milliseconds.
    pub(crate) phases: Vec<(String, f64)>,
}

impl Pod<'_> {
    fn is_running(&mut self) -> Result<bool> {
        let output = self.stage.testudo(&["inspect", POD]).output()?;
        let Ok(said) = serde_json::from_slice::<Value>(&output.stdout) else {
            return Ok(false);
        };
        let at = |path: &str| said.pointer(path);
        if at("/0/status").and_then(Value::as_str) != Some("running") {
            return Ok(false);
        }
        let number = |path: &str| {
            at(path)
                .and_then(Value::as_u64)
                .with_context(|| format!("no {path} in {said}"))
        };
        self.supervisor = u32::try_from(number("/0/state/supervisor")?)?;
        self.vmm = u32::try_from(number("/0/state/vmm")?)?;
        self.ram = number("/0/pod/machine/memory")?;
        let steps = at("/0/state/steps").and_then(Value::as_array);
        self.phases = steps
            .context("no steps")?
            .iter()
            .filter_map(|step| {
                let name = step.pointer("/0")?.as_str()?;
                Some((name.to_owned(), step.pointer("/1")?.as_f64()? / 1e3))
            })
            .collect();
        Ok(true)
    }

    pub(crate) fn memory(&self) -> Result<Idle> {
        let whole = |pid: u32| memory::pss_without_guest_ram(pid, u64::MAX);
        let vmm_kib = memory::pss_without_guest_ram(self.vmm, self.ram)?;
        Ok(Idle {
            cli_kib: whole(self.cli.id())?,
            supervisor_kib: whole(self.supervisor)?,
            vmm_kib,
            guest_ram_kib: whole(self.vmm)?.saturating_sub(vmm_kib),
        })
    }

    /// Milliseconds of one command in it.
    pub(crate) fn exec(&self) -> Result<f64> {
        let begun = Instant::now();
        let status = self.stage.testudo(&["exec", POD, "true"]).status()?;
        ensure!(status.success(), "testudo exec: {status}");
        Ok(milliseconds(begun))
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        let _ = self.stage.testudo(&["rm", "-f", POD]).output();
        let _ = self.cli.wait();
    }
}
