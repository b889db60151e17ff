//! Networks without privileges: Debian's passt at the other end of a stream.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::host::{Tap, echo_unclosed, ip};
use super::{ECHO, WAIT, counter, counters, finish};
use crate::context::{Ctx, SharedChild, lock};
use crate::ensure;
use crate::launch::USER;
use crate::outcome::{Outcome, Verdict};
use crate::tests::SOON;

const PASST: &str = "/usr/bin/passt";
/// A port of this host's that is the guest's port 7.
const PUBLISHED: u16 = 10_720;
/// Each way.
const AMOUNT: u64 = 8 << 20;

/// passt looks for the interface of a default route, of which it takes the guest's addresses.
fn uplink(subnet: u8) -> Verdict<Tap> {
    let tap = Tap::new(subnet, &[])?;
    ip(&["route", "replace", "default", "dev", &tap.name])?;
    Ok(tap)
}

/// passt as the ordinary user. The guest is 10.7.N.2, and finds this host's loopback at 10.7.N.9.
fn passt(uplink: &Tap) -> Command {
    let mut command = Command::new(PASST);
    command.args(["--foreground", "--quiet", "--ipv4-only", "--mtu", "0"]);
    command.args(["--interface", &uplink.name, "--netmask", "24"]);
    command.args(["--address", &uplink.guest().to_string()]);
    command.args(["--gateway", &gateway(uplink)]);
    command.args(["--tcp-ports", &format!("{PUBLISHED}:7")]);
    command.uid(USER).gid(USER);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    // It says much, and complains that there is no syslog.
    command.stderr(Stdio::null());
    command
}

fn gateway(uplink: &Tap) -> String {
    match uplink.guest() {
        std::net::IpAddr::V4(address) => {
            let [a, b, c, _] = address.octets();
            Ipv4Addr::new(a, b, c, 9).to_string()
        }
        std::net::IpAddr::V6(address) => address.to_string(),
    }
}

fn script(uplink: &Tap, then: &str) -> String {
    let gateway = gateway(uplink);
    // passt knows the guest from its first frame on; what it sends before goes to everybody, which TCP does not
    // take for its own.
    uplink.script(&format!(
        "ip route add default via {gateway}\nping -c 1 -W 5 {gateway} > /dev/null || true\n{ECHO}\
         until ss -Hltn | grep -q ':7 '; do sleep 0.05; done\n{then}"
    ))
}

fn published() -> Verdict<TcpStream> {
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, PUBLISHED));
    let stream = TcpStream::connect_timeout(&to, Duration::from_secs(10))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.set_write_timeout(Some(Duration::from_secs(60)))?;
    Ok(stream)
}

/// A port of this host's loopback that takes a stream to its end, and then gives the same to the next
/// connection. One at a time: Debian 12's passt gets slow once one half of a connection is closed.
fn tcp_store() -> Verdict<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || -> std::io::Result<()> {
        let mut bytes = Vec::new();
        listener.accept()?.0.read_to_end(&mut bytes)?;
        listener.accept()?.0.write_all(&bytes)
    });
    Ok(port)
}

fn udp_echo() -> Verdict<u16> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = socket.local_addr()?.port();
    std::thread::spawn(move || -> std::io::Result<()> {
        let mut bytes = [0; 2048];
        loop {
            let (count, from) = socket.recv_from(&mut bytes)?;
            socket.send_to(bytes.get(..count).unwrap_or_default(), from)?;
        }
    });
    Ok(port)
}

