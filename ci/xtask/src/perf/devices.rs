//! `cargo xtask perf devices`: what devices do in a second, and in a second of the VMM's CPU time.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use testudo_lab::LabSpec;

use super::{QEMU, claim, in_lab, staged, text};
use crate::cache::Cache;
use crate::guest::Contents;
use crate::{guest, setup, workspace};

/// Of Debian's qemu-system-common.
const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";
/// The userland twice, a disk, a guest.
const LAB_MIB: u64 = 4096;
const MODULES: &[&str] = &["tun", "vhost_net", "vhost_vsock"];

#[derive(clap::Args)]
pub struct Args {
    /// Only these groups, separated by commas: blk, net, vsock, fs, pss.
    #[arg(long, value_name = "GROUPS")]
    only: Option<String>,
    /// Only steps whose name contains this: "QD32".
    #[arg(long, value_name = "TEXT")]
    step: Option<String>,
    /// Only our VMM, nothing beside.
    #[arg(long)]
    ours: bool,
    /// Measure this build of testudo-vmm. [default: release, static]
    #[arg(long, value_name = "FILE")]
    vmm: Option<PathBuf>,
    /// A shell command to run in the lab beside each step, with $STEP, $PID of the VMM and
    /// $TESTUDO_LAB_OUT: a profiler. It gets SIGTERM when the step ends.
    #[arg(long, value_name = "COMMAND")]
    beside: Option<String>,
    /// Folder for results. [default: out/perf/devices]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Seconds after which the lab is killed.
    #[arg(long, default_value_t = 1800, value_name = "SECS")]
    timeout: u64,
}

/// `perf-devices`'s `Kit`.
#[derive(Serialize)]
struct Kit {
    vmm: PathBuf,
    qemu: Option<PathBuf>,
    virtiofsd: Option<PathBuf>,
    kernel: PathBuf,
    initramfs: PathBuf,
    userland: PathBuf,
}

/// The chore.
pub fn run(args: &Args) -> Result<ExitCode> {
    setup::ensure()?;
    let cache = Cache::open()?;
    let root = workspace::root()?;
    let there = |path: &str| Path::new(path).exists().then(|| PathBuf::from(path));
    let kit = Kit {
        vmm: super::vmm(args.vmm.as_deref())?,
        qemu: there(QEMU),
        virtiofsd: there(VIRTIOFSD),
        kernel: guest::kernel(&cache)?.bzimage,
        initramfs: guest::initramfs(&cache, Contents::Bare)?,
        userland: guest::userland(&cache)?.image,
    };
    let tool = workspace::static_binary("testudo-perf", "perf-devices", "lab")?;
    let (out, kit_file) = claim(&root, args.out.as_deref(), "devices", &kit)?;
    // The rest is read once, and copied by the tool.
    let programs = [Some(tool.clone()), kit.qemu.clone(), kit.virtiofsd.clone()];
    let programs: Vec<PathBuf> = programs.into_iter().flatten().collect();

    let mut command: Vec<String> = vec![text(&tool)?, "run".into()];
    command.extend(["--kit".into(), text(&kit_file)?]);
    command.extend(["--out".into(), text(&out.path)?]);
    for (flag, value) in [
        ("--only", &args.only),
        ("--step", &args.step),
        ("--beside", &args.beside),
    ] {
        if let Some(value) = value {
            command.extend([flag.to_owned(), value.clone()]);
        }
    }
    if args.ours {
        command.push("--ours".to_owned());
    }
    let spec = LabSpec {
        icount: true,
        memory_mib: LAB_MIB,
        stage: staged(&programs)?,
        modules: MODULES.iter().map(|m| (*m).to_owned()).collect(),
        timeout: Duration::from_secs(args.timeout),
        ..LabSpec::new(root, out.path.clone(), command)
    };
    in_lab(&cache, &spec)
}
