//! `cargo xtask demo`: a virtual machine boots Debian's stock kernel, and its userspace talks.
//!
//! On this machine's own /dev/kvm where that can run a stock kernel (found by trying, within
//! [`TRIAL`]), else in the lab.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use testudo_lab::{LabSpec, Streams};

use crate::cache::Cache;
use crate::guest::Contents;
use crate::lab::Out;
use crate::{guest, lab, setup, sh, workspace};

/// A machine with usable KVM boots the guest in about a second.
const TRIAL: Duration = Duration::from_secs(15);
/// How long a failed trial is not repeated.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// In the lab, everything.
const LAB_LIMIT: Duration = Duration::from_secs(180);
const CMDLINE: &str = "console=ttyS0 panic=-1 quiet";

/// Boots a virtual machine and shows its userspace talking.
#[derive(clap::Args)]
pub struct Args {
    /// Boot our own guest kernel instead of Debian's (its first build takes minutes).
    #[arg(long)]
    own_kernel: bool,
    /// Use the lab even if this machine's /dev/kvm would do.
    #[arg(long)]
    lab: bool,
}

/// The chore.
pub fn run(args: &Args) -> Result<ExitCode> {
    setup::ensure()?;
    let cache = Cache::open()?;
    println!("== building testudo-vmm");
    let vmm = workspace::static_binary("testudo-vmm", "testudo-vmm", "release")?;
    println!("== preparing a guest");
    let kernel = if args.own_kernel {
        guest::kernel(&cache)?
    } else {
        guest::stock(&cache)?
    };
    let initramfs = guest::initramfs(&cache, Contents::Bare)?;
    let command = vmm_command(&vmm, &kernel.bzimage, &initramfs)?;
    let words: Vec<&str> = command.iter().map(String::as_str).collect();

    let here = if args.lab {
        Err("--lab was asked for".to_owned())
    } else {
        remembered_trial(&cache, &words)
    };
    let begun = Instant::now();
    let status = match here {
        Ok(()) => {
            println!("== on this machine's /dev/kvm:\n{}", words.join(" "));
            let (program, arguments) = words.split_first().context("an empty command")?;
            sh::live(Command::new(program).args(arguments).stdin(Stdio::null()))?;
            0
        }
        Err(why) => {
            println!(
                "== in the lab, an emulated host, for on this machine {why}:\n{}",
                words.join(" ")
            );
            in_lab(&cache, command)?
        }
    };
    println!(
        "== the guest ran and ended (status {status}) within {:.1} s",
        begun.elapsed().as_secs_f64()
    );
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)))
}

fn vmm_command(vmm: &Path, kernel: &Path, initramfs: &Path) -> Result<Vec<String>> {
    let path = |p: &Path| {
        p.to_str()
            .map(str::to_owned)
            .with_context(|| format!("{} is not UTF-8", p.display()))
    };
    Ok(vec![
        path(vmm)?,
        "run".to_owned(),
        "--kernel".to_owned(),
        path(kernel)?,
        "--initrd".to_owned(),
        path(initramfs)?,
        "--cmdline".to_owned(),
        CMDLINE.to_owned(),
        "--cpus".to_owned(),
        "1".to_owned(),
        "--memory".to_owned(),
        "256M".to_owned(),
        "--console".to_owned(),
        "stdio".to_owned(),
    ])
}

/// [`trial`], whose bad news is remembered for a while: it takes its whole time limit.
fn remembered_trial(cache: &Cache, command: &[&str]) -> Result<(), String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let note = cache.note(&format!("kvm-trial-{}", boot.trim()));
    if let Some(why) = note.read(REMEMBERED) {
        return Err(why);
    }
    let outcome = trial(command);
    if let Err(why) = &outcome {
        note.write(why);
    }
    outcome
}

/// Does this machine run the guest to its end? If not, why.
fn trial(command: &[&str]) -> Result<(), String> {
    if !Path::new("/dev/kvm").exists() {
        return Err("there is no /dev/kvm".to_owned());
    }
    let Some((program, arguments)) = command.split_first() else {
        return Err("there is nothing to run".to_owned());
    };
    println!("== trying this machine's /dev/kvm");
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("{program} does not start: {e}"))?;
    let begun = Instant::now();
    while begun.elapsed() < TRIAL {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(format!("/dev/kvm cannot run this guest ({status})")),
            Ok(None) => std::thread::sleep(Duration::from_millis(20)),
            Err(error) => return Err(format!("the trial cannot be watched: {error}")),
        }
    }
    let _ = child.kill();
    let _ = child.wait();
    Err(format!(
        "/dev/kvm does not get this guest to its end in {TRIAL:?}"
    ))
}

fn in_lab(cache: &Cache, command: Vec<String>) -> Result<i32> {
    let kit = lab::kit(cache)?;
    let root = workspace::root()?;
    let out = Out::claim(&root, None)?;
    let spec = LabSpec {
        timeout: LAB_LIMIT,
        ..LabSpec::new(root, PathBuf::from(&out.path), command)
    };
    let (mut stdout, mut stderr) = (io::stdout(), io::stderr());
    let streams = Streams {
        out: &mut stdout,
        err: &mut stderr,
        stdin: None,
    };
    Ok(testudo_lab::run(&kit, &spec, lab::environment(&spec), streams)?.status)
}