/// passt and the VMM are both an ordinary user's; nothing of this host was set up for them.
pub(super) fn user(ctx: &Ctx) -> Verdict {
    let uplink = uplink(20)?;
    let socket = ctx.home()?.join("passt.sock");
    let daemon = ctx.spawn(passt(&uplink).arg("--socket").arg(&socket))?;
    await_socket(&daemon, &socket)?;
    let (tcp, udp, gateway) = (tcp_store()?, udp_echo()?, gateway(&uplink));
    let then = format!(
        "fact mtu $(cat /sys/class/net/eth0/mtu)\n\
         head -c {AMOUNT} /dev/urandom > /tmp/out\n\
         socat -b 65536 -u - TCP:{gateway}:{tcp} < /tmp/out\n\
         socat -b 65536 -u TCP:{gateway}:{tcp} - > /tmp/in\n\
         cmp /tmp/out /tmp/in\n\
         fact sent $(stat -c %s /tmp/in)\n\
         fact udp $(echo datagram | socat -t 5 - UDP:{gateway}:{udp})\n{WAIT}"
    );
    let net = format!("stream={},mtu=9000", socket.display());
    let launch = ctx.script(&script(&uplink, &then)).as_user()?;
    let vm = launch
        .args(["--net", &net])
        .control_at(&ctx.home()?.join("control"))
        .spawn()?;
    vm.wait_for("READY", SOON)?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid()))?;
    for line in ["Uid:\t1000\t1000\t1000\t1000", "CapEff:\t0000000000000000"] {
        ensure!(status.contains(line), "{status}");
    }
    let begun = Instant::now();
    let (mut pauses, quarter) = (0, AMOUNT / 4);
    echo_unclosed(&published()?, AMOUNT, |received| {
        if received >= quarter * (pauses + 1) && pauses < 3 {
            pauses += 1;
            vm.ctl_ok(&["pause"])?;
            vm.ctl_ok(&["resume"])?;
        }
        Ok(())
    })?;
    println!(
        "     {AMOUNT} bytes to a published port and back in {:?}",
        begun.elapsed()
    );
    let counters = counters(&vm)?;
    ensure!(counter(&counters, "peers_lost") == 0, "{counters}");
    ensure!(
        counter(&counters, "queue0.bytes_out") > 2 * AMOUNT,
        "{counters}"
    );
    ensure!(
        counter(&counters, "queue1.bytes_in") > 2 * AMOUNT,
        "{counters}"
    );
    let facts = finish(vm)?;
    ensure!(facts.get("sent")? == AMOUNT.to_string(), "{facts:?}");
    ensure!(facts.get("udp")? == "datagram", "{facts:?}");
    ensure!(facts.get("mtu")? == "9000", "{facts:?}");
    Ok(())
}

fn await_socket(daemon: &SharedChild, socket: &std::path::Path) -> Verdict {
    // A connection to try it would be the one that passt serves.
    let listens = || -> Verdict<bool> {
        let sockets = std::fs::read_to_string("/proc/net/unix")?;
        let path = socket.display().to_string();
        let accepts = |line: &str| line.ends_with(&path) && line.contains(" 00010000 ");
        Ok(sockets.lines().any(accepts))
    };
    let begun = Instant::now();
    while !listens()? {
        ensure!(
            lock(daemon).try_wait()?.is_none() && begun.elapsed() < SOON,
            "passt did not open its socket"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Both ends are handed over. passt is killed: the guest's link goes down, the VMM says so once, and
/// the guest goes on.
pub(super) fn end(ctx: &Ctx) -> Verdict {
    let uplink = uplink(21)?;
    let (here, there) = UnixStream::pair()?;
    let inherited = rustix::io::dup(&there)?;
    let mut command = passt(&uplink);
    command.arg("--fd").arg(inherited.as_raw_fd().to_string());
    let daemon = ctx.spawn(&mut command)?;
    drop((there, inherited));
    let carrier = "cat /sys/class/net/eth0/carrier";
    let then = format!(
        "echo READY\nuntil [ \"$({carrier})\" = 0 ]; do sleep 0.05; done\necho DOWN\n\
         ping -c 1 -W 1 {} || true\nread -r _\n",
        gateway(&uplink)
    );
    let mut launch = ctx.script(&script(&uplink, &then)).control();
    let fd = launch.pass(&OwnedFd::from(here).into())?;
    let vm = launch
        .args(["--net", &format!("stream={fd},id=up")])
        .spawn()?;
    vm.wait_for("READY", SOON)?;
    echo_unclosed(&published()?, 1 << 20, |_| Ok(()))?;
    lock(&daemon).kill()?;
    lock(&daemon).wait()?;
    vm.wait_for("DOWN", SOON)?;
    let counters = counters(&vm)?;
    let lost = counters.get("up").and_then(|up| up.get("peers_lost"));
    ensure!(
        lost.and_then(serde_json::Value::as_u64) == Some(1),
        "{counters}"
    );
    let refused = vm.ctl(&["link", "up", "up"])?;
    refused.expect_one_line_error(&["up", "the other end of its stream has gone"])?;
    let mut vm = vm;
    vm.send(b"\n")?;
    let done = vm.finish(SOON)?;
    done.expect_code(0)?;
    let said = done
        .stderr
        .matches("the other end of its stream has gone")
        .count();
    ensure!(said == 1, "it says: {}", done.stderr);
    done.facts()
        .map(drop)
        .map_err(|_| Outcome::Failed("the guest did not go on".into()))
}
