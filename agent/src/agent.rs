//! The agent: owner of everything, and the loop that alone touches it.
//!
//! The loop never waits for anything but its epoll set. What may take time is a job (`jobs.rs`), which
//! gets what it needs by value and hands back what to do with the outcome.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use prost::Message;
use rustix::fs::inotify::CreateFlags;
use rustix::process::{WaitOptions, wait};
use rustix::time::{ClockId, clock_gettime};
use testudo_agent_protocol::container_state::Phase;
use testudo_agent_protocol::{ExitEvent, ProcessId, Rpc, event::What};

use crate::button;
use crate::cgroup::Tree;
use crate::children::{Children, Ended};
use crate::container::{Container, Output, Process, exit};
use crate::devices::Devices;
use crate::events::Events;
use crate::failure::{During, Failure};
use crate::jobs::Jobs;
use crate::policy::{AllBut, Policy};
use crate::poll::{Poll, READ, Ready, Source};
use crate::requests;
use crate::rpc::{ReplyTo, Server};
use crate::settings::{Listen, Settings};
use crate::stdio::relay::{Ended as RelayEnded, Relay};
use crate::stdio::{Relays, Streams};
use crate::storage::Mounted;
use crate::sys::signal;
use crate::uevents;

/// Everything.
pub(crate) struct Agent {
    pub(crate) poll: Poll,
    pub(crate) server: Server,
    pub(crate) streams: Streams,
    pub(crate) relays: Relays,
    pub(crate) jobs: Jobs,
    pub(crate) children: Arc<Children>,
    pub(crate) devices: Arc<Devices>,
    pub(crate) tree: Tree,
    pub(crate) state: PathBuf,
    pub(crate) storages: BTreeMap<String, Mounted>,
    pub(crate) containers: BTreeMap<String, Container>,
    pub(crate) processes: BTreeMap<u32, Process>,
    pub(crate) events: Events,
    pub(crate) sandbox: Option<requests::sandbox::Sandbox>,
    pub(crate) init: bool,
    pub(crate) started_ns: u64,
    pub(crate) listening_ns: u64,
    /// The loop ends when this is set.
    pub(crate) ending: bool,
    policy: Box<dyn Policy>,
    signals: OwnedFd,
    uevents: Option<OwnedFd>,
    button: Option<OwnedFd>,
    /// Open as long as the agent lives: the host hears of its end.
    _ready: Option<OwnedFd>,
    /// Watches memory.events of each container's group.
    pub(crate) watches: OwnedFd,
    next_process: u32,
}

/// CLOCK_MONOTONIC, nanoseconds.
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let part = |n: i64| u64::try_from(n).unwrap_or_default();
    part(now.tv_sec)
        .saturating_mul(1_000_000_000)
        .saturating_add(part(now.tv_nsec))
}

fn listen(at: &Listen) -> Result<OwnedFd, Failure> {
    match at {
        Listen::Vsock(port) => crate::sys::vsock::listen(*port)
            .during(|| format!("listen on vsock port {port}; has the machine a vsock device?")),
        Listen::Unix(path) => {
            let _ = std::fs::remove_file(path);
            let socket = std::os::unix::net::UnixListener::bind(path);
            let socket = socket.during(|| format!("listen on {}", path.display()))?;
            socket.set_nonblocking(true).during(|| "listen".into())?;
            Ok(socket.into())
        }
    }
}

/// A host that is not there will ask by itself.
fn call_host(port: u32) -> Option<OwnedFd> {
    let called = crate::sys::vsock::call_host(port);
    called
        .inspect_err(|e| log::warn!("cannot call port {port} of the host: {e}"))
        .ok()
}

