//! One more process in a container.

use std::os::fd::OwnedFd;

use rustix::process::Pid;
use testudo_agent_protocol::container_state::Phase;
use testudo_agent_protocol::{ExecProcessRequest, ExecProcessResponse, code};

use super::create::{check_stdio, compile};
use crate::agent::Agent;
use crate::cgroup::Group;
use crate::container::launch::{Launch, Launched, executed, launch};
use crate::container::{Process, namespaces};
use crate::failure::Failure;
use crate::rpc::ReplyTo;
use crate::seccomp::Filter;
use crate::stage::channel::Order;
use crate::storage::check_id;

pub(super) fn execute(agent: &mut Agent, to: ReplyTo, request: ExecProcessRequest) {
    let (key, init, group, filter) = match plan(agent, &request) {
        Ok(planned) => planned,
        Err(failure) => return agent.refuse(to, failure),
    };
    agent.children.begin_birth();
    let stdio = request.stdio.unwrap_or_default();
    let id = request.id.clone().unwrap_or_default();
    agent.by_job::<ExecProcessRequest, _>(
        to,
        "exec",
        move || Ok(carry_out(request, init, group, filter)),
        move |agent, launched| {
            let answer = match launched {
                Ok(launched) => {
                    let Launched {
                        pid,
                        ends,
                        terminal,
                        ..
                    } = launched;
                    if let Ok(process) = agent.process(key) {
                        process.pid = Some(pid);
                    }
                    let connected = agent.connect(key, &stdio, ends, terminal);
                    if let Some(ended) = agent.children.own(pid, key) {
                        agent.on_exit(key, ended);
                    }
                    let pid = u32::try_from(pid.as_raw_nonzero().get()).unwrap_or_default();
                    connected.map(|()| ExecProcessResponse { pid })
                }
                Err(failure) => {
                    agent.processes.remove(&key);
                    if let Ok(container) = agent.container_mut(&id.container) {
                        container.execs.remove(&id.exec);
                    }
                    Err(failure)
                }
            };
            agent.children.end_birth();
            answer
        },
    );
}

fn plan(
    agent: &mut Agent,
    request: &ExecProcessRequest,
) -> Result<(u32, Pid, Option<Group>, Filter), Failure> {
    let id = request.id.clone().unwrap_or_default();
    check_id("process", &id.exec)?;
    let container = agent.container(&id.container)?;
    if container.execs.contains_key(&id.exec) {
        return Err(Failure::of(
            code::EXISTS,
            format!(
                "container {} has a process {} already",
                id.container, id.exec
            ),
        ));
    }
    if !matches!(container.phase, Phase::Created | Phase::Running) {
        return Err(Failure::wrong_state(format!(
            "container {} is {:?}, which is not running",
            id.container, container.phase
        )));
    }
    let process = request
        .process
        .as_ref()
        .filter(|process| !process.args.is_empty())
        .ok_or_else(|| Failure::invalid("a process without a program"))?;
    check_stdio(&request.stdio.unwrap_or_default(), process.terminal)?;
    let (init, group) = (container.init, container.group.clone());
    // Its filter is the container's.
    let filter = compile(
        container
            .spec
            .linux
            .as_ref()
            .and_then(|linux| linux.seccomp.as_ref()),
    )?;
    let pid = agent
        .process(init)?
        .pid
        .ok_or_else(|| Failure::wrong_state("the container has no process"))?;
    let key = agent.new_key();
    agent
        .container_mut(&id.container)?
        .execs
        .insert(id.exec.clone(), key);
    agent.processes.insert(key, Process::new(id));
    Ok((key, pid, group, filter))
}

fn carry_out(
    request: ExecProcessRequest,
    init: Pid,
    group: Option<Group>,
    filter: Filter,
) -> Result<Launched, Failure> {
    let (joins, fds): (Vec<u32>, Vec<OwnedFd>) = namespaces::all(init)?.into_iter().unzip();
    let process = request.process.unwrap_or_default();
    let launched = launch(
        &Launch {
            oom_score_adj: process.oom_score_adj,
            order: Order {
                joins,
                process: Some(process),
                filter: filter.program,
                filter_flags: filter.flags,
                ..Order::default()
            },
            fds,
            stdio: request.stdio.unwrap_or_default(),
            group,
            maps: (Vec::new(), Vec::new()),
        },
        |_| Ok(()),
    )?;
    executed(&launched)?;
    Ok(launched)
}
