//! From nothing to a running container.

use std::fs::DirBuilder;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use testudo_agent_protocol::{
    CallError, Client, CreateSandboxRequest, READY_PORT, StartContainerRequest, Stdio,
    WaitProcessRequest, code,
};

use super::clients::{first, open_door, take_input};
use super::vmm::Vmm;
use super::{Happening, Supervisor, network, outputs};
use crate::container::{self, CONTAINER};
use crate::guest::{GuestError, VSOCK};
use crate::machine;
use crate::output::Stream;
use crate::pod::MountPlan;

/// Numbers of the first process's streams.
const STDIN: u64 = 1;
const STDOUT: u64 = 2;
const STDERR: u64 = 3;

/// Steps and how long they took.
struct Steps<'a> {
    list: &'a mut Vec<(String, u64)>,
    last: Instant,
}

impl Steps<'_> {
    fn done(&mut self, name: &str) {
        let us = u64::try_from(self.last.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.list.push((name.to_owned(), us));
        self.last = Instant::now();
    }
}

impl Supervisor {
    /// Everything, in order.
    pub(super) fn start(&mut self) -> anyhow::Result<()> {
        let mut list = Vec::new();
        let mut steps = Steps {
            list: &mut list,
            last: Instant::now(),
        };
        let started = self.start_by_steps(&mut steps);
        self.state.steps = list;
        started
    }

    fn start_by_steps(&mut self, steps: &mut Steps<'_>) -> anyhow::Result<()> {
        let ready = self.make_places()?;
        self.record();
        self.network = network::start(&self.shared)?;
        steps.done("network");
        self.start_vmm()?;
        self.record();
        steps.done("vmm");
        self.await_agent(&ready)?;
        if let Some(network) = &mut self.network {
            network.check(&self.shared)?;
        }
        let mut client = self.shared.guest.connect()?;
        let patience = Duration::from_secs(self.shared.pod.start_timeout_s.max(1));
        client.socket().set_read_timeout(Some(patience))?;
        steps.done("guest");
        self.make_sandbox(&mut client)?;
        steps.done("sandbox");
        self.make_container(&mut client)?;
        steps.done("container");
        client.call(&StartContainerRequest {
            id: CONTAINER.into(),
        })?;
        client.socket().set_read_timeout(None)?;
        self.await_end(client)?;
        steps.done("start");
        Ok(())
    }

    /// Sockets, and files of the host that are mounted singly.
    fn make_places(&self) -> anyhow::Result<UnixListener> {
        let sockets = &self.shared.sockets;
        let make = || format!("cannot make {}", sockets.display());
        DirBuilder::new()
            .mode(0o700)
            .create(sockets)
            .with_context(make)?;
        let pod = &self.shared.pod;
        let files = sockets.join(container::FILES_TAG);
        for (mount, number) in pod.mounts.iter().zip(0_usize..) {
            let MountPlan::File { source, .. } = mount else {
                continue;
            };
            std::fs::create_dir_all(&files).with_context(make)?;
            let to = files.join(container::file_name(number));
            std::fs::copy(source, to)
                .with_context(|| format!("cannot read {}", source.display()))?;
        }
        let mut ready = sockets.join(VSOCK).into_os_string();
        ready.push(format!("_{READY_PORT}"));
        let ready = UnixListener::bind(ready).with_context(make)?;
        open_door(&self.shared)?;
        Ok(ready)
    }

    fn start_vmm(&mut self) -> anyhow::Result<()> {
        let shared = &self.shared;
        let program = &shared.pod.machine.vmm;
        let wire = self.network.as_ref().map(|network| &network.wire);
        let args = machine::arguments(&shared.pod, &shared.sockets, &shared.folder, wire);
        let vmm = Vmm::start(shared, Command::new(program).args(args));
        let vmm = vmm.with_context(|| format!("cannot start {}", program.display()))?;
        if let Some(network) = &mut self.network {
            network.handed_over();
        }
        self.state.vmm = Some(vmm.pid());
        self.vmm = Some(vmm);
        Ok(())
    }