impl Agent {
    /// Everything in its place, and listening.
    pub(crate) fn new(settings: &Settings, init: bool, started_ns: u64) -> Result<Self, Failure> {
        let poll = Poll::new().during(|| "make an epoll set".into())?;
        let streams = Streams::new(listen(&settings.streams)?, &poll)
            .during(|| "listen for streams".into())?;
        let server = Server::new(listen(&settings.requests)?, &poll)
            .during(|| "listen for requests".into())?;
        let listening_ns = now_ns();
        // The host connects while the rest is made; requests wait for the loop.
        let ready = settings.ready.and_then(call_host);
        let signals =
            signal::descriptor(&[libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGPWR])
                .during(|| "listen for signals".into())?;
        poll.add(&signals, Source::Signals, READ)
            .during(|| "listen for signals".into())?;
        let uevents = match uevents::listen() {
            Ok(socket) => {
                poll.add(&socket, Source::Uevents, READ)
                    .during(|| "listen for devices".into())?;
                Some(socket)
            }
            // Only in the first network namespace.
            Err(e) => {
                log::warn!("new devices will not be heard of: {e}");
                None
            }
        };
        let watches = rustix::fs::inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
            .during(|| "watch files".into())?;
        poll.add(&watches, Source::CgroupFiles, READ)
            .during(|| "watch files".into())?;
        for folder in ["", "storage", "anchor"] {
            let path = settings.state.join(folder);
            std::fs::create_dir_all(&path).during(|| format!("make {}", path.display()))?;
        }
        let button = if init { button::open() } else { None };
        if let Some(button) = &button {
            poll.add(button, Source::Button, READ)
                .during(|| "listen for the power button".into())?;
        }
        let jobs = Jobs::new().during(|| "make a bell for jobs".into())?;
        poll.add(&jobs, Source::Jobs, READ)
            .during(|| "listen for jobs".into())?;
        let tree = Tree::open(&settings.cgroup)?;
        Ok(Self {
            poll,
            server,
            streams,
            relays: Relays::new(),
            jobs,
            children: Arc::default(),
            devices: Arc::default(),
            tree,
            state: settings.state.clone(),
            storages: BTreeMap::new(),
            containers: BTreeMap::new(),
            processes: BTreeMap::new(),
            events: Events::default(),
            sandbox: None,
            init,
            started_ns,
            listening_ns,
            ending: false,
            policy: Box::new(AllBut(settings.deny.clone())),
            signals,
            uevents,
            button,
            _ready: ready,
            watches,
            next_process: 1,
        })
    }

    /// Serves until the end.
    pub(crate) fn run(&mut self) -> Result<(), Failure> {
        while !self.ending {
            let ready = self.poll.wait().during(|| "wait for events".into())?;
            for (source, ready) in ready {
                self.on(source, ready);
            }
        }
        Ok(())
    }

    fn on(&mut self, source: Source, ready: Ready) {
        match source {
            Source::RequestListener => self.server.accept(&self.poll),
            Source::StreamListener => self.streams.accept(&self.poll),
            Source::Connection(id) => {
                for (to, call) in self.server.ready(id, &self.poll) {
                    log::debug!("{}", call.name());
                    match self.policy.check(&call) {
                        Ok(()) => requests::carry_out(self, to, call),
                        Err(why) => {
                            let code = testudo_agent_protocol::code::DENIED;
                            self.refuse(to, Failure::of(code, why));
                        }
                    }
                }
            }
            Source::Arrival(id) => {
                let began = self.streams.arrive(id, &mut self.relays, &self.poll);
                self.relays_began(&began);
            }
            Source::Jobs => {
                for then in self.jobs.finished() {
                    then(self);
                }
            }
            Source::Signals => self.on_signals(),
            Source::Uevents => {
                if let Some(socket) = &self.uevents
                    && uevents::drain(socket)
                {
                    self.devices.ring();
                }
            }
            Source::Starting(key) => requests::container::on_stage(self, key),
            Source::RelayFrom(id) => self.on_relay(id, false, ready),
            Source::RelayTo(id) => self.on_relay(id, true, ready),
            Source::Button => {
                if self.button.as_ref().is_some_and(button::pressed) {
                    log::info!("the power button was pressed");
                    self.ending = true;
                }
            }
            Source::CgroupFiles => requests::system::on_cgroup_files(self),
        }
    }

    fn on_relay(&mut self, id: u32, to_side: bool, ready: Ready) {
        if let Some(RelayEnded { owner, bytes }) = self.relays.ready(id, to_side, ready, &self.poll)
            && let Some(output) = self.output(owner)
        {
            *output = Output::Over(bytes);
        }
    }

    /// Relays began for descriptors of processes.
    pub(crate) fn relays_began(&mut self, began: &[((u32, i32), u32)]) {
        for (owner, id) in began {
            if let Some(output) = self.output(*owner) {
                *output = Output::Relay(*id);
            }
        }
    }

    fn output(&mut self, (process, descriptor): (u32, i32)) -> Option<&mut Output> {
        let process = self.processes.get_mut(&process)?;
        match descriptor {
            1 => Some(&mut process.stdout),
            2 => Some(&mut process.stderr),
            _ => None,
        }
    }

