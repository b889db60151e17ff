//! A small guest, to see whether KVM does what it promises: some hosts let `/dev/kvm` be opened and do not get a
//! kernel through its start.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use testudo_agent_protocol::READY_PORT;

use super::Finding;
use crate::config::Config;
use crate::places::{INITRAMFS, KERNEL, VMM};

/// A machine with usable KVM needs a tenth of a second.
const LIMIT: Duration = Duration::from_secs(20);

pub(super) fn guest(config: &Config) -> Finding {
    let begun = Instant::now();
    match run(config, begun) {
        Ok(()) => Finding::good(
            "guest",
            &format!("one came up in {} ms", begun.elapsed().as_millis()),
        ),
        Err(why) => Finding::bad(
            "guest",
            &why,
            "KVM cannot run an ordinary kernel here; in a virtual machine this is its host's nested virtualisation. \
             `cargo xtask lab` in a checkout emulates a host that can",
        ),
    }
}

/// Dies with this value.
struct Trial(Child);

impl Drop for Trial {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(config: &Config, begun: Instant) -> Result<(), String> {
    let part = |found: Result<std::path::PathBuf, crate::places::Missing>| {
        found.map_err(|e| e.to_string())
    };
    let vmm = part(VMM.find(config.vmm_program.as_deref()))?;
    let kernel = part(KERNEL.find(config.guest_kernel.as_deref()))?;
    let initramfs = part(INITRAMFS.find(config.guest_initramfs.as_deref()))?;
    let folder = Folder::make()?;
    let socket = folder.0.join("v");
    let ready =
        UnixListener::bind(folder.0.join(format!("v_{READY_PORT}"))).map_err(|e| e.to_string())?;
    let mut vsock = std::ffi::OsString::from("cid=3,socket=");
    vsock.push(&socket);
    let mut command = Command::new(&vmm);
    command
        .args(["run", "--memory", "128M", "--console", "off", "--kernel"])
        .arg(&kernel);
    command
        .arg("--initrd")
        .arg(&initramfs)
        .arg("--vsock")
        .arg(vsock);
    command.args([
        "--cmdline",
        &format!("quiet panic=-1 agent.ready=vsock:{READY_PORT}"),
    ]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let child =
        crate::os::spawn_mortal(&mut command).map_err(|e| format!("{}: {e}", vmm.display()))?;
    let mut trial = Trial(child);
    while begun.elapsed() < LIMIT {
        let slice = Timespec {
            tv_sec: 0,
            tv_nsec: 20_000_000,
        };
        let mut fds = [PollFd::new(&ready, PollFlags::IN)];
        if poll(&mut fds, Some(&slice)).is_ok_and(|ready| ready > 0) {
            return Ok(());
        }
        if let Ok(Some(status)) = trial.0.try_wait() {
            let mut said = String::new();
            if let Some(mut stderr) = trial.0.stderr.take() {
                let _ = std::io::Read::read_to_string(&mut stderr, &mut said);
            }
            let said = said.lines().last().unwrap_or("it said nothing").to_owned();
            return Err(format!("it ended before it came up ({status}): {said}"));
        }
    }
    Err(format!("it did not come up within {} s", LIMIT.as_secs()))
}

/// A folder with a short name, for sockets.
struct Folder(std::path::PathBuf);

impl Folder {
    fn make() -> Result<Self, String> {
        let id = crate::state::new_id().map_err(|e| e.to_string())?;
        let path = Path::new("/tmp").join(format!("testudo-check-{id}"));
        std::fs::create_dir(&path).map_err(|e| format!("cannot make {}: {e}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
