//! The host's side of network tests: taps, programs of the userland run in the lab itself, transfers
//! of which every byte is compared.
#![expect(unsafe_code, reason = "TUNSETIFF, which no safe wrapper offers")]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::context::Ctx;
use crate::ensure;
use crate::outcome::{Outcome, Verdict};

/// For a guest's program to listen.
const PATIENCE: Duration = Duration::from_secs(30);

/// A tap with an address of its own, gone with the test.
pub(super) struct Tap {
    pub(super) name: String,
    subnet: u8,
}

impl Tap {
    /// Tap `tN` in subnet 10.7.N.0/24, whose .1 is this host's.
    pub(super) fn new(subnet: u8, options: &[&str]) -> Verdict<Tap> {
        let name = format!("t{subnet}");
        let add = ["tuntap", "add", "dev", &name, "mode", "tap"];
        ip(&[&add, options].concat())?;
        let tap = Tap { name, subnet };
        tap.address()?;
        Ok(tap)
    }

    /// The same for a tap that somebody else makes.
    pub(super) fn made_elsewhere(subnet: u8) -> Tap {
        Tap {
            name: format!("t{subnet}"),
            subnet,
        }
    }

    /// Gives it its address and brings it up.
    pub(super) fn address(&self) -> Verdict {
        let own = format!("{}/24", self.host());
        ip(&["address", "add", &own, "dev", &self.name])?;
        ip(&["link", "set", &self.name, "up"])
    }

    pub(super) fn set_mtu(&self, mtu: &str) -> Verdict {
        ip(&["link", "set", &self.name, "mtu", mtu])
    }

    /// This host's address.
    pub(super) fn host(&self) -> IpAddr {
        IpAddr::from([10, 7, self.subnet, 1])
    }

    /// The guest's.
    pub(super) fn guest(&self) -> IpAddr {
        IpAddr::from([10, 7, self.subnet, 2])
    }

    /// What a guest does first.
    pub(super) fn script(&self, then: &str) -> String {
        format!(
            "ip address add {}/24 dev eth0\nip link set eth0 up\n{then}",
            self.guest()
        )
    }

    /// A counter of the interface.
    pub(super) fn statistic(&self, name: &str) -> Verdict<u64> {
        let path = format!("/sys/class/net/{}/statistics/{name}", self.name);
        Ok(std::fs::read_to_string(path)?.trim().parse()?)
    }