    fn on_signals(&mut self) {
        let mut record = [0; signal::RECORD];
        let mut told_to_end = false;
        while let Ok(signal::RECORD) = rustix::io::read(&self.signals, &mut record) {
            let number = record.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes));
            told_to_end |= number.is_some_and(|n| i32::try_from(n) != Ok(libc::SIGCHLD));
        }
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let ended = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Ended::Code(code),
                (None, Some(signal)) => Ended::Signal(signal),
                (None, None) => continue,
            };
            if let Some(key) = self.children.reaped(pid, ended) {
                self.on_exit(key, ended);
            }
        }
        if told_to_end {
            log::info!("told to end");
            self.ending = true;
        }
    }

    /// A process of a container has ended.
    pub(crate) fn on_exit(&mut self, key: u32, ended: Ended) {
        let Some(process) = self.processes.get(&key) else {
            return;
        };
        let id = process.id.clone();
        let oom_killed = self.oom_killed(&id.container);
        let mut exit = exit(ended, oom_killed && matches!(ended, Ended::Signal(9)));
        exit.stdout_bytes = self.written(key, 1, process.stdout);
        exit.stderr_bytes = self.written(key, 2, process.stderr);
        let Some(process) = self.processes.get_mut(&key) else {
            return;
        };
        process.exit = Some(exit);
        process.terminal = None;
        let waiters = std::mem::take(&mut process.waiters);
        let is_init = id.exec.is_empty();
        if is_init && let Some(container) = self.containers.get_mut(&id.container) {
            if container.phase != Phase::Creating {
                container.phase = Phase::Stopped;
            }
            if let Some(group) = &container.group {
                // Whatever shared its PID namespace with others does not end with its first process.
                let _ = group.kill();
            }
        }
        self.events.add(What::Exit(ExitEvent {
            process: Some(id),
            exit: Some(exit),
        }));
        let told = !waiters.is_empty();
        for to in waiters {
            let answer = testudo_agent_protocol::WaitProcessResponse { exit: Some(exit) };
            self.answer(to, Ok(answer));
        }
        requests::system::answer_events(self);
        if told {
            requests::process::forget(self, key);
        }
    }

    fn written(&self, key: u32, descriptor: i32, output: Output) -> u64 {
        match output {
            Output::Nowhere => 0,
            Output::Waiting => self.streams.waiting((key, descriptor)),
            Output::Relay(id) => self.relays.get(id).map_or(0, Relay::written),
            Output::Over(bytes) => bytes,
        }
    }

    fn oom_killed(&self, container: &str) -> bool {
        let group = self
            .containers
            .get(container)
            .and_then(|c| c.group.as_ref());
        group.is_some_and(|group| group.oom_kills() > 0)
    }

    /// Answers.
    pub(crate) fn answer<M: Message>(&mut self, to: ReplyTo, answer: Result<M, Failure>) {
        let answer = answer.map(|message| message.encode_to_vec());
        if let Err(failure) = &answer {
            log::info!("refused: {failure}");
        }
        self.server.answer(to, answer, &self.poll);
    }

    /// Answers with a refusal.
    pub(crate) fn refuse(&mut self, to: ReplyTo, failure: Failure) {
        self.answer::<testudo_agent_protocol::HealthResponse>(to, Err(failure));
    }

    /// Carries out by a job: `job` on its thread, `then` on the loop, whose outcome is the answer.
    pub(crate) fn by_job<R: Rpc, T: Send + 'static>(
        &mut self,
        to: ReplyTo,
        name: &str,
        job: impl FnOnce() -> Result<T, Failure> + Send + 'static,
        then: impl FnOnce(&mut Self, T) -> Result<R::Response, Failure> + Send + 'static,
    ) {
        let shared = Arc::new(std::sync::Mutex::new(Some(to)));
        let taken = Arc::clone(&shared);
        let take = |of: &std::sync::Mutex<Option<ReplyTo>>| {
            of.lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .take()
        };
        let started = self.jobs.start(name, move || {
            let outcome = job();
            Box::new(move |agent: &mut Self| {
                let answer = outcome.and_then(|outcome| then(agent, outcome));
                if let Some(to) = take(&taken) {
                    agent.answer(to, answer);
                }
            })
        });
        if let Err(failure) = started
            && let Some(to) = take(&shared)
        {
            self.refuse(to, failure);
        }
    }

    /// A key for a process that will be.
    pub(crate) fn new_key(&mut self) -> u32 {
        while self.next_process == 0 || self.processes.contains_key(&self.next_process) {
            self.next_process = self.next_process.wrapping_add(1);
        }
        let key = self.next_process;
        self.next_process = self.next_process.wrapping_add(1);
        key
    }

    pub(crate) fn container(&self, id: &str) -> Result<&Container, Failure> {
        self.containers
            .get(id)
            .ok_or_else(|| Failure::not_found(format!("there is no container {id:?}")))
    }

    pub(crate) fn container_mut(&mut self, id: &str) -> Result<&mut Container, Failure> {
        self.containers
            .get_mut(id)
            .ok_or_else(|| Failure::not_found(format!("there is no container {id:?}")))
    }

    /// The key of a process.
    pub(crate) fn key_of(&self, id: Option<&ProcessId>) -> Result<u32, Failure> {
        let id = id.ok_or_else(|| Failure::invalid("a request that names no process"))?;
        let container = self.container(&id.container)?;
        if id.exec.is_empty() {
            return Ok(container.init);
        }
        container.execs.get(&id.exec).copied().ok_or_else(|| {
            Failure::not_found(format!(
                "container {} has no process {:?}",
                id.container, id.exec
            ))
        })
    }

    pub(crate) fn process(&mut self, key: u32) -> Result<&mut Process, Failure> {
        self.processes
            .get_mut(&key)
            .ok_or_else(|| Failure::not_found("the process is gone"))
    }
}
