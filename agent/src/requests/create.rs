//! Creating a container: from a specification to a process that waits for its start.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::thread::UnshareFlags;
use testudo_agent_protocol::container_state::Phase;
use testudo_agent_protocol::{
    CreateContainerRequest, CreateContainerResponse, ProcessId, Root, Seccomp, Stdio, code,
};

use crate::agent::Agent;
use crate::cgroup::{Group, Tree};
use crate::children::Children;
use crate::container::hooks::{self, State};
use crate::container::launch::{Launch, Launched, launch};
use crate::container::namespaces::{self, Plan};
use crate::container::{Container, Output, Process, anchor};
use crate::devices::Devices;
use crate::failure::{During, Failure};
use crate::rpc::ReplyTo;
use crate::seccomp::Filter;
use crate::stage;
use crate::stage::channel::Order;
use crate::stage::options::Options;
use crate::stdio::{Direction, Ends, Want};
use crate::storage::{self, Mounted, Roots, check_id};

pub(super) fn create(agent: &mut Agent, to: ReplyTo, request: CreateContainerRequest) {
    let id = request.id.clone();
    match plan(agent, request) {
        Ok((key, work)) => {
            agent.children.begin_birth();
            let stdio = work.stdio;
            agent.by_job::<CreateContainerRequest, _>(
                to,
                "create",
                // Its failure is for the loop to clean up after.
                move || Ok(work.carry_out()),
                move |agent, built| {
                    let created = agent.created(key, &id, &stdio, built);
                    agent.children.end_birth();
                    created
                },
            );
        }
        Err(failure) => agent.refuse(to, failure),
    }
}

/// What the job needs.
struct Work {
    request: CreateContainerRequest,
    plan: Plan,
    /// Kinds of the namespaces to join, and these.
    joins: Vec<u32>,
    joined: Vec<OwnedFd>,
    roots: Roots,
    state: PathBuf,
    tree: Tree,
    devices: Arc<Devices>,
    children: Arc<Children>,
    stdio: Stdio,
}

/// What the job gives.
struct Built {
    launched: Launched,
    group: Group,
    storages: Vec<(String, Mounted)>,
}

fn plan(agent: &mut Agent, request: CreateContainerRequest) -> Result<(u32, Work), Failure> {
    check_id("container", &request.id)?;
    if agent.containers.contains_key(&request.id) {
        let what = format!("there is a container {} already", request.id);
        return Err(Failure::of(code::EXISTS, what));
    }
    let spec = request
        .spec
        .as_ref()
        .ok_or_else(|| Failure::invalid("a container without a specification"))?;
    let process = spec.process.as_ref();
    if process.is_none_or(|process| process.args.is_empty()) {
        return Err(Failure::invalid("a container without a program"));
    }
    let stdio = request.stdio.unwrap_or_default();
    check_stdio(&stdio, process.is_some_and(|process| process.terminal))?;
    for storage in &request.storages {
        check_id("storage", &storage.id)?;
        if agent.storages.contains_key(&storage.id) {
            let what = format!("there is a storage {} already", storage.id);
            return Err(Failure::of(code::EXISTS, what));
        }
    }
    let plan = Plan::of(spec)?;
    let (mut joins, mut joined) = (Vec::new(), Vec::new());
    for (kind, other) in &plan.joins {
        let init = agent.container(other)?.init;
        let pid = agent
            .process(init)?
            .pid
            .ok_or_else(|| Failure::wrong_state(format!("container {other} is not running")))?;
        let (kind, fd) = namespaces::open(pid, *kind)?;
        joins.push(kind);
        joined.push(fd);
    }
    let roots = agent
        .storages
        .iter()
        .map(|(id, storage)| Ok((id.clone(), storage.view()?)))
        .collect::<Result<Roots, Failure>>()?;
    let key = agent.new_key();
    let id = ProcessId {
        container: request.id.clone(),
        exec: String::new(),
    };
    agent.processes.insert(key, Process::new(id));
    let container = Container {
        phase: Phase::Creating,
        init: key,
        execs: std::collections::BTreeMap::new(),
        group: None,
        storages: Vec::new(),
        spec: spec.clone(),
        oom_kills: 0,
    };
    agent.containers.insert(request.id.clone(), container);
    let work = Work {
        plan,
        joins,
        joined,
        roots,
        state: agent.state.clone(),
        tree: agent.tree.clone(),
        devices: Arc::clone(&agent.devices),
        children: Arc::clone(&agent.children),
        stdio,
        request,
    };
    Ok((key, work))
}

