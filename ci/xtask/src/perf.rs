//! `cargo xtask perf`: measurements, made in the lab in virtual time.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use testudo_lab::{LabSpec, Streams};

use crate::cache::Cache;
use crate::guest::{Contents, Images};
use crate::lab::Out;
use crate::{guest, lab, setup, workspace};

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// Firmware of both machine types, and where it is linked to.
const FIRMWARE: &[&str] = &["/usr/share/qemu", "/usr/share/seabios"];
/// Kernels, copies of them, firmware and a guest.
const LAB_MIB: u64 = 4096;
/// 2-MiB pages set aside for the guest whose RAM is in such pages, and some to spare.
const HUGEPAGES: u64 = 140;

/// Measures Testudo beside its peers, in the lab, in virtual time (one instruction is 1 ns).
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// From exec of the VMM to the guest's init and to the end, for testudo-vmm and for QEMU.
    Boot(Boot),
}

#[derive(clap::Args)]
struct Boot {
    /// Runs of each case; the median counts. Virtual time repeats to about 1 %.
    #[arg(long, default_value_t = 1, value_name = "N")]
    runs: u32,
    /// Leave out testudo-vmm.
    #[arg(long)]
    peers_only: bool,
    /// Leave out our guest kernel (its first build takes minutes).
    #[arg(long)]
    stock_only: bool,
    /// Measure this build of testudo-vmm. [default: release, static]
    #[arg(long, value_name = "FILE")]
    vmm: Option<PathBuf>,
    /// Measure this Firecracker beside; Debian has no package of it.
    #[arg(long, value_name = "FILE")]
    firecracker: Option<PathBuf>,
    /// Measure this Cloud Hypervisor beside; Debian has no package of it.
    #[arg(long, value_name = "FILE")]
    cloud_hypervisor: Option<PathBuf>,
    /// Set the lab's transparent huge pages: always (Debian's), madvise or never.
    #[arg(long)]
    thp: Option<String>,
    /// A further word of the lab's kernel command line: `init_on_alloc=0` makes a host that clears a
    /// huge page once, as Linux does from 6.13 on. Repeatable.
    #[arg(long = "kernel-arg", value_name = "WORD")]
    kernel_args: Vec<String>,
    /// Folder for results. [default: out/perf/boot]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Seconds after which the lab is killed.
    #[arg(long, default_value_t = 1800, value_name = "SECS")]
    timeout: u64,
    /// Only cases whose name contains one of these: "microvm", "stock bzImage".
    filter: Vec<String>,
}

/// `perf-boot`'s `Kit`.
#[derive(Serialize)]
struct Kit {
    vmm: Option<PathBuf>,
    qemu: Option<PathBuf>,
    firecracker: Option<PathBuf>,
    cloud_hypervisor: Option<PathBuf>,
    stock: Kernel,
    own: Option<Kernel>,
    initramfs: PathBuf,
}

#[derive(Serialize)]
struct Kernel {
    bzimage: PathBuf,
    vmlinux: PathBuf,
}

impl From<Images> for Kernel {
    fn from(images: Images) -> Kernel {
        Kernel {
            bzimage: images.bzimage,
            vmlinux: images.vmlinux,
        }
    }
}

impl Kit {
    fn files(&self) -> Vec<PathBuf> {
        let kernels = [Some(&self.stock), self.own.as_ref()];
        let kernels = kernels.into_iter().flatten();
        let mut files: Vec<PathBuf> = kernels
            .flat_map(|k| [k.bzimage.clone(), k.vmlinux.clone()])
            .collect();
        files.push(self.initramfs.clone());
        files.extend(self.vmm.clone());
        files.extend(self.qemu.clone());
        files.extend(self.firecracker.clone());
        files.extend(self.cloud_hypervisor.clone());
        files
    }
}

/// The chore.
pub fn run(args: &Args) -> Result<ExitCode> {
    match &args.what {
        What::Boot(args) => boot(args),
    }
}

fn boot(args: &Boot) -> Result<ExitCode> {
    setup::ensure()?;
    let cache = Cache::open()?;
    let root = workspace::root()?;
    let kit = Kit {
        vmm: match (&args.vmm, args.peers_only) {
            (_, true) => None,
            (Some(vmm), false) => Some(std::path::absolute(vmm)?),
            (None, false) => Some(workspace::static_binary(
                "testudo-vmm",
                "testudo-vmm",
                "release",
            )?),
        },
        qemu: Path::new(QEMU).exists().then(|| PathBuf::from(QEMU)),
        firecracker: absolute(args.firecracker.as_deref())?,
        cloud_hypervisor: absolute(args.cloud_hypervisor.as_deref())?,
        stock: guest::stock(&cache)?.into(),
        own: match args.stock_only {
            true => None,
            false => Some(guest::kernel(&cache)?.into()),
        },
        initramfs: guest::initramfs(&cache, Contents::Padded(2 << 20))?,
    };
    let tool = workspace::static_binary("testudo-perf", "perf-boot", "lab")?;
    let dir = args
        .out
        .clone()
        .unwrap_or_else(|| root.join("out/perf/boot"));
    let out = Out::claim(&root, Some(&dir))?;
    let kit_file = out.path.join("kit.json");
    fs::write(&kit_file, serde_json::to_vec_pretty(&kit)?)
        .with_context(|| format!("cannot write {}", kit_file.display()))?;

    let mut stage = kit.files();
    stage.push(tool.clone());
    let mut stage = lab::staged(&stage)?;
    stage.extend(FIRMWARE.iter().map(PathBuf::from).filter(|p| p.exists()));

    let mut command: Vec<String> = vec![text(&tool)?, "--kit".into(), text(&kit_file)?];
    command.extend([
        "--out".into(),
        text(&out.path)?,
        "--runs".into(),
        args.runs.to_string(),
    ]);
    command.extend(
        args.thp
            .iter()
            .flat_map(|thp| ["--thp".to_owned(), thp.clone()]),
    );
    command.extend(args.filter.iter().cloned());
    let spec = LabSpec {
        icount: true,
        memory_mib: LAB_MIB,
        hugepages: HUGEPAGES,
        kernel_args: args.kernel_args.clone(),
        stage,
        timeout: Duration::from_secs(args.timeout),
        ..LabSpec::new(root, out.path.clone(), command)
    };
    let (mut stdout, mut stderr) = (io::stdout(), io::stderr());
    let streams = Streams {
        out: &mut stdout,
        err: &mut stderr,
        stdin: None,
    };
    let outcome = testudo_lab::run(&lab::kit(&cache)?, &spec, lab::environment(&spec), streams)?;
    eprintln!("perf: results in {}", out.path.display());
    Ok(ExitCode::from(
        u8::try_from(outcome.status).unwrap_or(u8::MAX),
    ))
}

fn absolute(path: Option<&Path>) -> Result<Option<PathBuf>> {
    Ok(path.map(std::path::absolute).transpose()?)
}

fn text(path: &Path) -> Result<String> {
    path.to_str()
        .map(str::to_owned)
        .with_context(|| format!("{} is not UTF-8", path.display()))
}
