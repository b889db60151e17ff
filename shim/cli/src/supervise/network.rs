//! The user-mode network stack: a helper process that dies with the supervisor.

use std::net::IpAddr;
use std::process::{Child, Command, Stdio};

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
    match &shared.pod.net.kind {
        NetWord::None => Ok(None),
        NetWord::Tap(name) => Ok(Some(Network {
            helper: None,
            wire: Wire::Tap(name.clone()),
        })),
        NetWord::User => start_passt(shared).map(Some),
    }
}

fn start_passt(shared: &Shared) -> anyhow::Result<Network> {
    use anyhow::Context;
    let socket = shared.sockets.join("net");
    let program = &shared.pod.net.passt;
    let log = std::fs::File::create(shared.folder.join("net.log"))?;
    let mut command = Command::new(program);
    // In the foreground, one guest, no more words than needed.
    command
        .args(["--foreground", "--one-off", "--quiet", "--socket"])
        .arg(&socket);
    command.args([
        "--address",
        ADDRESS,
        "--netmask",
        PREFIX,
        "--gateway",
        GATEWAY,
        "--mac-addr",
        "02:74:73:74:64:02",
    ]);
    command.args([
        "--dns-forward",
        NAME_SERVER,
        "--no-dhcp",
        "--no-dhcpv6",
        "--no-ra",
        "--no-ndp",
        "--no-map-gw",
    ]);
    command.args(["--ipv4-only"]);
    for (flag, transport) in [
        ("--tcp-ports", Transport::Tcp),
        ("--udp-ports", Transport::Udp),
    ] {
        let ports: Vec<&Publish> = shared
            .pod
            .net
            .publish
            .iter()
            .filter(|p| p.transport == transport)
            .collect();
        if ports.is_empty() {
            command.args([flag, "none"]);
        }
        for port in ports {
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
    let mut network = Network {
        helper: Some(helper),
        wire: Wire::Stream(socket),
    };
    network.await_socket(shared)?;
    Ok(network)
}

/// `127.0.0.1/8080:80`
fn forward(port: &Publish) -> String {
    let address = port
        .address
        .map_or_else(String::new, |address| format!("{address}/"));
    format!("{address}{}:{}", port.host, port.guest)
}

impl Network {
    /// The helper listens soon, or has said why not.
    fn await_socket(&mut self, shared: &Shared) -> anyhow::Result<()> {
        let Wire::Stream(socket) = &self.wire else {
            return Ok(());
        };
        let deadline =
            std::time::Instant::now() + std::time::Duration::from_secs(shared.pod.start_timeout_s);
        loop {
            if socket.exists() {
                return Ok(());
            }
            let ended = self
                .helper
                .as_mut()
                .map(Child::try_wait)
                .transpose()?
                .flatten();
            if ended.is_some() || std::time::Instant::now() > deadline {
                let said =
                    std::fs::read_to_string(shared.folder.join("net.log")).unwrap_or_default();
                let said = said
                    .trim()
                    .lines()
                    .last()
                    .unwrap_or("it said nothing")
                    .to_owned();
                anyhow::bail!(
                    "the network did not come up: {}: {said}",
                    shared.pod.net.passt.display()
                );
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
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