/// Nothing, if there is none.
pub(super) fn compile(seccomp: Option<&Seccomp>) -> Result<Filter, Failure> {
    let none = || {
        Ok(Filter {
            program: Vec::new(),
            flags: 0,
        })
    };
    seccomp.map_or_else(none, crate::seccomp::compile)
}

/// A terminal is one thing used both ways.
pub(super) fn check_stdio(stdio: &Stdio, terminal: bool) -> Result<(), Failure> {
    if terminal && stdio.stderr != 0 {
        return Err(Failure::invalid(
            "a process with a terminal has no standard error apart",
        ));
    }
    let numbers = [stdio.stdin, stdio.stdout, stdio.stderr];
    let outputs = [stdio.stdout, stdio.stderr];
    if outputs.iter().all(|n| *n != 0) && stdio.stdout == stdio.stderr
        || numbers.iter().any(|n| *n != 0) && stdio.stdin == stdio.stderr && stdio.stdin != 0
    {
        return Err(Failure::invalid(
            "standard error needs a stream of its own; standard input and output may share one",
        ));
    }
    Ok(())
}

impl Work {
    fn carry_out(mut self) -> Result<Built, Failure> {
        let mut storages = Vec::new();
        for storage in &self.request.storages {
            let mounted = storage::mount(storage, &self.roots, &self.state, &self.devices)?;
            self.roots.insert(storage.id.clone(), mounted.view()?);
            storages.push((storage.id.clone(), mounted));
        }
        let group = self.tree.create(&self.request.id)?;
        match self.launch(group.clone()) {
            Ok(launched) => Ok(Built {
                launched,
                group,
                storages,
            }),
            Err(failure) => {
                if let Err(e) = group.remove() {
                    log::warn!("{e}");
                }
                // The last mounted first: one may be on another.
                while storages.pop().is_some() {}
                Err(failure)
            }
        }
    }

    fn launch(&mut self, group: Group) -> Result<Launched, Failure> {
        let spec = self.request.spec.clone().unwrap_or_default();
        let mut linux = spec.linux.clone().unwrap_or_default();
        if let Some(resources) = &linux.resources {
            group.limit(resources)?;
        }
        let filter = compile(linux.seccomp.as_ref())?;
        let user = self.plan.anew.contains(UnshareFlags::NEWUSER);
        let fds = self.descriptors(&spec.mounts, spec.root.as_ref())?;
        let process = spec.process.clone();
        let oom_score_adj = process.as_ref().and_then(|process| process.oom_score_adj);
        let hooks_given = spec.hooks.clone().unwrap_or_default();
        if !hooks_given.create_container.is_empty() || !hooks_given.start_container.is_empty() {
            // Refused rather than forgotten.
            return Err(Failure::of(
                code::UNIMPLEMENTED,
                "createContainer and startContainer hooks are not run by this agent",
            ));
        }
        let annotations = spec.annotations.clone();
        let launch_this = Launch {
            order: Order {
                joins: self.joins.clone(),
                unshare: self.plan.anew.bits(),
                anchor: anchor(&self.state).to_string_lossy().into_owned(),
                bind_devices: user,
                filter: filter.program,
                filter_flags: filter.flags,
                process,
                spec: Some(spec),
            },
            fds,
            stdio: self.stdio,
            group: Some(group),
            maps: (
                std::mem::take(&mut linux.uid_mappings),
                std::mem::take(&mut linux.gid_mappings),
            ),
            oom_score_adj,
        };
        // They run when the namespaces are there and nothing else is.
        launch(&launch_this, |pid| {
            let state = State {
                id: self.request.id.clone(),
                status: "creating",
                pid: Some(pid),
                annotations,
            };
            hooks::run("prestart", &hooks_given.prestart, &state, &self.children)?;
            hooks::run(
                "createRuntime",
                &hooks_given.create_runtime,
                &state,
                &self.children,
            )
        })
    }

