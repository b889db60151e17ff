//! Containers: what is asked of one that exists.

use std::sync::Arc;

use testudo_agent_protocol::container_state::Phase;
use testudo_agent_protocol::{
    ContainerState, Hooks, ListContainersResponse, ListProcessesResponse, PauseContainerRequest,
    PauseContainerResponse, ProcessState, RemoveContainerRequest, RemoveContainerResponse,
    ResumeContainerRequest, ResumeContainerResponse, StartContainerRequest, StartContainerResponse,
    StatsContainerRequest, StatsContainerResponse, UpdateContainerRequest, UpdateContainerResponse,
};

use super::system;
use crate::agent::Agent;
use crate::cgroup::Group;
use crate::container::hooks::{self, State};
use crate::failure::{During, Failure};
use crate::poll::{READ, Source};
use crate::rpc::ReplyTo;
use crate::stage::channel::{Told, Word};

pub(super) fn start(agent: &mut Agent, to: ReplyTo, id: &str) {
    if let Err(failure) = try_start(agent, id) {
        return agent.refuse(to, failure);
    }
    // Answered by `on_stage`.
    let key = agent.container(id).map(|container| container.init);
    if let Ok(process) = key.and_then(|key| agent.process(key)) {
        process.starter = Some(to);
    }
}

fn try_start(agent: &mut Agent, id: &str) -> Result<(), Failure> {
    let container = agent.container(id)?;
    if container.phase != Phase::Created {
        return Err(Failure::wrong_state(format!(
            "container {id} is {:?}; only one that is created can be started",
            container.phase
        )));
    }
    let key = container.init;
    let poll = &agent.poll;
    let process = agent
        .processes
        .get_mut(&key)
        .ok_or_else(|| Failure::not_found("the process is gone"))?;
    let stage = process
        .stage
        .as_ref()
        .ok_or_else(|| Failure::wrong_state("the process has started already"))?;
    poll.add(stage, Source::Starting(key), READ)
        .during(|| "listen to a stage".into())?;
    stage
        .say(Word::Start)
        .during(|| "tell a stage to start; has it been killed? So I".into())?;
    agent.container_mut(id)?.phase = Phase::Running;
    Ok(())
}

/// A stage has executed, and so closed its socket, or says why not.
pub(crate) fn on_stage(agent: &mut Agent, key: u32) {
    let Some(process) = agent.processes.get_mut(&key) else {
        return;
    };
    let (Some(stage), starter) = (process.stage.take(), process.starter.take()) else {
        return;
    };
    agent.poll.remove(&stage);
    let answer = match stage.next_report() {
        Ok((report, _)) if report.told == i32::from(Told::Failed) => Err(report.into_failure()),
        Ok(_) => Err(Failure::new("a stage told something unexpected")),
        Err(_) => Ok(StartContainerResponse {}),
    };
    let Some(to) = starter else { return };
    let hooks = agent.hooks_of(key, "running").filter(|_| answer.is_ok());
    match hooks {
        // The specification has their failures warned of and otherwise ignored.
        Some((hooks, state)) if !hooks.poststart.is_empty() => {
            let children = Arc::clone(&agent.children);
            agent.by_job::<StartContainerRequest, _>(
                to,
                "poststart",
                move || {
                    if let Err(e) = hooks::run("poststart", &hooks.poststart, &state, &children) {
                        log::warn!("{e}");
                    }
                    Ok(())
                },
                |_, ()| Ok(StartContainerResponse {}),
            );
        }
        _ => agent.answer(to, answer),
    }
}

pub(super) fn remove(agent: &mut Agent, to: ReplyTo, request: &RemoveContainerRequest) {
    let id = request.id.clone();
    let group = match check_removal(agent, request) {
        Ok(group) => group,
        Err(failure) => return agent.refuse(to, failure),
    };
    let init = agent.container(&id).map(|container| container.init);
    let hooks = init.ok().and_then(|key| agent.hooks_of(key, "stopped"));
    let children = Arc::clone(&agent.children);
    agent.by_job::<RemoveContainerRequest, _>(
        to,
        "remove",
        move || {
            group.map_or(Ok(()), |group| group.remove())?;
            if let Some((hooks, state)) = hooks
                && let Err(e) = hooks::run("poststop", &hooks.poststop, &state, &children)
            {
                log::warn!("{e}");
            }
            Ok(())
        },
        move |agent, ()| {
            agent.forget_container(&id);
            Ok(RemoveContainerResponse {})
        },
    );
}

fn check_removal(
    agent: &mut Agent,
    request: &RemoveContainerRequest,
) -> Result<Option<Group>, Failure> {
    let container = agent.container(&request.id)?;
    match container.phase {
        Phase::Stopped => {}
        Phase::Created | Phase::Running | Phase::Paused if request.force => {}
        phase => {
            return Err(Failure::wrong_state(format!(
                "container {} is {phase:?}; stop it first",
                request.id
            )));
        }
    }
    Ok(container.group.clone())
}

