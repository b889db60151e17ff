//! `cargo xtask lab`: boots the lab and runs a command there.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use testudo_lab::{Kit, LabError, LabSpec, Streams};

use crate::cache::Cache;
use crate::{debian, sh, workspace};

/// Exit status when the command's time limit passed, as timeout(1) has it.
const TIMED_OUT: u8 = 124;
/// Exit status when the lab itself failed.
const LAB_FAILED: u8 = 125;
/// Modules kept uncompressed: what labs usually load, quick to load in emulation.
const MODULES: &[&str] = &[
    "9pnet_virtio",
    "9p",
    "overlay",
    "kvm-amd",
    "cpuid",
    "vhost_net",
    "vhost_vsock",
    "tun",
    "tap",
    "loop",
    "fuse",
    "vfio-pci",
    "vfio_iommu_type1",
    "nvme",
    "veth",
    "bridge",
    "virtiofs",
    "virtio_net",
    "virtio_blk",
    "vsock_loopback",
    "erofs",
    "dm-mod",
    "nbd",
];
/// Passed on from our own environment when set.
const ENVIRONMENT: &[&str] = &[
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "TERM",
    "RUST_BACKTRACE",
    "RUST_LOG",
];

/// Runs a command in an emulated host in which /dev/kvm is real. It sees this machine's root
/// (changes stay in the lab), the checkout, and a writable output folder (`$TESTUDO_LAB_OUT`).
/// Exit status: the command's; 124 when its time ran out; 125 when the lab itself failed.
#[derive(clap::Args)]
pub struct Args {
    /// What to emulate.
    #[arg(long, default_value = "x86_64")]
    arch: String,
    /// CPUs of the lab; one is quickest on a small machine.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Memory of the lab, such as 4G or 1500M.
    #[arg(long, default_value = "2G", value_parser = mebibytes)]
    memory: u64,
    /// Give it an IOMMU, so that VFIO works.
    #[arg(long)]
    iommu: bool,
    /// A QEMU -device value, such as edu; put behind a PCIe root port of its own. Repeatable.
    #[arg(long, value_name = "DEVICE")]
    device: Vec<String>,
    /// A further QEMU argument, as it is. Repeatable.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    qemu_arg: Vec<String>,
    /// Virtual time: one instruction is one nanosecond, so timings repeat (one CPU, half the speed).
    #[arg(long)]
    icount: bool,
    /// Huge pages of 2 MiB to set aside.
    #[arg(long, default_value_t = 0, value_name = "N")]
    hugepages: u64,
    /// A further word of the lab's kernel command line. Repeatable.
    #[arg(long = "kernel-arg", value_name = "WORD")]
    kernel_args: Vec<String>,
    /// A file or folder to copy into the lab's memory before the command starts, with the libraries
    /// it needs: under --icount the clock leaps whenever the lab reads from this machine. Repeatable.
    #[arg(long, value_name = "PATH")]
    stage: Vec<PathBuf>,
    /// A kernel module to load beside the usual ones. Repeatable.
    #[arg(long, value_name = "NAME")]
    module: Vec<String>,
    /// Kill the lab when it has not finished after so many seconds.
    #[arg(long, default_value_t = 600, value_name = "SECS")]
    timeout: u64,
    /// The writable folder; the console's log is kept there. [default: a free one in out/lab]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// A variable for the command. Repeatable.
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Say where time goes.
    #[arg(long, short)]
    verbose: bool,
    /// The command.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// The chore.
pub fn run(args: Args) -> Result<ExitCode> {
    let kit = kit(&Cache::open()?)?;
    let root = workspace::root()?;
    let here = std::env::current_dir().context("no current directory")?;
    let out = Out::claim(&root, args.out.as_deref())?;
    let spec = LabSpec {
        arch: args.arch.parse()?,
        cpus: args.cpus,
        memory_mib: args.memory,
        iommu: args.iommu,
        devices: args.device,
        qemu_args: args.qemu_arg,
        icount: args.icount,
        hugepages: args.hugepages,
        kernel_args: args.kernel_args,
        stage: staged(&args.stage)?,
        modules: args.module,
        timeout: Duration::from_secs(args.timeout),
        env: args.env,
        ..LabSpec::new(here, out.path.clone(), args.command)
    };
    let (mut stdout, mut stderr) = (io::stdout(), io::stderr());
    let streams = Streams {
        out: &mut stdout,
        err: &mut stderr,
        stdin: stdin(),
    };
    match testudo_lab::run(&kit, &spec, environment(&spec), streams) {
        Ok(outcome) => {
            if args.verbose {
                let (boot, whole) = (outcome.boot.as_secs_f64(), outcome.whole.as_secs_f64());
                eprintln!("lab: command started after {boot:.2} s, ended after {whole:.2} s");
                eprintln!("lab: output folder {}", out.path.display());
            }
            Ok(ExitCode::from(
                u8::try_from(outcome.status).unwrap_or(LAB_FAILED),
            ))
        }
        Err(error @ LabError::Spec(_)) => Err(error.into()),
        Err(error) => {
            let code = if matches!(error, LabError::Timeout { .. }) {
                TIMED_OUT
            } else {
                LAB_FAILED
            };
            eprintln!("xtask: {:#}", anyhow::Error::from(error));
            Ok(ExitCode::from(code))
        }
    }
}

/// The lab's kernel, modules and init, built or found in the cache.
pub fn kit(cache: &Cache) -> Result<Kit> {
    let package = debian::unpacked(cache, debian::LAB_KERNEL)?;
    let debian = debian::kernel(cache, debian::LAB_KERNEL)?;
    let recipe = format!("1 {} {MODULES:?}", package.display());
    let entry = cache.entry("lab-kernel", &[recipe.as_bytes()]);
    let dir = entry.get_or_build(|dir| {
        eprintln!("preparing the lab's kernel {}", debian.release);
        prepare_kernel(&debian, dir)
    })?;
    let init = workspace::static_binary("testudo-lab", "lab-init", "lab")?;
    Ok(Kit {
        kernel: dir.join("vmlinux"),
        modules: dir.join("lib/modules").join(&debian.release),
        release: debian.release,
        init: fs::read(&init).with_context(|| format!("cannot read {}", init.display()))?,
    })
}

/// vmlinux out of the bzImage, the modules with depmod's index, the usual ones decompressed.
fn prepare_kernel(debian: &debian::Kernel, dir: &Path) -> Result<()> {
    let image = fs::read(&debian.image)
        .with_context(|| format!("cannot read {}", debian.image.display()))?;
    let payload = dir.join("payload");
    fs::write(
        &payload,
        bzimage_payload(&image).context("the lab's kernel is no bzImage")?,
    )?;
    let vmlinux = dir.join("vmlinux");
    sh::quiet(
        Command::new("zstd")
            .args(["-q", "-d"])
            .arg(&payload)
            .arg("-o")
            .arg(&vmlinux),
    )?;
    fs::remove_file(&payload)?;

    let modules = dir.join("lib/modules").join(&debian.release);
    fs::create_dir_all(dir.join("lib/modules"))?;
    sh::quiet(
        Command::new("cp")
            .arg("-a")
            .arg(&debian.modules)
            .arg(&modules),
    )?;
    depmod(dir, &debian.release)?;
    let usual = testudo_lab::load_order(&modules, MODULES)?;
    let packed: Vec<PathBuf> = usual
        .iter()
        .map(|m| modules.join(m))
        .filter(|m| m.extension().is_some_and(|e| e == "xz"))
        .collect();
    if !packed.is_empty() {
        sh::quiet(Command::new("xz").arg("-d").args(&packed))?;
        depmod(dir, &debian.release)?;
    }
    Ok(())
}

/// Makes the index of the modules in `base/lib/modules/<release>`.
pub fn depmod(base: &Path, release: &str) -> Result<()> {
    let mut command = Command::new("depmod");
    command.arg("-b").arg(base).arg(release);
    sh::quiet(command.env("PATH", sbin_path()))
}

/// depmod is in a folder that users often have not in their PATH.
fn sbin_path() -> String {
    format!(
        "{}:/usr/sbin:/sbin",
        std::env::var("PATH").unwrap_or_default()
    )
}

/// The compressed kernel inside a bzImage, without the length that follows it (the x86 boot
/// protocol, `Documentation/arch/x86/boot.rst`: setup_sects, payload_offset, payload_length).
pub fn bzimage_payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let start = (usize::from(*image.get(0x1f1)?) + 1) * 512 + word(0x248)?;
    let length = word(0x24c)?.checked_sub(4)?;
    image.get(start..start.checked_add(length)?)
}