    /// The agent calls as soon as it listens.
    fn await_agent(&self, ready: &UnixListener) -> anyhow::Result<()> {
        let limit = self.shared.pod.start_timeout_s;
        let deadline = Instant::now() + Duration::from_secs(limit);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "the guest did not come up within {limit} s{}",
                    self.console_hint()
                );
            }
            // Short, for the VMM may die; that is told by another thread.
            let slice = left.min(Duration::from_millis(50));
            let slice = Timespec {
                tv_sec: 0,
                tv_nsec: i64::from(slice.subsec_nanos()),
            };
            let mut fds = [PollFd::from_borrowed_fd(ready.as_fd(), PollFlags::IN)];
            match poll(&mut fds, Some(&slice)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(e) => return Err(io::Error::from(e).into()),
            }
            match self.happenings.try_recv() {
                Ok(Happening::VmmEnded) => bail!("the VMM ended before the guest came up"),
                Ok(Happening::Stop { why, .. }) => {
                    bail!("{}", why.unwrap_or_else(|| "it was stopped".into()))
                }
                _ => {}
            }
        }
    }

    fn console_hint(&self) -> String {
        format!(
            "; what its console said is in {}",
            self.shared.folder.join("console.log").display()
        )
    }

    fn make_sandbox(&self, client: &mut Client<UnixStream>) -> anyhow::Result<()> {
        let pod = &self.shared.pod;
        client.call(&CreateSandboxRequest {
            id: pod.id.clone(),
            hostname: pod.hostname.clone(),
            dns: network::dns(pod),
            ..CreateSandboxRequest::default()
        })?;
        if let Some((interface, routes)) = network::requests(pod) {
            client.call(&interface)?;
            client.call(&routes)?;
        }
        Ok(())
    }

    fn make_container(&self, client: &mut Client<UnixStream>) -> anyhow::Result<()> {
        let pod = &self.shared.pod;
        let mut request = container::request(pod)?;
        let terminal = pod.process.terminal;
        let stdin = if pod.process.stdin { STDIN } else { 0 };
        request.stdio = Some(if terminal {
            // One connection, both ways.
            Stdio {
                stdin,
                stdout: STDIN,
                stderr: 0,
            }
        } else {
            Stdio {
                stdin,
                stdout: STDOUT,
                stderr: STDERR,
            }
        });
        client.call(&request)?;
        let guest = &self.shared.guest;
        let outputs = &self.shared.outputs;
        if terminal {
            let stream = guest.stream(STDIN)?;
            if pod.process.stdin {
                take_input(&self.shared, stream.try_clone()?)?;
            }
            outputs::start(&self.shared, Stream::Out, stream)?;
            outputs.none_of(Stream::Err);
            return Ok(());
        }
        outputs::start(&self.shared, Stream::Out, guest.stream(STDOUT)?)?;
        outputs::start(&self.shared, Stream::Err, guest.stream(STDERR)?)?;
        if pod.process.stdin {
            take_input(&self.shared, guest.stream(STDIN)?)?;
        }
        Ok(())
    }

    fn await_end(&self, mut client: Client<UnixStream>) -> anyhow::Result<()> {
        self.shared.thread("wait", move |shared| {
            let happening = match client.call(&WaitProcessRequest { id: Some(first()) }) {
                Ok(response) => Happening::Exited(response.exit.unwrap_or_default()),
                Err(e) => {
                    eprintln!("testudo supervise: {e}");
                    Happening::AgentLost
                }
            };
            shared.happened(happening);
        })?;
        Ok(())
    }
}

/// What a shell would give for a container that did not start.
pub(super) fn exit_code(failure: &anyhow::Error) -> u8 {
    let refused = failure
        .chain()
        .find_map(|cause| cause.downcast_ref::<CallError>());
    let by_guest = failure
        .chain()
        .find_map(|cause| match cause.downcast_ref::<GuestError>() {
            Some(GuestError::Call(call)) => Some(call),
            _ => None,
        });
    match refused.or(by_guest) {
        Some(CallError::Refused {
            method: "StartContainer",
            code: code::NOT_FOUND,
            ..
        }) => 127,
        Some(CallError::Refused {
            method: "StartContainer",
            code: code::INVALID,
            ..
        }) => 126,
        _ => 125,
    }
}

/// One line for a person.
pub(super) fn explain(failure: &anyhow::Error) -> String {
    let refused = failure
        .chain()
        .find_map(|cause| cause.downcast_ref::<CallError>());
    match refused {
        // The method's name says nothing to whoever wrote a command.
        Some(CallError::Refused {
            method: "StartContainer",
            message,
            ..
        }) => message.clone(),
        _ => format!("{failure:#}"),
    }
}