    /// Connects to a port of the guest's, which may not be there yet.
    pub(super) fn connect(&self, port: u16) -> Verdict<TcpStream> {
        let begun = Instant::now();
        let to = SocketAddr::new(self.guest(), port);
        loop {
            match TcpStream::connect_timeout(&to, Duration::from_secs(5)) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
                    stream.set_write_timeout(Some(Duration::from_secs(60)))?;
                    return Ok(stream);
                }
                Err(e) if begun.elapsed() > PATIENCE => {
                    return Err(Outcome::Failed(format!("cannot connect to {to}: {e}")));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }
}

/// A queue of a tap, opened here for the VMM to inherit.
pub(super) fn open_queue(name: &str, flags: u16) -> Verdict<File> {
    /// `_IOW('T', 202, int)`.
    const TUNSETIFF: rustix::ioctl::Opcode = 0x4004_54ca;
    let tun = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // `struct ifreq`: the name, then the flags.
    let mut request = [0_u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: TUNSETIFF reads and fills a `struct ifreq`, which is 40 bytes.
    let set = unsafe { rustix::ioctl::Updater::<TUNSETIFF, [u8; 40]>::new(&mut request) };
    // SAFETY: as above; `set` lives as long as the call.
    unsafe { rustix::ioctl::ioctl(&tun, set)? };
    Ok(tun)
}

impl Drop for Tap {
    fn drop(&mut self) {
        // A test that failed has more to say than this would.
        let _ = ip(&["link", "del", &self.name]);
    }
}

pub(super) fn ip(arguments: &[&str]) -> Verdict {
    let done = Command::new("ip").args(arguments).output()?;
    ensure!(
        done.status.success(),
        "ip {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&done.stderr).trim()
    );
    Ok(())
}

/// A program of the userland, for the lab itself, with the libraries it came with.
pub(super) fn tool(ctx: &Ctx, arguments: &[&str]) -> Command {
    let usr = ctx.images.userland_folder.join("usr");
    let libraries = usr.join("lib/x86_64-linux-gnu");
    let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
    command.arg("--library-path").arg(libraries);
    if let Some((program, rest)) = arguments.split_first() {
        command.arg(usr.join("bin").join(program)).args(rest);
    }
    command.stdin(Stdio::null());
    command
}

/// Runs it; what it printed, if it succeeded.
pub(super) fn run_tool(ctx: &Ctx, arguments: &[&str]) -> Verdict<String> {
    said(arguments, &tool(ctx, arguments).output()?)
}

pub(super) fn said(arguments: &[&str], output: &Output) -> Verdict<String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "{} ended with {}: {} {}",
        arguments.join(" "),
        output.status,
        text.trim(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(text)
}

/// Megabits a second that iperf3 moves from this host to the guest, or the other way; the guest
/// listens.
pub(super) fn iperf(ctx: &Ctx, tap: &Tap, seconds: u32, more: &[&str]) -> Verdict<f64> {
    let (to, seconds) = (tap.guest().to_string(), seconds.to_string());
    let common = [
        "iperf3",
        "-c",
        &to,
        "-J",
        "--connect-timeout",
        "10000",
        "-t",
        &seconds,
    ];
    rate(&run_tool(ctx, &[&common, more].concat())?)
}

fn rate(report: &str) -> Verdict<f64> {
    let report: serde_json::Value = serde_json::from_str(report)?;
    let rate = report.pointer("/end/sum_received/bits_per_second");
    rate.and_then(serde_json::Value::as_f64)
        .map(|rate| rate / 1e6)
        .ok_or_else(|| Outcome::Failed(format!("iperf3 tells no rate: {report}")))
}

/// Bytes that repeat at no power of two.
pub(super) fn pattern(from: u64, piece: &mut [u8]) {
    for (at, byte) in (from..).zip(piece) {
        let mixed = at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 29;
        *byte = mixed.to_le_bytes()[0] ^ at.to_le_bytes()[2];
    }
}

/// Sends `total` bytes of the pattern and then reads them back, which a guest's `tee`-like echo
/// returns; `between` is called now and then.
pub(super) fn echo(stream: &TcpStream, total: u64, between: impl FnMut(u64) -> Verdict) -> Verdict {
    there_and_back(stream, total, true, between)
}

/// The same without closing this side's half before all has come back.
pub(super) fn echo_unclosed(
    stream: &TcpStream,
    total: u64,
    between: impl FnMut(u64) -> Verdict,
) -> Verdict {
    there_and_back(stream, total, false, between)
}

fn there_and_back(
    stream: &TcpStream,
    total: u64,
    closes: bool,
    mut between: impl FnMut(u64) -> Verdict,
) -> Verdict {
    const PIECE: usize = 64 << 10;
    let mut sender = stream.try_clone()?;
    let writing = std::thread::spawn(move || -> std::io::Result<()> {
        let mut piece = vec![0; PIECE];
        let mut sent = 0;
        while sent < total {
            pattern(sent, &mut piece);
            let now = piece
                .len()
                .min(usize::try_from(total - sent).unwrap_or(PIECE));
            sender.write_all(&piece[..now])?;
            sent += now as u64;
        }
        if closes {
            sender.shutdown(std::net::Shutdown::Write)?;
        }
        Ok(())
    });
    let mut receiver = stream.try_clone()?;
    let (mut got, mut expected) = (vec![0; PIECE], vec![0; PIECE]);
    let mut received = 0;
    while closes || received < total {
        let now = receiver.read(&mut got)?;
        if now == 0 {
            break;
        }
        pattern(received, &mut expected[..now]);
        ensure!(
            got[..now] == expected[..now],
            "bytes {received} to {} are not what was sent",
            received + now as u64
        );
        received += now as u64;
        between(received)?;
    }
    ensure!(received == total, "{received} bytes came back of {total}");
    match writing.join() {
        Ok(sent) => Ok(sent?),
        Err(_) => Err(Outcome::Failed("the sender panicked".into())),
    }
}
