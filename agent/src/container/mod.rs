//! Containers and their processes, as the loop knows them.

pub(crate) mod hooks;
pub(crate) mod launch;
pub(crate) mod namespaces;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::process::Pid;
use testudo_agent_protocol::container_state::Phase;
use testudo_agent_protocol::{ContainerSpec, Exit, ProcessId};

use crate::cgroup::Group;
use crate::children::Ended;
use crate::rpc::ReplyTo;
use crate::stage::channel::Channel;

/// A container.
pub(crate) struct Container {
    pub(crate) phase: Phase,
    /// Key of its first process.
    pub(crate) init: u32,
    /// Keys of the processes executed in it, by their ids.
    pub(crate) execs: BTreeMap<String, u32>,
    pub(crate) group: Option<Group>,
    /// Ids of the storages that go with it.
    pub(crate) storages: Vec<String>,
    pub(crate) spec: ContainerSpec,
    /// Processes killed for want of memory so far.
    pub(crate) oom_kills: u64,
}

/// A process of a container.
pub(crate) struct Process {
    pub(crate) id: ProcessId,
    /// None before it is born.
    pub(crate) pid: Option<Pid>,
    pub(crate) exit: Option<Exit>,
    pub(crate) waiters: Vec<ReplyTo>,
    /// The agent's end of its terminal.
    pub(crate) terminal: Option<OwnedFd>,
    /// Its stage, as long as it has not executed.
    pub(crate) stage: Option<Channel>,
    /// Who asked for its start.
    pub(crate) starter: Option<ReplyTo>,
    pub(crate) stdout: Output,
    pub(crate) stderr: Output,
}

/// Where a process's output is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// Nobody asked for it.
    Nowhere,
    /// Its stream has not come.
    Waiting,
    /// A relay has it.
    Relay(u32),
    /// All of it has been taken: so many bytes.
    Over(u64),
}

/// A folder of the agent's that stages attach roots to.
pub(crate) fn anchor(state: &std::path::Path) -> PathBuf {
    state.join("anchor")
}

/// As it is told.
pub(crate) fn exit(ended: Ended, oom_killed: bool) -> Exit {
    let unsigned = |n: i32| u32::try_from(n).unwrap_or_default();
    let (code, signal) = match ended {
        Ended::Code(code) => (unsigned(code), 0),
        Ended::Signal(signal) => (unsigned(signal).saturating_add(128), unsigned(signal)),
    };
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Exit {
        code,
        signal,
        oom_killed,
        stdout_bytes: 0,
        stderr_bytes: 0,
        at_ns: i64::try_from(now.as_nanos()).unwrap_or(i64::MAX),
    }
}
