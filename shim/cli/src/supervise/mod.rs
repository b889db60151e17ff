//! The supervisor: one small process for each pod (ADR 0018).
//!
//! ```text
//!  testudo run ──spawns──▶ testudo supervise ──spawns──▶ testudo-vmm, passt   (die with it: PDEATHSIG)
//!      │  link (Ask, Tell, descriptors)  │                   │
//!      └────────────────────────────────▶│ ◀══ output ═══════╡ vsock
//!  testudo logs, stop, attach ──socket──▶│                   agent
//! ```
//! | thread | does |
//! |---|---|
//! | main | starts everything, waits for what happens, ends everything; alone writes `state.json` |
//! | `out`, `err` | take the container's output to the log and to whoever is attached |
//! | `wait` | waits at the agent for the container's end |
//! | `vmm` | waits for the VMM's |
//! | `door` | accepts commands; `client`: one for each |
//!
//! Threads tell main by a queue ([`Happening`]); what they share is [`Shared`].

mod clients;
mod ending;
mod network;
mod outputs;
mod starting;
mod vmm;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use testudo_agent_protocol::Exit;
use testudo_protocol::Connection;

use crate::guest::Guest;
use crate::link::{Link, Tell};
use crate::pod::Pod;
use crate::state::{Directories, EventLog, Held, Phase, State};
use clients::Clients;
use outputs::Outputs;
use vmm::Killer;

/// Stacks are memory as far as they are used; this is more than any of them needs.
const STACK: usize = 256 * 1024;

/// The arguments of `testudo supervise`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orders {
    /// The pod.
    pub id: String,
    /// The state directory.
    pub state: PathBuf,
    /// The runtime directory.
    pub runtime: PathBuf,
    /// Descriptor of the pod's lock.
    pub lock: i32,
    /// Descriptor of the link to whoever made the pod.
    pub link: i32,
}

/// The word that makes this program a supervisor.
pub const WORD: &str = "supervise";

impl Orders {
    /// As arguments.
    pub fn to_arguments(&self) -> Vec<std::ffi::OsString> {
        vec![
            WORD.into(),
            self.id.clone().into(),
            self.state.clone().into(),
            self.runtime.clone().into(),
            self.lock.to_string().into(),
            self.link.to_string().into(),
        ]
    }

    /// From the arguments that follow the word.
    pub fn from_arguments(args: &[std::ffi::OsString]) -> Option<Self> {
        let [id, state, runtime, lock, link] = args else {
            return None;
        };
        Some(Self {
            id: id.to_str()?.to_owned(),
            state: state.into(),
            runtime: runtime.into(),
            lock: lock.to_str()?.parse().ok()?,
            link: link.to_str()?.parse().ok()?,
        })
    }
}

/// What main is told.
#[derive(Debug)]
pub(crate) enum Happening {
    /// The container has ended.
    Exited(Exit),
    /// The agent does not answer any more.
    AgentLost,
    /// The VMM has ended.
    VmmEnded,
    /// It shall end.
    Stop {
        /// When patience is over, seconds.
        timeout_s: u64,
        /// Why, for the record.
        why: Option<String>,
    },
    /// It was paused, or resumed.
    Paused(bool),
}

/// What threads share.
pub(crate) struct Shared {
    pub(crate) pod: Pod,
    pub(crate) guest: Guest,
    pub(crate) folder: PathBuf,
    pub(crate) sockets: PathBuf,
    pub(crate) outputs: Outputs,
    pub(crate) clients: Clients,
    pub(crate) events: EventLog,
    pub(crate) killer: Killer,
    pub(crate) happenings: Sender<Happening>,
}

impl Shared {
    /// Starts a thread that shares this.
    pub(crate) fn thread(
        self: &Arc<Self>,
        name: &str,
        body: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) -> std::io::Result<JoinHandle<()>> {
        let shared = Arc::clone(self);
        let builder = std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK);
        builder.spawn(move || body(&shared))
    }

    /// Tells main.
    pub(crate) fn happened(&self, happening: Happening) {
        // Main ends only with the process.
        let _ = self.happenings.send(happening);
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The supervisor, from start to end.
pub(crate) struct Supervisor {
    pub(crate) shared: Arc<Shared>,
    pub(crate) happenings: Receiver<Happening>,
    pub(crate) state: State,
    pub(crate) directories: Directories,
    pub(crate) vmm: Option<vmm::Vmm>,
    pub(crate) network: Option<network::Network>,
    /// Held to the end.
    _lock: Held,
}

/// `testudo supervise`.
pub fn main(orders: &Orders) -> ExitCode {
    match prepare(orders) {
        Ok(mut supervisor) => {
            supervisor.run();
            ExitCode::SUCCESS
        }
        Err(error) => {
            // supervisor.log
            eprintln!("testudo supervise: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn prepare(orders: &Orders) -> anyhow::Result<Supervisor> {
    use anyhow::Context;
    let lock = Held::inherited(crate::os::inherited(orders.lock)?);
    let link = Connection::from_fd(crate::os::inherited(orders.link)?);
    crate::os::one_heap();
    // A session of its own: the terminal's signals are for the command.
    let _ = rustix::process::setsid();
    let directories = Directories::at(orders.state.clone(), orders.runtime.clone());
    let folder = directories.pod(&orders.id);
    let text = std::fs::read(folder.join("pod.json")).context("cannot read pod.json")?;
    let pod: Pod = serde_json::from_slice(&text).context("cannot understand pod.json")?;
    let sockets = directories.sockets(&pod.id);
    let (sender, happenings) = channel();
    let shared = Arc::new(Shared {
        guest: Guest::of(&sockets),
        outputs: Outputs::new(&folder, pod.log_bytes)?,
        clients: Clients::default(),
        events: EventLog::of(directories.state()),
        killer: Killer::default(),
        happenings: sender,
        folder,
        sockets,
        pod,
    });
    clients::serve(&shared, Link(link))?;
    Ok(Supervisor {
        state: State::new(std::process::id()),
        shared,
        happenings,
        directories,
        vmm: None,
        network: None,
        _lock: lock,
    })
}

impl Supervisor {
    fn run(&mut self) {
        match self.start() {
            Ok(()) => {
                self.state.phase = Phase::Running;
                self.state.started_ms = Some(crate::clock::now_ms());
                self.record();
                self.event("start", None);
                self.shared.clients.tell_all(&Tell::Started);
                self.watch();
            }
            Err(failure) => self.fail(&failure),
        }
    }

    pub(crate) fn record(&self) {
        if let Err(e) = self.state.write(&self.shared.folder) {
            eprintln!("testudo supervise: cannot write state.json: {e}");
        }
    }

    pub(crate) fn event(&self, what: &str, detail: Option<String>) {
        let pod = &self.shared.pod;
        self.shared.events.add(what, &pod.id, &pod.name, detail);
    }
}