    /// Namespaces, the root, the sources of bind mounts.
    fn descriptors(
        &mut self,
        mounts: &[testudo_agent_protocol::Mount],
        root: Option<&Root>,
    ) -> Result<Vec<OwnedFd>, Failure> {
        let mut fds: Vec<OwnedFd> = std::mem::take(&mut self.joined);
        let place = root
            .and_then(|root| root.place.as_ref())
            .ok_or_else(|| Failure::invalid("a container without a root"))?;
        let at = storage::resolve(&self.roots, place)?;
        fds.push(stage::detached(at, true).during(|| "take the root".into())?);
        for mount in mounts {
            let Some(place) = &mount.from else { continue };
            let at = storage::resolve(&self.roots, place)?;
            let recursive = Options::of(mount).recursive;
            let about = || format!("take what is mounted on {}", mount.destination);
            fds.push(stage::detached(at, recursive).during(about)?);
        }
        Ok(fds)
    }
}

impl Process {
    /// Not born yet.
    pub(super) fn new(id: ProcessId) -> Self {
        Self {
            id,
            pid: None,
            exit: None,
            waiters: Vec::new(),
            terminal: None,
            stage: None,
            starter: None,
            stdout: Output::Nowhere,
            stderr: Output::Nowhere,
        }
    }
}

impl Agent {
    fn created(
        &mut self,
        key: u32,
        id: &str,
        stdio: &Stdio,
        built: Result<Built, Failure>,
    ) -> Result<CreateContainerResponse, Failure> {
        let Built {
            launched,
            group,
            storages,
        } = match built {
            Ok(built) => built,
            Err(failure) => {
                self.containers.remove(id);
                self.processes.remove(&key);
                return Err(failure);
            }
        };
        self.watch_memory(&group);
        let container = self.container_mut(id)?;
        container.phase = Phase::Created;
        container.group = Some(group);
        container.storages = storages.iter().map(|(id, _)| id.clone()).collect();
        self.storages.extend(storages);
        let Launched {
            pid,
            stage,
            ends,
            terminal,
        } = launched;
        let process = self.process(key)?;
        process.pid = Some(pid);
        process.stage = Some(stage);
        self.connect(key, stdio, ends, terminal)?;
        if let Some(ended) = self.children.own(pid, key) {
            self.on_exit(key, ended);
        }
        Ok(CreateContainerResponse {
            pid: u32::try_from(pid.as_raw_nonzero().get()).unwrap_or_default(),
        })
    }

    /// A process's ends find their streams.
    pub(super) fn connect(
        &mut self,
        key: u32,
        stdio: &Stdio,
        ends: Ends,
        terminal: Option<OwnedFd>,
    ) -> Result<(), Failure> {
        let about = || "take a descriptor".into();
        let Ends {
            mut stdin,
            mut stdout,
            stderr,
        } = ends;
        if let Some(terminal) = terminal {
            let again = crate::stdio::relay::duplicate;
            stdin = (stdio.stdin != 0)
                .then(|| again(&terminal))
                .transpose()
                .during(about)?;
            stdout = (stdio.stdout != 0)
                .then(|| again(&terminal))
                .transpose()
                .during(about)?;
            self.process(key)?.terminal = Some(terminal);
        }
        let process = self.process(key)?;
        if stdout.is_some() {
            process.stdout = Output::Waiting;
        }
        if stderr.is_some() {
            process.stderr = Output::Waiting;
        }
        let mut wants: std::collections::BTreeMap<u64, Vec<Want>> =
            std::collections::BTreeMap::new();
        for (number, fd, direction, descriptor) in [
            (stdio.stdin, stdin, Direction::In, 0),
            (stdio.stdout, stdout, Direction::Out, 1),
            (stdio.stderr, stderr, Direction::Out, 2),
        ] {
            if let Some(fd) = fd {
                let owner = (key, descriptor);
                wants.entry(number).or_default().push(Want {
                    direction,
                    fd,
                    owner,
                });
            }
        }
        for (number, wants) in wants {
            let began = self
                .streams
                .want(number, wants, &mut self.relays, &self.poll);
            self.relays_began(&began);
        }
        Ok(())
    }
}
