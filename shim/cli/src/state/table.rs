//! All pods: listing, finding, repairing, removing.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::{Directories, End, EventLog, Held, LockError, Phase, State};
use crate::pod::Pod;

/// The table cannot be read or changed.
#[derive(Debug, Error)]
pub enum StateError {
    /// A file of it.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file of it.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A lock.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// No such pod.
    #[error("there is no pod {0:?}; `testudo ps -a` lists all")]
    Unknown(String),
    /// Several.
    #[error("{word:?} begins the ids of {many} pods; write more of it")]
    Ambiguous {
        /// What was written.
        word: String,
        /// How many.
        many: usize,
    },
}

/// One pod.
#[derive(Debug, Clone)]
pub struct Entry {
    /// As it shall be.
    pub pod: Pod,
    /// As it is.
    pub state: State,
    /// Its folder.
    pub folder: PathBuf,
}

/// A new id: 12 hexadecimal digits.
pub fn new_id() -> io::Result<String> {
    use std::io::Read;
    let mut bytes = [0; 6];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// All pods, the newest first. Those whose supervisor is gone are repaired on the way.
pub fn list(directories: &Directories) -> Result<Vec<Entry>, StateError> {
    let pods = directories.pods();
    let read = |source| StateError::Read {
        path: pods.clone(),
        source,
    };
    let mut entries = Vec::new();
    for folder in std::fs::read_dir(&pods).map_err(read)? {
        let folder = folder.map_err(read)?.path();
        if let Some(entry) = look(directories, &folder)? {
            entries.push(entry);
        }
    }
    entries.sort_by_key(|entry| std::cmp::Reverse(entry.pod.created_ms));
    sweep(directories);
    Ok(entries)
}

/// One pod; nothing if it is being made or was never made whole.
fn look(directories: &Directories, folder: &Path) -> Result<Option<Entry>, StateError> {
    let held = Held::try_take(&folder.join("lock"));
    let abandoned = match held {
        Ok(held) => held,
        // Removed meanwhile.
        Err(_) if !folder.exists() => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let pod = std::fs::read(folder.join("pod.json")).ok();
    let pod: Option<Pod> = pod.and_then(|text| serde_json::from_slice(&text).ok());
    let Some(pod) = pod else {
        if abandoned.is_some() {
            let _ = std::fs::remove_dir_all(folder);
        }
        return Ok(None);
    };
    let state = State::read(folder).unwrap_or_else(|_| State::new(0));
    let entry = Entry {
        pod,
        state,
        folder: folder.to_owned(),
    };
    let Some(_held) = abandoned else {
        return Ok(Some(entry));
    };
    if entry.state.phase == Phase::Exited && !entry.pod.remove {
        return Ok(Some(entry));
    }
    repair(directories, entry)
}

/// A pod nobody looks after any more: told as it is, or removed if nothing of it was to be kept. The
/// caller holds its lock.
pub fn repair(directories: &Directories, mut entry: Entry) -> Result<Option<Entry>, StateError> {
    let _ = std::fs::remove_dir_all(directories.sockets(&entry.pod.id));
    let events = EventLog::of(directories.state());
    if entry.state.phase != Phase::Exited {
        let why = "supervisor was killed".to_owned();
        events.add("exit", &entry.pod.id, &entry.pod.name, Some(why.clone()));
        entry.state.phase = Phase::Exited;
        entry.state.end = Some(End {
            code: 125,
            at_ms: crate::clock::now_ms(),
            why: Some(why),
            oom_killed: false,
        });
    }
    let path = entry.folder.clone();
    let write = |source| StateError::Write { path, source };
    if entry.pod.remove {
        std::fs::remove_dir_all(&entry.folder).map_err(write)?;
        events.add("remove", &entry.pod.id, &entry.pod.name, None);
        return Ok(None);
    }
    entry.state.write(&entry.folder).map_err(write)?;
    Ok(Some(entry))
}

/// Sockets whose pod is gone.
fn sweep(directories: &Directories) {
    let Ok(folders) = std::fs::read_dir(directories.runtime()) else {
        return;
    };
    for folder in folders.flatten() {
        let name = folder.file_name();
        let of_a_pod = name.len() == 12 && !directories.pods().join(&name).exists();
        if of_a_pod {
            let _ = std::fs::remove_dir_all(folder.path());
        }
    }
}

/// By name, id, or the beginning of an id.
pub fn find(directories: &Directories, word: &str) -> Result<Entry, StateError> {
    let all = list(directories)?;
    let exact = |entry: &&Entry| entry.pod.name == word || entry.pod.id == word;
    if let Some(entry) = all.iter().find(exact) {
        return Ok(entry.clone());
    }
    let mut starts = all
        .into_iter()
        .filter(|entry| !word.is_empty() && entry.pod.id.starts_with(word));
    match (starts.next(), starts.count()) {
        (Some(entry), 0) => Ok(entry),
        (None, _) => Err(StateError::Unknown(word.to_owned())),
        (Some(_), more) => Err(StateError::Ambiguous {
            word: word.to_owned(),
            many: more.saturating_add(1),
        }),
    }
}
