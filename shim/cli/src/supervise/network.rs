//! The user-mode network stack: a helper process that dies with the supervisor.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail};
use testudo_agent_protocol::{Dns, Interface, Route, UpdateInterfaceRequest, UpdateRoutesRequest};

use super::Shared;
use crate::machine::{MAC, Wire};
use crate::pod::Pod;
use crate::values::{NetWord, Publish, Transport};

/// Addresses of the guest's own network; the stack translates them.
const ADDRESS: &str = "10.0.2.15";
const PREFIX: &str = "24";
const GATEWAY: &str = "10.0.2.2";
/// Where the stack forwards questions for names from.
const NAME_SERVER: &str = "10.0.2.3";

/// The stack at work.
pub(crate) struct Network {
    helper: Option<Child>,
    /// The VMM's end, until the VMM has it.
    ours: Option<OwnedFd>,
    pub(crate) wire: Wire,
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Some(helper) = &mut self.helper {
            let _ = helper.kill();
            let _ = helper.wait();
        }
    }
}

/// Starts what the pod's network needs.
pub(crate) fn start(shared: &Shared) -> anyhow::Result<Option<Network>> {
    let tap = |name: &String| Network {
        helper: None,
        ours: None,
        wire: Wire::Tap(name.clone()),
    };
    match &shared.pod.net.kind {
        NetWord::None => Ok(None),
        NetWord::Tap(name) => Ok(Some(tap(name))),
        NetWord::User => start_passt(shared).map(Some),
    }
}

/// It gets one end of a pair of sockets, so that there is no path to wait for or to remove, and ends by itself
/// when the VMM's end is closed.
fn start_passt(shared: &Shared) -> anyhow::Result<Network> {
    let program = &shared.pod.net.passt;
    let (ours, theirs) = UnixStream::pair()?;
    // Duplicates stay open in the programs that are started.
    let (ours, theirs) = (rustix::io::dup(&ours)?, rustix::io::dup(&theirs)?);
    rustix::io::fcntl_setfd(&ours, rustix::io::FdFlags::CLOEXEC)?;
    let log = File::create(shared.folder.join("net.log"))?;
    let mut command = Command::new(program);
    command.args([
        "--foreground",
        "--quiet",
        "--ipv4-only",
        "--mtu",
        "0",
        "--no-map-gw",
        "--no-dhcp",
    ]);
    command.args(["--fd", &theirs.as_raw_fd().to_string()]);
    command.args([
        "--address",
        ADDRESS,
        "--netmask",
        PREFIX,
        "--gateway",
        GATEWAY,
    ]);
    command.args(["--dns-forward", NAME_SERVER]);
    for (flag, transport) in [
        ("--tcp-ports", Transport::Tcp),
        ("--udp-ports", Transport::Udp),
    ] {
        let ports = || {
            shared
                .pod
                .net
                .publish
                .iter()
                .filter(|port| port.transport == transport)
        };
        if ports().next().is_none() {
            command.args([flag, "none"]);
        }
        for port in ports() {
            command.arg(flag).arg(forward(port));
        }
    }
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .current_dir("/");
    let helper = crate::os::spawn_mortal(&mut command)
        .with_context(|| format!("cannot start {}", program.display()))?;
    rustix::io::fcntl_setfd(&ours, rustix::io::FdFlags::empty())?;
    let wire = Wire::Stream(ours.as_raw_fd());
    Ok(Network {
        helper: Some(helper),
        ours: Some(ours),
        wire,
    })
}

/// `127.0.0.1/8080:80`
fn forward(port: &Publish) -> String {
    let address = port
        .address
        .map_or_else(String::new, |address| format!("{address}/"));
    format!("{address}{}:{}", port.host, port.guest)
}

impl Network {
    /// The VMM has its end.
    pub(crate) fn handed_over(&mut self) {
        self.ours = None;
    }

    /// The stack is still there; it ends at once where it cannot work.
    pub(crate) fn check(&mut self, shared: &Shared) -> anyhow::Result<()> {
        let ended = self
            .helper
            .as_mut()
            .map(Child::try_wait)
            .transpose()?
            .flatten();
        let Some(status) = ended else { return Ok(()) };
        let said = std::fs::read_to_string(shared.folder.join("net.log")).unwrap_or_default();
        let said = said
            .trim()
            .lines()
            .last()
            .unwrap_or("it said nothing")
            .to_owned();
        let program = shared.pod.net.passt.display();
        bail!(
            "the network did not come up: {program} ended ({status}): {said}; --net none does without"
        );
    }
}

/// What the guest's network shall be; nothing without one, or where somebody else sees to it.
pub(crate) fn requests(pod: &Pod) -> Option<(UpdateInterfaceRequest, UpdateRoutesRequest)> {
    if pod.net.kind != NetWord::User {
        return None;
    }
    let interface = Interface {
        mac: MAC.into(),
        name: "eth0".into(),
        addresses: vec![format!("{ADDRESS}/{PREFIX}")],
        ..Interface::default()
    };
    let route = Route {
        destination: "0.0.0.0/0".into(),
        gateway: GATEWAY.into(),
        device: "eth0".into(),
        ..Route::default()
    };
    Some((
        UpdateInterfaceRequest {
            interface: Some(interface),
            deadline_ms: 0,
        },
        UpdateRoutesRequest {
            routes: vec![route],
        },
    ))
}

/// The guest's name servers.
pub(crate) fn dns(pod: &Pod) -> Option<Dns> {
    let given = || pod.net.dns.clone();
    match pod.net.kind {
        NetWord::None => None,
        NetWord::Tap(_) => Some(Dns {
            servers: given(),
            ..Dns::default()
        }),
        NetWord::User if pod.net.dns.is_empty() => Some(Dns {
            servers: vec![NAME_SERVER.into()],
            searches: host_searches(),
            ..Dns::default()
        }),
        NetWord::User => Some(Dns {
            servers: given(),
            searches: host_searches(),
            ..Dns::default()
        }),
    }
}

/// resolv.conf(5) of the host.
fn host_searches() -> Vec<String> {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let lines = text.lines().filter_map(|line| line.strip_prefix("search "));
    let words = lines.flat_map(str::split_ascii_whitespace);
    words
        .filter(|word| word.parse::<IpAddr>().is_err() && *word != ".")
        .map(str::to_owned)
        .collect()
}
