//! From a running container to nothing.

use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use testudo_agent_protocol::{DestroySandboxRequest, Exit, SignalProcessRequest};

use super::clients::first;
use super::starting::{exit_code, explain};
use super::vmm::words;
use super::{Happening, Supervisor};
use crate::link::Tell;
use crate::state::{End, Phase};
use crate::values::Signal;

/// For what a reader has not taken yet.
const DRAIN: Duration = Duration::from_secs(10);
/// For a guest that is told to end, and for a container that was killed.
const GRACE: Duration = Duration::from_secs(5);
/// Longer than anything runs: a century.
const FOREVER: Duration = Duration::from_secs(3_200_000_000);

/// The next thing to do if nothing happens.
struct Alarm {
    at: Option<Instant>,
    next: Next,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Its time is over.
    TimeOver,
    /// It was asked and has not ended.
    KillContainer,
    /// It was killed and has not ended.
    KillGuest,
}

fn after(wait: Duration) -> Option<Instant> {
    Instant::now().checked_add(wait)
}

impl Supervisor {
    /// Until the container's end, and everything else's.
    pub(super) fn watch(&mut self) {
        let timeout = self.shared.pod.timeout_s;
        let mut alarm = Alarm {
            at: timeout.and_then(|s| after(Duration::from_secs(s))),
            next: Next::TimeOver,
        };
        let mut why: Option<(String, u8)> = None;
        let end = loop {
            let left = alarm
                .at
                .map_or(FOREVER, |at| at.saturating_duration_since(Instant::now()));
            match self.happenings.recv_timeout(left) {
                Ok(Happening::Exited(exit)) => break self.after_exit(&exit, why),
                Ok(Happening::AgentLost) if why.is_none() => break self.after_loss(),
                Ok(Happening::AgentLost) => {}
                Ok(Happening::VmmEnded) => break self.after_loss(),
                Ok(Happening::Paused(paused)) => {
                    self.state.phase = if paused {
                        Phase::Paused
                    } else {
                        Phase::Running
                    };
                    self.record();
                    self.event(if paused { "pause" } else { "resume" }, None);
                }
                Ok(Happening::Stop {
                    timeout_s,
                    why: reason,
                }) => {
                    why = reason.map(|reason| (reason, 125)).or(why);
                    self.signal(self.shared.pod.stop_signal, false);
                    alarm = Alarm {
                        at: after(Duration::from_secs(timeout_s)),
                        next: Next::KillContainer,
                    };
                }
                Err(RecvTimeoutError::Timeout) => match alarm.next {
                    Next::TimeOver => {
                        let limit = timeout.unwrap_or_default();
                        why = Some((format!("its {limit} s were over"), 124));
                        self.signal(self.shared.pod.stop_signal, false);
                        alarm = Alarm {
                            at: after(GRACE),
                            next: Next::KillContainer,
                        };
                    }
                    Next::KillContainer => {
                        self.signal(Signal::KILL, true);
                        alarm = Alarm {
                            at: after(GRACE),
                            next: Next::KillGuest,
                        };
                    }
                    Next::KillGuest => {
                        self.shared.killer.kill();
                        alarm.at = None;
                    }
                },
                Err(RecvTimeoutError::Disconnected) => break self.after_loss(),
            }
        };
        self.finish(end);
    }

    /// A signal to the container; one that does not arrive is followed by a harder one.
    fn signal(&self, signal: Signal, all: bool) {
        self.event("kill", Some(signal.to_string()));
        let guest = self.shared.guest.clone();
        let request = SignalProcessRequest {
            id: Some(first()),
            signal: signal.0,
            all,
        };
        // By a thread of its own: a guest that hangs would hold up what comes after.
        let sent = self.shared.thread("signal", move |_| {
            if let Err(e) = guest.call(&request) {
                eprintln!("testudo supervise: {signal}: {e}");
            }
        });
        drop(sent);
    }

