//! Making a pod: its folder, its lock, its supervisor.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use testudo_protocol::Connection;

use crate::link::Link;
use crate::pod::Pod;
use crate::state::{Directories, EventLog, Held};
use crate::supervise::Orders;

/// A pod that is being started.
pub(crate) struct Launched {
    /// To its supervisor.
    pub(crate) link: Link,
    /// The supervisor.
    pub(crate) supervisor: Child,
}

/// Writes the pod down and starts its supervisor.
pub(crate) fn launch(pod: &Pod, at: &Directories) -> anyhow::Result<Launched> {
    let all = crate::state::list(at)?;
    if let Some(other) = all.iter().find(|entry| entry.pod.name == pod.name) {
        bail!(
            "there is a pod {} already ({}); choose another name, or remove it with `testudo rm`",
            pod.name,
            other.pod.id
        );
    }
    let folder = at.pod(&pod.id);
    let held = claim(&folder)?;
    let started = write_and_spawn(pod, at, &held);
    if started.is_err() {
        let _ = std::fs::remove_dir_all(&folder);
    } else {
        EventLog::of(at.state()).add("create", &pod.id, &pod.name, Some(pod.image.clone()));
    }
    started
}

/// Makes the folder and takes its lock. Between the two somebody who lists pods may take it for one that was
/// abandoned; then once more.
fn claim(folder: &Path) -> anyhow::Result<Held> {
    for _ in 0..100 {
        match DirBuilder::new().mode(0o700).create(folder) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(e).with_context(|| format!("cannot make {}", folder.display()));
            }
            _ => {}
        }
        if let Ok(Some(held)) = Held::try_take(&folder.join("lock"))
            && folder.join("lock").exists()
        {
            return Ok(held);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    bail!("cannot lock {}", folder.display())
}

fn write_and_spawn(pod: &Pod, at: &Directories, held: &Held) -> anyhow::Result<Launched> {
    let folder = at.pod(&pod.id);
    let text = serde_json::to_vec_pretty(pod)?;
    // Whole or not at all, for whoever lists pods meanwhile.
    let new = folder.join("pod.json.new");
    std::fs::write(&new, text)
        .and_then(|()| std::fs::rename(&new, folder.join("pod.json")))
        .with_context(|| format!("cannot write {}", new.display()))?;
    let (ours, theirs) = Connection::pair()?;
    // Duplicates stay open when the supervisor's program replaces this one.
    let lock = rustix::io::dup(held)?;
    let link = rustix::io::dup(&theirs)?;
    let orders = Orders {
        id: pod.id.clone(),
        state: at.state().to_owned(),
        runtime: at.runtime().to_owned(),
        lock: lock.as_raw_fd(),
        link: link.as_raw_fd(),
    };
    let log = File::create(folder.join("supervisor.log"))?;
    let supervisor = Command::new("/proc/self/exe")
        // As people find it in a list of processes.
        .arg0("testudo")
        .args(orders.to_arguments())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .current_dir("/")
        .spawn()
        .context("cannot start the supervisor")?;
    Ok(Launched {
        link: Link(ours),
        supervisor,
    })
}

impl Launched {
    /// The supervisor's end, for a command that stays until then.
    pub(crate) fn reap(&mut self) -> io::Result<()> {
        self.supervisor.wait().map(drop)
    }
}

/// Connects to a running pod's supervisor.
pub(crate) fn connect(entry: &crate::state::Entry, at: &Directories) -> anyhow::Result<Link> {
    use crate::state::Phase;
    ensure!(
        entry.state.phase != Phase::Exited,
        "{} is not running: {}",
        entry.pod.name,
        entry.state.words()
    );
    let path = at.sockets(&entry.pod.id).join("supervisor");
    let connection = Connection::open(&path).with_context(|| {
        format!(
            "the supervisor of {} does not answer; `testudo ps` says what became of it",
            entry.pod.name
        )
    })?;
    Ok(Link(connection))
}
