//! Kernel modules that the initramfs brings for a kernel that has its drivers not built in.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::PathBuf;

use rustix::system::finit_module;

use crate::facts;

/// Loads what is there for the running kernel, in the order of names; returns how many.
pub(crate) fn load() -> io::Result<usize> {
    let release = facts::read("/proc/sys/kernel/osrelease").unwrap_or_default();
    let dir = match fs::read_dir(format!("/modules/{release}")) {
        Ok(dir) => dir,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(0),
        Err(e) => return Err(e),
    };
    let mut files: Vec<PathBuf> = dir.flatten().map(|e| e.path()).collect();
    files.sort();
    for path in &files {
        finit_module(File::open(path)?, c"", 0)
            .map_err(|e| io::Error::other(format!("{}: {e}", path.display())))?;
    }
    Ok(files.len())
}
