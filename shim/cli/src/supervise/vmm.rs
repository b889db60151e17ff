//! The VMM as a child: started, watched, killed.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::{Happening, Shared, lock};

/// Ends the VMM from any thread.
#[derive(Default)]
pub(crate) struct Killer(Mutex<Aim>);

#[derive(Default)]
struct Aim {
    vmm: Option<OwnedFd>,
    /// It shall not live, even if it does not yet.
    doomed: bool,
}

impl Killer {
    /// Kills it, now or as soon as it is there.
    pub(crate) fn kill(&self) {
        let mut aim = lock(&self.0);
        aim.doomed = true;
        if let Some(vmm) = &aim.vmm {
            // If it has ended already there is nothing to kill.
            let _ = pidfd_send_signal(vmm, Signal::KILL);
        }
    }

    /// Whether it was ordered to die.
    pub(crate) fn fired(&self) -> bool {
        lock(&self.0).doomed
    }

    fn aim_at(&self, vmm: OwnedFd) {
        let mut aim = lock(&self.0);
        if aim.doomed {
            let _ = pidfd_send_signal(&vmm, Signal::KILL);
        }
        aim.vmm = Some(vmm);
    }
}

/// The VMM.
pub(crate) struct Vmm {
    child: Child,
}

impl Vmm {
    /// Starts it. To be called by main: the VMM dies with the thread that started it.
    pub(crate) fn start(
        shared: &std::sync::Arc<Shared>,
        command: &mut Command,
    ) -> io::Result<Self> {
        let log = File::create(shared.folder.join("vmm.log"))?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .current_dir("/");
        let child = crate::os::spawn_mortal(command)?;
        let vmm = Self { child };
        let open = || {
            let pid = Pid::from_child(&vmm.child);
            pidfd_open(pid, PidfdFlags::empty())
        };
        let watched = open()?;
        shared.killer.aim_at(open()?);
        shared.thread("vmm", move |shared| {
            let mut fds = [PollFd::new(&watched, PollFlags::IN)];
            while let Err(rustix::io::Errno::INTR) = poll(&mut fds, None) {}
            shared.happened(Happening::VmmEnded);
        })?;
        Ok(vmm)
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Whether it has ended, or does so in a moment: what it held is told to be closed before it is.
    pub(crate) fn has_ended_soon(&mut self) -> bool {
        const SOON: Timespec = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        if let Ok(process) = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty()) {
            let _ = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&SOON));
        }
        self.has_ended()
    }

    /// Waits for its end.
    pub(crate) fn reap(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Reaped if it has ended, else it is killed: nothing stays behind.
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// How the VMM ended, in words.
pub(crate) fn words(status: ExitStatus, log: &str) -> String {
    let said = log
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix("testudo-vmm: "));
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("vmm was killed by signal {signal}"),
        (None, Some(0)) => "the guest powered off".into(),
        (None, Some(3)) => "the guest reset itself".into(),
        (None, Some(4)) => "the guest's kernel panicked".into(),
        (None, code) => match said {
            Some(said) => format!("vmm: {said}"),
            None => format!("vmm ended with status {}", code.unwrap_or(-1)),
        },
    }
}
