//! `cargo xtask demo`: the main job. Builds everything, makes an OCI image from Debian packages, and has
//! `testudo run` run it: a command, an interactive one, a volume, a published port ([`SCRIPT`]).
//!
//! On this machine's own /dev/kvm where `testudo check` finds that it can run guests, else in the lab.

mod image;

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use testudo_lab::{LabSpec, Streams};

use crate::cache::Cache;
use crate::lab::Out;
use crate::{guest, lab, setup, workspace};

/// What is shown, in order.
const SCRIPT: &str = include_str!("demo/show.sh");
/// How long it is remembered that this machine cannot: finding out takes its whole time limit.
const REMEMBERED: Duration = Duration::from_secs(3600);
/// In the lab, everything.
const LAB_LIMIT: Duration = Duration::from_secs(600);

/// Builds everything and shows `testudo run` at work.
#[derive(clap::Args)]
pub struct Args {
    /// Use the lab even if this machine's /dev/kvm would do.
    #[arg(long)]
    lab: bool,
}

/// The chore.
pub fn run(args: &Args) -> Result<ExitCode> {
    let mut phases = Phases::default();
    setup::ensure()?;
    let cache = Cache::open()?;
    println!("== building testudo and testudo-vmm");
    let cli = workspace::static_binary("testudo-cli", "testudo", "release")?;
    workspace::static_binary("testudo-vmm", "testudo-vmm", "release")?;
    phases.done("programs built");
    println!("== preparing the guest's kernel and agent");
    let folder = cli.parent().context("a program without a folder")?;
    guest::install(&cache, folder)?;
    phases.done("guest built");
    println!("== making an image from Debian packages");
    let image = image::build(&cache)?;
    phases.done("image made");

    let here = if args.lab {
        Err("--lab was asked for".to_owned())
    } else {
        remembered_check(&cache, &cli)
    };
    let root = workspace::root()?;
    let out = Out::claim(&root, None)?;
    let script = out.path.join("show.sh");
    std::fs::write(&script, SCRIPT)
        .with_context(|| format!("cannot write {}", script.display()))?;
    let words = vec!["sh".to_owned(), text(&script)?, text(&image)?];
    let path = format!(
        "{}:{}",
        text(folder)?,
        std::env::var("PATH").unwrap_or_default()
    );
    let status = match here {
        Ok(()) => {
            println!("== on this machine's /dev/kvm");
            let status = Command::new("sh")
                .args(words.iter().skip(1))
                .env("PATH", path)
                .status()?;
            status.code().unwrap_or(1)
        }
        Err(why) => {
            println!("== in the lab, an emulated host, for on this machine {why}");
            in_lab(&cache, root, &out, words, path)?
        }
    };
    phases.done("shown");
    phases.print();
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)))
}

/// The demo's image, an OCI layout, for whoever needs a small one.
pub fn image(cache: &Cache) -> Result<PathBuf> {
    image::build(cache)
}

/// Where time went.
struct Phases {
    list: Vec<(&'static str, f64)>,
    last: Instant,
}

impl Default for Phases {
    fn default() -> Self {
        Phases {
            list: Vec::new(),
            last: Instant::now(),
        }
    }
}

impl Phases {
    fn done(&mut self, name: &'static str) {
        self.list.push((name, self.last.elapsed().as_secs_f64()));
        self.last = Instant::now();
    }

    fn print(&self) {
        println!("== seconds on this machine");
        for (name, seconds) in &self.list {
            println!("{seconds:>9.1} s  {name}");
        }
    }
}

fn text(path: &Path) -> Result<String> {
    let text = path.to_str().map(str::to_owned);
    text.with_context(|| format!("{} is not UTF-8", path.display()))
}

/// `testudo check`, whose bad news is remembered for a while.
fn remembered_check(cache: &Cache, cli: &Path) -> Result<(), String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let note = cache.note(&format!("testudo-check-{}", boot.trim()));
    if let Some(why) = note.read(REMEMBERED) {
        return Err(why);
    }
    println!("== testudo check: can this machine run it?");
    let output = Command::new(cli).arg("check").stdin(Stdio::null()).output();
    let output = output.map_err(|e| format!("{} does not start: {e}", cli.display()))?;
    let said = String::from_utf8_lossy(&output.stdout);
    print!("{said}");
    if output.status.success() {
        return Ok(());
    }
    let bad = said.lines().find_map(|line| line.strip_prefix("BAD"));
    let why = format!(
        "`testudo check` says: {}",
        bad.unwrap_or("it cannot").trim()
    );
    note.write(&why);
    Err(why)
}

fn in_lab(
    cache: &Cache,
    root: PathBuf,
    out: &Out,
    command: Vec<String>,
    path: String,
) -> Result<i32> {
    let kit = lab::kit(cache)?;
    let spec = LabSpec {
        timeout: LAB_LIMIT,
        ..LabSpec::new(root, out.path.clone(), command)
    };
    let mut environment = lab::environment(&spec);
    environment.retain(|(name, _)| name != "PATH");
    environment.push(("PATH".to_owned(), path));
    let (mut stdout, mut stderr) = (io::stdout(), io::stderr());
    let streams = Streams {
        out: &mut stdout,
        err: &mut stderr,
        stdin: None,
    };
    Ok(testudo_lab::run(&kit, &spec, environment, streams)?.status)
}
