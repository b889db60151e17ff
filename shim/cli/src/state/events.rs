//! What happened, a JSON line each, written by whoever knows.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The file is begun anew beyond this.
const MOST: u64 = 4 << 20;

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Milliseconds since 1970.
    pub at_ms: u64,
    /// `create`, `start`, `exit`, `oom`, `remove`, `exec`, `kill`.
    pub what: String,
    /// The pod's id.
    pub id: String,
    /// The pod's name.
    pub name: String,
    /// What belongs to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// The file.
#[derive(Debug, Clone)]
pub struct EventLog(PathBuf);

impl EventLog {
    /// Of this state directory.
    pub fn of(state: &Path) -> Self {
        Self(state.join("events"))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Adds one; a line that cannot be written is lost.
    pub fn add(&self, what: &str, id: &str, name: &str, detail: Option<String>) {
        let event = Event {
            at_ms: crate::clock::now_ms(),
            what: what.to_owned(),
            id: id.to_owned(),
            name: name.to_owned(),
            detail,
        };
        let _ = self.append(&event);
    }

    fn append(&self, event: &Event) -> io::Result<()> {
        let mut line = serde_json::to_vec(event).map_err(io::Error::other)?;
        line.push(b'\n');
        if std::fs::metadata(&self.0).is_ok_and(|m| m.len() > MOST) {
            let _ = std::fs::rename(&self.0, self.0.with_extension("1"));
        }
        // One write: lines of several writers do not mix.
        File::options()
            .create(true)
            .append(true)
            .open(&self.0)?
            .write_all(&line)
    }
}
