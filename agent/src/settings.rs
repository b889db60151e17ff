//! How the agent is told what to do: as PID 1 by words of the kernel's command line, as a service by
//! arguments. Both are words `key=value`; what is not known is an error for a service and, since the
//! kernel's command line is everybody's, only those that begin with `agent.` are for PID 1.

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use testudo_agent_protocol::{REQUEST_PORT, STREAM_PORT};

use crate::failure::{During, Failure};
use crate::policy::AllBut;
use crate::sys::mount_attr::{self, MountAttr, RDONLY};

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Listen {
    Vsock(u32),
    Unix(PathBuf),
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) requests: Listen,
    pub(crate) streams: Listen,
    /// A port of the host, which is called as soon as the agent listens.
    pub(crate) ready: Option<u32>,
    /// Requests that are refused, whoever asks.
    pub(crate) deny: Vec<&'static str>,
    pub(crate) log: log::LevelFilter,
    /// Sockets, storages and what belongs to the sandbox.
    pub(crate) state: PathBuf,
    /// The agent's group below where cgroup2 is mounted.
    pub(crate) cgroup: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            requests: Listen::Vsock(REQUEST_PORT),
            streams: Listen::Vsock(STREAM_PORT),
            ready: None,
            deny: Vec::new(),
            log: log::LevelFilter::Info,
            state: "/run/testudo".into(),
            cgroup: "testudo".into(),
        }
    }
}

const PREFIX: &str = "agent.";

impl Settings {
    /// From the kernel's command line.
    pub(crate) fn from_kernel(line: &str) -> Result<Self, Failure> {
        let words = line.split_ascii_whitespace();
        Self::read(words.filter_map(|word| word.strip_prefix(PREFIX)))
    }

    /// From arguments.
    pub(crate) fn from_arguments(words: &[String]) -> Result<Self, Failure> {
        Self::read(words.iter().map(String::as_str))
    }

    fn read<'a>(words: impl Iterator<Item = &'a str>) -> Result<Self, Failure> {
        let mut settings = Self::default();
        for word in words {
            let bad = |why: &str| Failure::invalid(format!("setting {word:?}: {why}"));
            let (key, value) = word.split_once('=').ok_or_else(|| bad("not key=value"))?;
            match key {
                "requests" => settings.requests = listen(value).ok_or_else(|| bad(LISTEN))?,
                "streams" => settings.streams = listen(value).ok_or_else(|| bad(LISTEN))?,
                "ready" => match listen(value) {
                    Some(Listen::Vsock(port)) => settings.ready = Some(port),
                    _ => return Err(bad("vsock:PORT")),
                },
                "deny" => {
                    settings.deny = AllBut::read(value)
                        .ok_or_else(|| bad("names of requests, with commas between them"))?;
                }
                "log" => {
                    settings.log = value
                        .parse()
                        .map_err(|_| bad("one of off, error, warn, info, debug, trace"))?;
                }
                "state" if value.starts_with('/') => settings.state = value.into(),
                "state" => return Err(bad("an absolute path")),
                "cgroup" if !value.is_empty() && !value.contains('/') => {
                    settings.cgroup = value.into();
                }
                "cgroup" => return Err(bad("one name, without a slash")),
                _ => {
                    return Err(bad(
                        "known are requests, streams, ready, deny, log, state and cgroup",
                    ));
                }
            }
        }
        Ok(settings)
    }
}

const LISTEN: &str = "vsock:PORT or unix:PATH";

fn listen(value: &str) -> Option<Listen> {
    match value.split_once(':')? {
        ("vsock", port) => port.parse().ok().map(Listen::Vsock),
        ("unix", path) if !path.is_empty() => Some(Listen::Unix(path.into())),
        _ => None,
    }
}

static PROGRAM: OnceLock<CString> = OnceLock::new();

/// The agent's program as stages execute it: through a read-only mount of it, so that a container whose
/// program is `/proc/self/exe` cannot write to the agent's.
pub(crate) fn protect_own_program(state: &Path) {
    match read_only_program(state) {
        // Set once, before anything is started.
        Ok(path) => drop(PROGRAM.set(path)),
        Err(failure) => log::warn!("{failure}: containers could write to the agent's program"),
    }
}

fn read_only_program(state: &Path) -> Result<CString, Failure> {
    let about = || "mount the agent's program read-only".into();
    let exe = std::fs::read_link("/proc/self/exe").during(about)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let program = open_tree(CWD, &exe, flags).during(about)?;
    let attr = MountAttr {
        set: RDONLY,
        ..MountAttr::default()
    };
    mount_attr::set(&program, attr, false, None).during(about)?;
    let at = state.join("agent");
    let _ = std::fs::File::create(&at);
    move_mount(
        &program,
        "",
        CWD,
        &at,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .during(about)?;
    CString::new(at.into_os_string().into_encoded_bytes())
        .map_err(|_| Failure::new("a path with a NUL byte"))
}

pub(crate) fn own_program() -> CString {
    PROGRAM
        .get()
        .cloned()
        .unwrap_or_else(|| c"/proc/self/exe".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_own_words_are_not_the_agents() {
        let line = "console=ttyS0 quiet agent.log=debug panic=-1 agent.requests=vsock:99 \
                    agent.ready=vsock:1026";
        let settings = Settings::from_kernel(line).unwrap();
        assert_eq!(settings.log, log::LevelFilter::Debug);
        assert_eq!(settings.requests, Listen::Vsock(99));
        assert_eq!(settings.ready, Some(1026));
        assert_eq!(settings.streams, Listen::Vsock(STREAM_PORT));
    }

    #[test]
    fn unknown_settings_are_errors() {
        for word in [
            "loud=1",
            "log=loudly",
            "deny=Everything",
            "log",
            "requests=tcp:1",
            "state=here",
            "cgroup=a/b",
        ] {
            assert!(
                Settings::from_arguments(&[word.to_owned()]).is_err(),
                "{word}"
            );
        }
    }
}