/// What the command gets for an environment.
pub fn environment(spec: &LabSpec) -> Vec<(String, String)> {
    let mut env: Vec<(String, String)> = ENVIRONMENT
        .iter()
        .filter_map(|n| Some(((*n).to_owned(), std::env::var(n).ok()?)))
        .collect();
    env.push(("TESTUDO_LAB".to_owned(), "1".to_owned()));
    env.push(("TESTUDO_LAB_OUT".to_owned(), spec.out.display().to_string()));
    env.extend(spec.env.iter().cloned());
    env
}

/// These paths, absolute, and the shared libraries that those among them need that are programs.
pub fn staged(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for path in paths {
        let path =
            std::path::absolute(path).with_context(|| format!("no path: {}", path.display()))?;
        // ldd fails on what is no dynamic program; that needs no libraries.
        let libraries = sh::read(Command::new("ldd").arg(&path)).unwrap_or_default();
        all.push(path);
        all.extend(libraries.lines().filter_map(library));
    }
    all.sort();
    all.dedup();
    Ok(all)
}

/// The file in a line of ldd(1): `libc.so.6 => /lib/libc.so.6 (0x7f…)`, `/lib64/ld-linux.so.2 (0x7f…)`.
fn library(line: &str) -> Option<PathBuf> {
    let file = line.split_once("=>").map_or(line, |(_, file)| file);
    let file = file.split_whitespace().next()?;
    file.starts_with('/').then(|| PathBuf::from(file))
}

