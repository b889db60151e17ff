//! What a test is given: the images, a folder, and a place where its child processes are known.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize;

use crate::capture::Capture;
use crate::launch::{Launch, USER};
use crate::outcome::Verdict;

/// Files that tests work with, as `cargo xtask` lists them in a JSON file.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Images {
    /// The VMM under test.
    pub vmm: PathBuf,
    /// `testudo`.
    pub testudo: PathBuf,
    /// Our kernel.
    pub own: Forms,
    /// Debian's cloud kernel as shipped.
    pub stock: Forms,
    /// The test initramfs, with modules for Debian's kernel.
    pub initramfs: PathBuf,
    /// The same without modules, for ours.
    pub initramfs_bare: PathBuf,
    /// The agent and nothing else, for ours.
    pub initramfs_agent: PathBuf,
    /// A Debian userland, as a disk.
    pub userland: PathBuf,
    /// The same, as a folder.
    pub userland_folder: PathBuf,
}

/// One kernel in both forms.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Forms {
    /// Compressed, with the Linux boot header.
    pub bzimage: PathBuf,
    /// ELF.
    pub vmlinux: PathBuf,
}

/// Which kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Debian's, compressed.
    StockBzimage,
    /// Debian's, ELF.
    StockVmlinux,
    /// Ours, compressed.
    OwnBzimage,
    /// Ours, ELF.
    OwnVmlinux,
}

impl Kernel {
    /// Debian's kernel has its drivers as modules, which the init loads when told to.
    pub fn is_stock(self) -> bool {
        matches!(self, Kernel::StockBzimage | Kernel::StockVmlinux)
    }
}

/// A child that the runner can kill when the test does not end.
pub(crate) type SharedChild = Arc<Mutex<Child>>;

/// The surroundings of one test.
pub struct Ctx {
    /// Files to work with.
    pub images: Images,
    dir: tempfile::TempDir,
    given: AtomicUsize,
    children: Mutex<Vec<SharedChild>>,
    consoles: Mutex<Vec<(String, Capture)>>,
}

impl Ctx {
    /// Surroundings with a new, empty folder.
    pub fn new(images: Images) -> std::io::Result<Ctx> {
        Ok(Ctx {
            images,
            dir: tempfile::Builder::new().prefix("vm-test-").tempdir()?,
            given: AtomicUsize::new(0),
            children: Mutex::default(),
            consoles: Mutex::default(),
        })
    }

    /// A path in the test's own folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A path in it that was not given out before.
    pub(crate) fn new_path(&self, name: &str) -> PathBuf {
        let n = self.given.fetch_add(1, Ordering::Relaxed);
        self.path(&format!("{name}-{n}"))
    }

    /// A folder of the ordinary user's, made when it is first asked for.
    pub(crate) fn home(&self) -> Verdict<PathBuf> {
        let home = self.path("home");
        if !home.exists() {
            std::fs::create_dir(&home)?;
            std::os::unix::fs::chown(&home, Some(USER), Some(USER))?;
            std::fs::set_permissions(self.dir(), std::fs::Permissions::from_mode(0o711))?;
        }
        Ok(home)
    }

    /// The test's own folder.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The image of a kernel.
    pub fn kernel(&self, kernel: Kernel) -> &Path {
        match kernel {
            Kernel::StockBzimage => &self.images.stock.bzimage,
            Kernel::StockVmlinux => &self.images.stock.vmlinux,
            Kernel::OwnBzimage => &self.images.own.bzimage,
            Kernel::OwnVmlinux => &self.images.own.vmlinux,
        }
    }

    /// A VM with our kernel and the test initramfs, in which the init does this.
    pub fn guest(&self, orders: &str) -> Launch<'_> {
        Launch::guest(self, orders)
    }

    /// A VM with our kernel and a Debian userland on its first disk, in which bash runs this. It stops
    /// at the first command that fails, which fails the test as soon as facts are asked for; `fact KEY
    /// VALUE` tells one. It ends with a power-off.
    pub fn script(&self, script: &str) -> Launch<'_> {
        Launch::guest(self, "script").script(script)
    }

    /// The bare command line of the VMM.
    pub fn vmm(&self) -> Launch<'_> {
        Launch::bare(self)
    }

    /// Starts a process that does not outlive the test.
    pub(crate) fn spawn(&self, command: &mut Command) -> Verdict<SharedChild> {
        let child = command.spawn().map_err(|e| {
            let program = command.get_program().display();
            crate::Outcome::Failed(format!("cannot start {program}: {e}"))
        })?;
        let child = Arc::new(Mutex::new(child));
        lock(&self.children).push(Arc::clone(&child));
        Ok(child)
    }

    pub(crate) fn keep_output(&self, label: &str, output: &Capture) {
        lock(&self.consoles).push((label.to_owned(), output.clone()));
    }

    /// Kills and reaps every child there still is; returns how many there were.
    pub(crate) fn kill_children(&self) -> usize {
        let mut killed = 0;
        for child in lock(&self.children).iter() {
            let mut child = lock(child);
            if matches!(child.try_wait(), Ok(None)) {
                killed += 1;
                let _ = child.kill();
                let _ = child.wait();
            }
        }
        killed
    }

    /// The last lines of everything that was captured, for the report of a failure.
    pub(crate) fn tails(&self, lines: usize) -> String {
        let mut text = String::new();
        for (label, output) in lock(&self.consoles).iter() {
            let tail = output.tail(lines);
            if !tail.is_empty() {
                text.push_str(&format!("--- {label}\n{tail}\n"));
            }
        }
        text
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