impl Agent {
    /// Everything of a container goes; nothing runs in it any more.
    pub(crate) fn forget_container(&mut self, id: &str) {
        let Some(container) = self.containers.remove(id) else {
            return;
        };
        for key in container.execs.values().copied().chain([container.init]) {
            self.streams.forget(key);
            if let Some(process) = self.processes.remove(&key) {
                let exit = process.exit.unwrap_or(testudo_agent_protocol::Exit {
                    code: 137,
                    signal: 9,
                    ..testudo_agent_protocol::Exit::default()
                });
                for to in process.waiters {
                    let answer = testudo_agent_protocol::WaitProcessResponse { exit: Some(exit) };
                    self.answer(to, Ok(answer));
                }
                if let Some(to) = process.starter {
                    self.refuse(to, Failure::not_found("the container was removed"));
                }
            }
        }
        for storage in container.storages.iter().rev() {
            self.storages.remove(storage);
        }
    }

    /// A container's hooks, by the key of its first process, and what they are told.
    fn hooks_of(&self, key: u32, status: &'static str) -> Option<(Hooks, State)> {
        let process = self.processes.get(&key)?;
        let id = process.id.container.clone();
        let spec = &self.containers.get(&id)?.spec;
        let state = State {
            id,
            status,
            pid: process.pid.filter(|_| process.exit.is_none()),
            annotations: spec.annotations.clone(),
        };
        Some((spec.hooks.clone()?, state))
    }

    fn group_of(&self, id: &str) -> Result<Group, Failure> {
        let group = self.container(id)?.group.clone();
        group.ok_or_else(|| Failure::wrong_state(format!("container {id} is being created")))
    }
}

pub(super) fn update(agent: &mut Agent, to: ReplyTo, request: UpdateContainerRequest) {
    let group = match agent.group_of(&request.id) {
        Ok(group) => group,
        Err(failure) => return agent.refuse(to, failure),
    };
    let resources = request.resources.unwrap_or_default();
    agent.by_job::<UpdateContainerRequest, _>(
        to,
        "update",
        move || group.limit(&resources),
        |_, ()| Ok(UpdateContainerResponse {}),
    );
}

pub(super) fn pause(agent: &mut Agent, to: ReplyTo, id: String) {
    let group = match agent.container(&id).map(|c| c.phase) {
        Ok(Phase::Running | Phase::Paused) => agent.group_of(&id),
        Ok(phase) => Err(Failure::wrong_state(format!("container {id} is {phase:?}"))),
        Err(failure) => Err(failure),
    };
    match group {
        Ok(group) => agent.by_job::<PauseContainerRequest, _>(
            to,
            "pause",
            move || group.freeze(true),
            move |agent, ()| {
                let container = agent.container_mut(&id)?;
                if container.phase == Phase::Running {
                    container.phase = Phase::Paused;
                }
                Ok(PauseContainerResponse {})
            },
        ),
        Err(failure) => agent.refuse(to, failure),
    }
}

pub(super) fn resume(agent: &mut Agent, to: ReplyTo, id: String) {
    match agent.group_of(&id) {
        Ok(group) => agent.by_job::<ResumeContainerRequest, _>(
            to,
            "resume",
            move || group.freeze(false),
            move |agent, ()| {
                let container = agent.container_mut(&id)?;
                if container.phase == Phase::Paused {
                    container.phase = Phase::Running;
                }
                Ok(ResumeContainerResponse {})
            },
        ),
        Err(failure) => agent.refuse(to, failure),
    }
}

pub(super) fn stats(agent: &mut Agent, to: ReplyTo, id: &str) {
    match agent.group_of(id) {
        Ok(group) => agent.by_job::<StatsContainerRequest, _>(
            to,
            "stats",
            move || Ok((group.stats(), system::interfaces())),
            |_, (cgroup, interfaces)| Ok(StatsContainerResponse { cgroup, interfaces }),
        ),
        Err(failure) => agent.refuse(to, failure),
    }
}

pub(super) fn processes(agent: &Agent, id: &str) -> Result<ListProcessesResponse, Failure> {
    let pids = agent.group_of(id)?.processes();
    Ok(ListProcessesResponse { pids })
}

pub(super) fn list(agent: &Agent) -> ListContainersResponse {
    let pid = |key: u32| {
        let process = agent.processes.get(&key);
        let pid = process.and_then(|process| process.pid);
        pid.and_then(|pid| u32::try_from(pid.as_raw_nonzero().get()).ok())
            .unwrap_or_default()
    };
    let exit = |key: u32| agent.processes.get(&key).and_then(|process| process.exit);
    let containers = agent
        .containers
        .iter()
        .map(|(id, container)| ContainerState {
            id: id.clone(),
            phase: container.phase.into(),
            pid: pid(container.init),
            exit: exit(container.init),
            execs: container
                .execs
                .iter()
                .map(|(exec, key)| ProcessState {
                    exec: exec.clone(),
                    pid: pid(*key),
                    exit: exit(*key),
                })
                .collect(),
        });
    ListContainersResponse {
        containers: containers.collect(),
    }
}
