//! A pod as it is.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// The life of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Its parts are made.
    Starting,
    /// The container runs.
    Running,
    /// The container's processes do not get on.
    Paused,
    /// It has ended.
    Exited,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// As a shell counts; 125 if it was not the container that ended.
    pub code: u8,
    /// Milliseconds since 1970.
    pub at_ms: u64,
    /// What ended it, if not the container itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// The guest's kernel killed something for want of memory.
    #[serde(default)]
    pub oom_killed: bool,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Where in its life.
    pub phase: Phase,
    /// Of the supervisor.
    pub supervisor: u32,
    /// Of the VMM.
    #[serde(default)]
    pub vmm: Option<u32>,
    /// When the container began; milliseconds since 1970.
    #[serde(default)]
    pub started_ms: Option<u64>,
    /// How it ended.
    #[serde(default)]
    pub end: Option<End>,
    /// Microseconds of each step of the start, in order.
    #[serde(default)]
    pub steps: Vec<(String, u64)>,
}

impl State {
    /// At first.
    pub fn new(supervisor: u32) -> Self {
        Self {
            phase: Phase::Starting,
            supervisor,
            vmm: None,
            started_ms: None,
            end: None,
            steps: Vec::new(),
        }
    }

    /// Of a pod's folder.
    pub fn read(folder: &Path) -> io::Result<Self> {
        let text = std::fs::read_to_string(folder.join("state.json"))?;
        serde_json::from_str(&text).map_err(io::Error::other)
    }

    /// Replaces what is in a pod's folder; readers see the old or the new.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        let text = serde_json::to_vec(self).map_err(io::Error::other)?;
        let new = folder.join("state.json.new");
        std::fs::write(&new, text)?;
        std::fs::rename(new, folder.join("state.json"))
    }

    /// As `ps` shows it.
    pub fn words(&self) -> String {
        match (&self.phase, &self.end) {
            (Phase::Exited, Some(End { why: Some(why), .. })) => format!("exited ({why})"),
            (
                Phase::Exited,
                Some(End {
                    code,
                    oom_killed: true,
                    ..
                }),
            ) => format!("exited ({code}, out of memory)"),
            (Phase::Exited, Some(End { code, .. })) => format!("exited ({code})"),
            (Phase::Exited, None) => "exited".into(),
            (Phase::Starting, _) => "starting".into(),
            (Phase::Running, _) => "running".into(),
            (Phase::Paused, _) => "paused".into(),
        }
    }
}
