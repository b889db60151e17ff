//! `cargo xtask perf boot`: the time from exec to init and to the end.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use testudo_lab::LabSpec;

use super::{QEMU, claim, in_lab, staged, text};
use crate::cache::Cache;
use crate::guest::{Contents, Images};
use crate::{guest, setup, workspace};

/// Kernels, copies of them, firmware and a guest.
const LAB_MIB: u64 = 4096;
/// 2-MiB pages set aside for the guest whose RAM is in such pages, and some to spare.
const HUGEPAGES: u64 = 140;

#[derive(clap::Args)]
pub struct Args {
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
    setup::ensure()?;
    let cache = Cache::open()?;
    let root = workspace::root()?;
    let kit = Kit {
        vmm: match args.peers_only {
            true => None,
            false => Some(super::vmm(args.vmm.as_deref())?),
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
    let (out, kit_file) = claim(&root, args.out.as_deref(), "boot", &kit)?;
    let mut stage = kit.files();
    stage.push(tool.clone());

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
        stage: staged(&stage)?,
        timeout: Duration::from_secs(args.timeout),
        ..LabSpec::new(root, out.path.clone(), command)
    };
    in_lab(&cache, &spec)
}

fn absolute(path: Option<&Path>) -> Result<Option<PathBuf>> {
    Ok(path.map(std::path::absolute).transpose()?)
}
