//! Where the parts are that a pod is made of: the VMM, the guest's kernel, the agent.

use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::config::Config;

/// A part is missing.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{what} is missing; looked at {}; {remedy}", shown(looked))]
pub struct Missing {
    /// Which.
    pub what: &'static str,
    /// Where it was looked for.
    pub looked: Vec<PathBuf>,
    /// What to do.
    pub remedy: &'static str,
}

fn shown(paths: &[PathBuf]) -> String {
    let paths: Vec<String> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    paths.join(", ")
}

/// A part, and how to come by it.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    what: &'static str,
    /// Beside the program.
    beside: &'static [&'static str],
    /// In the tree the program is installed in.
    installed: &'static str,
    remedy: &'static str,
    in_path: bool,
}

/// testudo-vmm.
pub const VMM: Part = Part {
    what: "the VMM (testudo-vmm)",
    beside: &["testudo-vmm"],
    installed: "libexec/testudo/testudo-vmm",
    remedy: "name it with vmm.program, or build it with `cargo build --release -p testudo-vmm`",
    in_path: true,
};

/// The guest's kernel.
pub const KERNEL: Part = Part {
    what: "the guest's kernel",
    beside: &["testudo-guest/vmlinux", "testudo-guest/bzImage"],
    installed: "share/testudo/vmlinux",
    remedy: "name one with --kernel or guest.kernel, or make it with `cargo xtask guest install`",
    in_path: false,
};

/// The initramfs with the agent.
pub const INITRAMFS: Part = Part {
    what: "the guest's initramfs",
    beside: &["testudo-guest/agent.cpio"],
    installed: "share/testudo/agent.cpio",
    remedy: "name one with --initramfs or guest.initramfs, or make it with `cargo xtask guest install`",
    in_path: false,
};

impl Part {
    /// The one that was named, or the first that is there.
    pub fn find(&self, named: Option<&Path>) -> Result<PathBuf, Missing> {
        let looked = match named {
            Some(path) => vec![std::path::absolute(path).unwrap_or_else(|_| path.to_owned())],
            None => self.candidates(),
        };
        match looked.iter().find(|path| path.is_file()) {
            Some(path) => Ok(path.clone()),
            None => Err(Missing {
                what: self.what,
                looked,
                remedy: self.remedy,
            }),
        }
    }

    fn candidates(&self) -> Vec<PathBuf> {
        let program = std::env::current_exe().unwrap_or_default();
        let folder = program.parent().unwrap_or(Path::new("/"));
        let mut all: Vec<PathBuf> = self.beside.iter().map(|name| folder.join(name)).collect();
        if let Some(prefix) = folder.parent() {
            all.push(prefix.join(self.installed));
        }
        let usual = Path::new("/usr").join(self.installed);
        if !all.contains(&usual) {
            all.push(usual);
        }
        if self.in_path {
            all.extend(in_path(self.beside.first().copied().unwrap_or_default()));
        }
        all
    }
}

/// Where a program would be.
fn in_path(name: &str) -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .filter(|folder| folder.is_absolute())
        .map(|folder| folder.join(name))
        .collect()
}

/// passt, if it is installed.
pub fn passt(config: &Config) -> Option<PathBuf> {
    match &config.network_passt {
        Some(path) => Some(path.clone()),
        None => in_path("passt").into_iter().find(|path| path.is_file()),
    }
}
