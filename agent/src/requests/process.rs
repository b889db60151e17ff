//! Processes: what is asked of one that exists.

use rustix::process::Signal;
use rustix::termios::tcsetwinsize;
use testudo_agent_protocol::{
    CloseStdinRequest, CloseStdinResponse, ResizeTtyRequest, ResizeTtyResponse,
    SignalProcessRequest, SignalProcessResponse, WaitProcessRequest, WaitProcessResponse,
};

use crate::agent::Agent;
use crate::failure::{During, Failure};
use crate::rpc::ReplyTo;
use crate::stage::winsize;

/// The most signals there are.
const LAST: u32 = 64;

pub(super) fn signal(
    agent: &mut Agent,
    request: &SignalProcessRequest,
) -> Result<SignalProcessResponse, Failure> {
    let number = i32::try_from(request.signal)
        .ok()
        .filter(|_| (1..=LAST).contains(&request.signal))
        .ok_or_else(|| Failure::invalid(format!("there is no signal {}", request.signal)))?;
    let key = agent.key_of(request.id.as_ref())?;
    if request.all {
        return signal_all(agent, request, number);
    }
    let process = agent.process(key)?;
    // One that has ended has a number that may be another's by now.
    if process.exit.is_some() {
        return Err(Failure::wrong_state("the process has ended"));
    }
    let pid = process
        .pid
        .ok_or_else(|| Failure::wrong_state("the process is being created"))?;
    send(pid, number)?;
    Ok(SignalProcessResponse {})
}

fn send(pid: rustix::process::Pid, number: i32) -> Result<(), Failure> {
    crate::sys::signal::kill(pid, number).during(|| format!("send signal {number}"))
}

/// To everyone in the container's group. For SIGKILL the kernel does it, and nobody slips away.
fn signal_all(
    agent: &mut Agent,
    request: &SignalProcessRequest,
    number: i32,
) -> Result<SignalProcessResponse, Failure> {
    let id = request.id.clone().unwrap_or_default().container;
    let group = agent
        .container(&id)?
        .group
        .clone()
        .ok_or_else(|| Failure::wrong_state("the container is being created"))?;
    if number == Signal::KILL.as_raw() {
        group.kill()?;
        return Ok(SignalProcessResponse {});
    }
    for pid in group.processes() {
        let pid = i32::try_from(pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        // Whoever has ended in the meantime needs none.
        if let Some(pid) = pid {
            let _ = crate::sys::signal::kill(pid, number);
        }
    }
    Ok(SignalProcessResponse {})
}

pub(super) fn wait(agent: &mut Agent, to: ReplyTo, request: &WaitProcessRequest) {
    let key = match agent.key_of(request.id.as_ref()) {
        Ok(key) => key,
        Err(failure) => return agent.refuse(to, failure),
    };
    match agent.process(key).map(|process| process.exit) {
        Ok(Some(exit)) => {
            agent.answer(to, Ok(WaitProcessResponse { exit: Some(exit) }));
            forget(agent, key);
        }
        Ok(None) => {
            if let Ok(process) = agent.process(key) {
                process.waiters.push(to);
            }
        }
        Err(failure) => agent.refuse(to, failure),
    }
}

/// One that was executed and whose end was told is of no more interest; a container's first process
/// stays as long as the container.
pub(crate) fn forget(agent: &mut Agent, key: u32) {
    let Some(process) = agent.processes.get(&key) else {
        return;
    };
    let id = process.id.clone();
    if id.exec.is_empty() {
        return;
    }
    agent.processes.remove(&key);
    if let Ok(container) = agent.container_mut(&id.container) {
        container.execs.remove(&id.exec);
    }
}

pub(super) fn resize(
    agent: &mut Agent,
    request: &ResizeTtyRequest,
) -> Result<ResizeTtyResponse, Failure> {
    let key = agent.key_of(request.id.as_ref())?;
    let size = request
        .size
        .ok_or_else(|| Failure::invalid("a size is missing"))?;
    let process = agent.process(key)?;
    let terminal = process
        .terminal
        .as_ref()
        .ok_or_else(|| Failure::wrong_state("the process has no terminal, or has ended"))?;
    tcsetwinsize(terminal, winsize(&size)).during(|| "size the terminal".into())?;
    Ok(ResizeTtyResponse {})
}

pub(super) fn close_stdin(
    agent: &mut Agent,
    request: &CloseStdinRequest,
) -> Result<CloseStdinResponse, Failure> {
    let key = agent.key_of(request.id.as_ref())?;
    agent.streams.close((key, 0));
    agent.relays.end((key, 0), &agent.poll);
    Ok(CloseStdinResponse {})
}
