//! Files brought into memory before the command starts. The root is an overlay: a file of the host
//! that is opened for writing is copied into the upper layer, which is memory, and stays at its path.

use std::fs::{self, File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};

/// Copies a file, or all below a folder, and each symbolic link on the way.
pub(crate) fn copy_up(path: &Path) -> Result<()> {
    let at = follow(path, 0)?;
    let about = fs::metadata(&at).with_context(|| format!("cannot stage {}", path.display()))?;
    if about.is_dir() {
        for entry in fs::read_dir(&at).with_context(|| format!("cannot stage {}", at.display()))? {
            let entry = entry
                .with_context(|| format!("cannot stage {}", at.display()))?
                .path();
            // A link whose target is missing is of no use to anybody.
            if entry.exists() {
                copy_up(&entry)?;
            }
        }
    } else if about.is_file() {
        File::options()
            .append(true)
            .open(&at)
            .with_context(|| format!("cannot copy {} into memory", at.display()))?;
    }
    Ok(())
}

/// The path without symbolic links, each of which is copied up when it is met.
fn follow(path: &Path, depth: u32) -> Result<PathBuf> {
    anyhow::ensure!(depth < 40, "{} has too many symbolic links", path.display());
    let mut at = PathBuf::new();
    let mut rest = path.components();
    while let Some(part) = rest.next() {
        match part {
            Component::ParentDir => drop(at.pop()),
            other => at.push(other),
        }
        let about =
            fs::symlink_metadata(&at).with_context(|| format!("cannot stage {}", at.display()))?;
        if about.is_symlink() {
            touch(&at, &about)?;
            let target =
                fs::read_link(&at).with_context(|| format!("cannot read {}", at.display()))?;
            at.pop();
            return follow(&at.join(target).join(rest.as_path()), depth + 1);
        }
    }
    Ok(at)
}

/// Sets a link's time to what it is, which copies it up.
fn touch(link: &Path, about: &Metadata) -> Result<()> {
    let time = Timespec {
        tv_sec: about.mtime(),
        tv_nsec: about.mtime_nsec(),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    utimensat(CWD, link, &times, AtFlags::SYMLINK_NOFOLLOW)
        .with_context(|| format!("cannot copy the link {} into memory", link.display()))
}