    fn after_exit(&mut self, exit: &Exit, why: Option<(String, u8)>) -> End {
        let whole = self
            .shared
            .outputs
            .wait_for([exit.stdout_bytes, exit.stderr_bytes], DRAIN);
        if !whole {
            eprintln!(
                "testudo supervise: a reader does not read: the end of the output is only in the log"
            );
        }
        if exit.oom_killed {
            self.event("oom", None);
        }
        self.destroy();
        let own = u8::try_from(exit.code).unwrap_or(255);
        let (why, code) = match why {
            Some((why, code @ 124)) => (Some(why), code),
            Some((why, _)) => (Some(why), own),
            None => (None, own),
        };
        End {
            code,
            at_ms: crate::clock::now_ms(),
            why,
            oom_killed: exit.oom_killed,
        }
    }

    /// Data are written, then the guest may go: what is left of it needs no order.
    fn destroy(&mut self) {
        let destroyed = self.shared.guest.connect().and_then(|mut client| {
            let _ = client.socket().set_read_timeout(Some(GRACE));
            Ok(client.call(&DestroySandboxRequest {})?)
        });
        if let Err(e) = destroyed {
            eprintln!("testudo supervise: the guest did not end well: {e}");
        }
    }

    /// The VMM or the agent went first.
    fn after_loss(&mut self) -> End {
        let ordered = self.shared.killer.fired();
        // The VMM's end often follows; without it the agent alone was lost.
        let mut vmm_ended = false;
        let deadline = Instant::now() + Duration::from_millis(500);
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            match self.happenings.recv_timeout(left) {
                Ok(Happening::VmmEnded) => vmm_ended = true,
                Ok(_) => continue,
                Err(_) => {}
            }
            break;
        }
        let ended = self
            .vmm
            .as_mut()
            .is_some_and(|vmm| vmm_ended || vmm.has_ended());
        let why = if ordered {
            "it was killed with its guest".to_owned()
        } else if ended {
            self.vmm_words()
        } else {
            "the agent ended".to_owned()
        };
        let code = if ordered { 137 } else { 125 };
        End {
            code,
            at_ms: crate::clock::now_ms(),
            why: Some(why),
            oom_killed: false,
        }
    }

    fn vmm_words(&mut self) -> String {
        let log = std::fs::read_to_string(self.shared.folder.join("vmm.log")).unwrap_or_default();
        match self.vmm.as_mut().map(super::vmm::Vmm::reap) {
            Some(Ok(status)) => words(status, &log),
            _ => "the VMM ended".to_owned(),
        }
    }

    /// It could not be started.
    pub(super) fn fail(&mut self, failure: &anyhow::Error) {
        let code = exit_code(failure);
        let mut why = explain(failure);
        if code == 125
            && self
                .vmm
                .as_mut()
                .is_some_and(super::vmm::Vmm::has_ended_soon)
        {
            let words = self.vmm_words();
            why = if self.shared.killer.fired() {
                why
            } else {
                words
            };
        }
        let hint = self.shared.pod.remove && code == 125;
        if hint && let Some(line) = self.last_of_console() {
            why = format!("{why}; the guest's last words: {line}");
        }
        self.event("exit", Some(why.clone()));
        let end = End {
            code,
            at_ms: crate::clock::now_ms(),
            why: Some(why.clone()),
            oom_killed: false,
        };
        self.clear(end);
        self.shared.clients.tell_all(&Tell::Failed { why, code });
    }

    fn last_of_console(&self) -> Option<String> {
        let text = std::fs::read(self.shared.folder.join("console.log")).ok()?;
        let text = String::from_utf8_lossy(&text).into_owned();
        let line = text
            .lines()
            .rev()
            .map(str::trim)
            .find(|line| !line.is_empty())?;
        Some(line.to_owned())
    }

    fn finish(&mut self, end: End) {
        self.event(
            "exit",
            Some(end.why.clone().unwrap_or_else(|| end.code.to_string())),
        );
        let tell = Tell::Exited {
            code: end.code,
            why: end.why.clone(),
        };
        self.clear(end);
        self.shared.clients.tell_all(&tell);
    }

    /// Processes, sockets and, if nothing was to be kept, files.
    fn clear(&mut self, end: End) {
        self.shared.killer.kill();
        self.vmm = None;
        self.network = None;
        let _ = std::fs::remove_dir_all(&self.shared.sockets);
        self.state.phase = Phase::Exited;
        self.state.end = Some(end);
        self.state.vmm = None;
        if self.shared.pod.remove {
            let _ = std::fs::remove_dir_all(self.directories.pod(&self.shared.pod.id));
            self.event("remove", None);
        } else {
            self.record();
        }
    }
}
