//! Requests, by concern. Each is checked and answered here or by a job it starts.

pub(crate) mod container;
mod create;
mod execute;
mod files;
mod network;
pub(crate) mod process;
pub(crate) mod sandbox;
mod storage;
pub(crate) mod system;

use testudo_agent_protocol::Call;

use crate::agent::Agent;
use crate::rpc::ReplyTo;

/// Carries out a request that the policy has allowed.
pub(crate) fn carry_out(agent: &mut Agent, to: ReplyTo, call: Call) {
    match call {
        Call::Health(_) => {
            let answer = system::health(agent);
            agent.answer(to, Ok(answer));
        }
        Call::Metrics(_) => {
            let answer = system::metrics(agent);
            agent.answer(to, Ok(answer));
        }
        Call::Events(r) => system::events(agent, to, &r),
        Call::CreateSandbox(r) => sandbox::create(agent, to, r),
        Call::DestroySandbox(_) => sandbox::destroy(agent, to),
        Call::CreateContainer(r) => create::create(agent, to, r),
        Call::StartContainer(r) => container::start(agent, to, &r.id),
        Call::RemoveContainer(r) => container::remove(agent, to, &r),
        Call::UpdateContainer(r) => container::update(agent, to, r),
        Call::PauseContainer(r) => container::pause(agent, to, r.id),
        Call::ResumeContainer(r) => container::resume(agent, to, r.id),
        Call::StatsContainer(r) => container::stats(agent, to, &r.id),
        Call::ListProcesses(r) => {
            let answer = container::processes(agent, &r.id);
            agent.answer(to, answer);
        }
        Call::ListContainers(_) => {
            let answer = container::list(agent);
            agent.answer(to, Ok(answer));
        }
        Call::ExecProcess(r) => execute::execute(agent, to, r),
        Call::SignalProcess(r) => {
            let answer = process::signal(agent, &r);
            agent.answer(to, answer);
        }
        Call::WaitProcess(r) => process::wait(agent, to, &r),
        Call::ResizeTty(r) => {
            let answer = process::resize(agent, &r);
            agent.answer(to, answer);
        }
        Call::CloseStdin(r) => {
            let answer = process::close_stdin(agent, &r);
            agent.answer(to, answer);
        }
        Call::AddStorage(r) => storage::add(agent, to, r),
        Call::RemoveStorage(r) => {
            let answer = storage::remove(agent, &r.id);
            agent.answer(to, answer);
        }
        Call::ResizeStorage(r) => {
            let answer = storage::resize(agent, &r);
            agent.answer(to, answer);
        }
        Call::StatStorage(r) => storage::stat(agent, to, &r.id),
        Call::UpdateInterface(r) => network::update_interface(agent, to, r),
        Call::UpdateRoutes(r) => network::update_routes(agent, to, r),
        Call::UpdateNeighbours(r) => network::update_neighbours(agent, to, r),
        Call::ListInterfaces(_) => network::list_interfaces(agent, to),
        Call::ListRoutes(_) => network::list_routes(agent, to),
        Call::SetDns(r) => {
            let answer = sandbox::set_dns(agent, &r.dns.unwrap_or_default());
            agent.answer(to, answer);
        }
        Call::SetHostname(r) => {
            let answer = sandbox::set_hostname(&r.hostname);
            agent.answer(to, answer);
        }
        Call::WaitDevice(r) => system::wait_device(agent, to, r),
        Call::OnlineResources(r) => system::online(agent, to, r),
        Call::SetClock(r) => {
            let answer = system::set_clock(&r);
            agent.answer(to, answer);
        }
        Call::ReseedRandom(r) => {
            let answer = system::reseed(&r);
            agent.answer(to, answer);
        }
        Call::WriteFile(r) => files::write(agent, to, r),
        Call::ReadFile(r) => files::read(agent, to, r),
    }
}
