//! The host's side of the workloads: a tap, listeners that serve streams, and the disk and the folder
//! that guests are given.

use std::fs;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};

use crate::kit::stage;
use crate::work::files::{self, Work};
use crate::work::stream;
use crate::work::vsock;

pub(crate) const TAP: &str = "perf0";
pub(crate) const HOST_ADDRESS: &str = "10.77.0.1";
pub(crate) const GUEST_ADDRESS: &str = "10.77.0.2";
pub(crate) const PORT: u32 = 5001;
/// More than all caches of a guest hold.
const DISK_MIB: usize = 256;

/// Paths of what there is.
pub(crate) struct Host {
    /// A disk image with data in it.
    pub(crate) disk: PathBuf,
    /// A folder to share.
    pub(crate) share: PathBuf,
    /// The hybrid vsock socket.
    pub(crate) vsock: PathBuf,
}

/// Makes it all, once. Listeners serve until the process ends.
pub(crate) fn prepare() -> Result<Host> {
    let host = Host {
        disk: stage("disk"),
        share: stage("share"),
        vsock: stage("vsock"),
    };
    fs::write(&host.disk, pattern(DISK_MIB << 20)).context("cannot make the disk")?;
    tap()?;
    let tcp =
        TcpListener::bind((HOST_ADDRESS, u16::try_from(PORT)?)).context("cannot listen for TCP")?;
    thread::spawn(move || {
        for stream in tcp.incoming().flatten() {
            let _ = stream.set_nodelay(true);
            serve(stream);
        }
    });
    // Where a testudo-vmm forwards the guest's connections to.
    let path = format!("{}_{PORT}", host.vsock.display());
    let hybrid = UnixListener::bind(&path).with_context(|| format!("cannot listen on {path}"))?;
    thread::spawn(move || hybrid.incoming().flatten().for_each(serve));
    match vsock::listen(PORT) {
        Ok(listener) => drop(thread::spawn(move || {
            while let Ok(stream) = vsock::accept(&listener) {
                serve(stream);
            }
        })),
        // Only QEMU's case needs it.
        Err(error) => println!("perf-devices: cannot listen on vsock: {error}"),
    }
    Ok(host)
}

impl Host {
    /// Empties the shared folder and does this in it.
    pub(crate) fn fill_share(&self, with: Option<(Work, u64)>) -> Result<()> {
        let again = || -> std::io::Result<()> {
            if self.share.exists() {
                fs::remove_dir_all(&self.share)?;
            }
            fs::create_dir(&self.share)?;
            if let Some((work, amount)) = with {
                files::run(&self.share, work, amount)?;
            }
            Ok(())
        };
        again().context("cannot fill the shared folder")
    }
}

fn serve(mut stream: impl std::io::Read + std::io::Write + Send + 'static) {
    thread::spawn(move || {
        if let Err(error) = stream::serve(&mut stream) {
            println!("perf-devices: a stream failed: {error}");
        }
    });
}

fn tap() -> Result<()> {
    ip(&["tuntap", "add", TAP, "mode", "tap", "vnet_hdr"])?;
    ip(&["address", "add", &format!("{HOST_ADDRESS}/24"), "dev", TAP])?;
    ip(&["link", "set", TAP, "up"])
}

fn ip(words: &[&str]) -> Result<()> {
    let done = Command::new("ip").args(words).output();
    let done = done.context("cannot start ip (iproute2)")?;
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    ensure!(
        done.status.success(),
        "ip {}: {}",
        words.join(" "),
        said.trim()
    );
    Ok(())
}

fn pattern(length: usize) -> Vec<u8> {
    (0..=250).cycle().take(length).collect()
}