/// An output folder that no other lab uses meanwhile.
pub struct Out {
    /// Absolute.
    pub path: PathBuf,
    _lock: File,
}

impl Out {
    /// The folder asked for, or the first free one in out/lab.
    pub fn claim(root: &Path, asked: Option<&Path>) -> Result<Out> {
        if let Some(dir) = asked {
            return match Out::lock(dir)? {
                Some(out) => Ok(out),
                None => bail!("another lab is using {}: name another --out", dir.display()),
            };
        }
        for n in 0..100 {
            if let Some(out) = Out::lock(&root.join(format!("out/lab/{n}")))? {
                return Ok(out);
            }
        }
        bail!("a hundred labs are running: end some")
    }

    fn lock(dir: &Path) -> Result<Option<Out>> {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let path = dir
            .canonicalize()
            .with_context(|| format!("cannot resolve {}", dir.display()))?;
        let lock = File::create(path.join(".lab.lock"))
            .with_context(|| format!("cannot write to {}", path.display()))?;
        Ok(lock.try_lock().is_ok().then_some(Out { path, _lock: lock }))
    }
}

/// Our stdin for the command, unless reading it would stop us: a terminal whose foreground
/// is somebody else.
fn stdin() -> Option<Box<dyn Read + Send>> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        let foreground = rustix::termios::tcgetpgrp(&stdin).ok()?;
        if foreground != rustix::process::getpgrp() {
            return None;
        }
    }
    Some(Box::new(stdin))
}

fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("`{text}` is not NAME=VALUE")),
    }
}

/// `4G`, `512M`, or plain mebibytes.
pub fn mebibytes(text: &str) -> Result<u64, String> {
    let (digits, factor) = match text.strip_suffix(['G', 'g']) {
        Some(digits) => (digits, 1024),
        None => (text.strip_suffix(['M', 'm']).unwrap_or(text), 1),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("`{text}` is not a size such as 4G or 512M"))?;
    number
        .checked_mul(factor)
        .ok_or_else(|| format!("{text} is too much"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_in_mebibytes() {
        assert_eq!(mebibytes("4G"), Ok(4096));
        assert_eq!(mebibytes("1500M"), Ok(1500));
        assert_eq!(mebibytes("700"), Ok(700));
        assert!(mebibytes("").is_err() && mebibytes("G").is_err() && mebibytes("4T").is_err());
    }

    #[test]
    fn libraries_are_found_in_what_ldd_says() {
        let said = "\tlinux-vdso.so.1 (0x7ffc)\n\tlibc.so.6 => /lib/libc.so.6 (0x7f)\n\t/lib64/ld.so (0x7f)";
        let found: Vec<PathBuf> = said.lines().filter_map(library).collect();
        assert_eq!(
            found,
            [
                PathBuf::from("/lib/libc.so.6"),
                PathBuf::from("/lib64/ld.so")
            ]
        );
        assert_eq!(library("\tstatically linked"), None);
    }

    #[test]
    fn the_payload_is_where_the_header_says() {
        let mut image = vec![0; 4096];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&9u32.to_le_bytes());
        image[1040..1045].copy_from_slice(b"hello");
        assert_eq!(bzimage_payload(&image), Some(b"hello".as_slice()));
        image[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(bzimage_payload(&image), None);
        assert_eq!(bzimage_payload(&image[..0x240]), None);
    }

    #[test]
    fn two_labs_never_share_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        let one = Out::claim(dir.path(), None).unwrap();
        let two = Out::claim(dir.path(), None).unwrap();
        assert_ne!(one.path, two.path);
        assert!(Out::claim(dir.path(), Some(&one.path)).is_err());
        let freed = one.path.clone();
        drop(one);
        assert_eq!(Out::claim(dir.path(), None).unwrap().path, freed);
    }
}
