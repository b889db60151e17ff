//! Control groups, version 2: the tree containers are in, and one group.
//!
//! ```text
//!  <where cgroup2 is mounted>/testudo/<container>
//! ```
//! Files are written as they are named in the kernel's documentation (admin-guide/cgroup-v2).

mod limits;
mod stats;

use std::fs;
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Pid;
use testudo_agent_protocol::Resources;

use crate::failure::{During, Failure};

/// How long the kernel may take to freeze, thaw or empty a group.
const PATIENCE: Duration = Duration::from_secs(10);

/// The tree.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    base: PathBuf,
}

impl Tree {
    /// Where cgroup2 is mounted; `base` names the group below it that is the agent's.
    pub(crate) fn open(base: &str) -> Result<Self, Failure> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").during(|| "read mounts".into())?;
        let mounted = mount_point(&mounts)
            .ok_or_else(|| Failure::new("no cgroup2 is mounted: mount one on /sys/fs/cgroup"))?;
        let tree = Self {
            base: Path::new(mounted).join(base),
        };
        enable_controllers(Path::new(mounted));
        make(&tree.base)?;
        enable_controllers(&tree.base);
        Ok(tree)
    }

    /// The group of a container, made anew. One that was left behind is emptied first.
    pub(crate) fn create(&self, container: &str) -> Result<Group, Failure> {
        let group = Group {
            path: self.base.join(container),
        };
        if group.path.exists() {
            group.remove()?;
        }
        make(&group.path)?;
        Ok(group)
    }
}

/// Of the first cgroup2 in `/proc/self/mountinfo` (proc(5)).
fn mount_point(mounts: &str) -> Option<&str> {
    mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let kind = after.split(' ').next()?;
        (kind == "cgroup2").then(|| before.split(' ').nth(4))?
    })
}

/// All that there are; a controller that version 1 has taken is not among them.
fn enable_controllers(group: &Path) {
    let names = fs::read_to_string(group.join("cgroup.controllers")).unwrap_or_default();
    for name in names.split_whitespace() {
        // One by one, so that one that cannot be does not spoil the others.
        let _ = fs::write(group.join("cgroup.subtree_control"), format!("+{name}"));
    }
}

fn make(path: &Path) -> Result<(), Failure> {
    match fs::create_dir(path) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => {
            Err(e).during(|| format!("make cgroup {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// One group.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    path: PathBuf,
}

impl Group {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Moves a process here.
    pub(crate) fn add(&self, pid: Pid) -> Result<(), Failure> {
        self.write("cgroup.procs", &pid.as_raw_nonzero().to_string())
    }

    /// The processes in it and below.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let mut found = Vec::new();
        let mut folders = vec![self.path.clone()];
        while let Some(folder) = folders.pop() {
            let list = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            found.extend(list.lines().filter_map(|pid| pid.parse::<u32>().ok()));
            folders.extend(subfolders(&folder));
        }
        found.sort_unstable();
        found
    }

    /// Kills every process in it and below, also those that are being made.
    pub(crate) fn kill(&self) -> Result<(), Failure> {
        self.write("cgroup.kill", "1")
    }

    /// Freezes or thaws; returns when it is done.
    pub(crate) fn freeze(&self, frozen: bool) -> Result<(), Failure> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })?;
        let wanted = if frozen { "frozen 1" } else { "frozen 0" };
        self.until(wanted, || {
            format!(
                "{} {}",
                if frozen { "freeze" } else { "thaw" },
                self.path.display()
            )
        })
    }

    /// Kills what is in it and removes it, with all below.
    pub(crate) fn remove(&self) -> Result<(), Failure> {
        if !self.path.exists() {
            return Ok(());
        }
        if !self.processes().is_empty() {
            self.kill()?;
            self.until("populated 0", || format!("empty {}", self.path.display()))?;
        }
        remove_tree(&self.path).during(|| format!("remove cgroup {}", self.path.display()))
    }

    /// Sets limits; what is not given stays.
    pub(crate) fn limit(&self, resources: &Resources) -> Result<(), Failure> {
        for (file, value) in limits::files(resources)? {
            self.write(&file, &value)?;
        }
        Ok(())
    }

    /// Numbers of all its files.
    pub(crate) fn stats(&self) -> std::collections::BTreeMap<String, u64> {
        stats::read(&self.path)
    }

    /// Processes killed for want of memory.
    pub(crate) fn oom_kills(&self) -> u64 {
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        stats::keyed(&events, "oom_kill").unwrap_or_default()
    }

    fn write(&self, file: &str, value: &str) -> Result<(), Failure> {
        let path = self.path.join(file);
        fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|mut file| file.write_all(value.as_bytes()))
            .during(|| format!("write {value} to {}", path.display()))
    }

    /// Waits for a line of `cgroup.events`, of whose changes the kernel tells by poll(2).
    fn until(&self, line: &str, what: impl FnOnce() -> String) -> Result<(), Failure> {
        let deadline = Instant::now() + PATIENCE;
        let events = self.path.join("cgroup.events");
        let wait = || -> io::Result<()> {
            let mut file = fs::File::open(&events)?;
            loop {
                let mut text = String::new();
                file.rewind()?;
                // Fails when the group is gone, which poll would tell of for ever.
                file.read_to_string(&mut text)?;
                if text.lines().any(|have| have == line) {
                    return Ok(());
                }
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(ErrorKind::TimedOut.into());
                }
                let left = Timespec::try_from(left).map_err(io::Error::other)?;
                match poll(&mut [PollFd::new(&file, PollFlags::PRI)], Some(&left)) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(e) => return Err(e.into()),
                }
            }
        };
        wait().during(what)
    }
}

fn subfolders(of: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(of).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn remove_tree(path: &Path) -> io::Result<()> {
    for folder in subfolders(path) {
        remove_tree(&folder)?;
    }
    // A process that was killed may not be quite gone.
    for _ in 0..200 {
        match fs::remove_dir(path) {
            Err(e) if e.kind() == ErrorKind::ResourceBusy => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            done => return done,
        }
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found() {
        let mounts = "22 1 0:20 / /sys rw - sysfs sysfs rw\n\
                      31 22 0:27 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_point(mounts), Some("/sys/fs/cgroup/unified"));
        assert_eq!(mount_point("garbage\n - cgroup2\n"), None);
    }
}
