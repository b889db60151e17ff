//! `testudo exec`: straight to the agent, the supervisor has no part in it.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use anyhow::{Context as _, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use testudo_agent_protocol::{
    CallError, ExecProcessRequest, ProcessId, ResizeTtyRequest, SignalProcessRequest, Stdio,
    TtySize, WaitProcessRequest, code,
};

use super::{Context, complain};
use crate::args::ExecArgs;
use crate::container::{CONTAINER, capabilities, exec_process, who};
use crate::guest::Guest;
use crate::pod::ProcessPlan;
use crate::session::Session;
use crate::state::{Entry, EventLog, Phase, find};
use crate::terminal::{Raw, is_input, size};
use crate::values::EnvWord;

pub(super) fn exec(context: &Context, args: &ExecArgs) -> anyhow::Result<ExitCode> {
    let entry = find(&context.directories, &args.pod)?;
    ensure!(
        entry.state.phase == Phase::Running,
        "{} is not running: {}",
        entry.pod.name,
        entry.state.words()
    );
    ensure!(
        !args.tty || !args.interactive || is_input(),
        "-t with -i needs a terminal for input; leave -t out where input comes from a file or a pipe"
    );
    let guest = Guest::of(&context.directories.sockets(&entry.pod.id));
    let work = Work {
        id: process_id()?,
        stdio: stdio(args)?,
        guest,
        terminal: args.tty,
    };
    let session = Session {
        stdin: args.interactive,
        terminal: args.tty,
        signals: true,
        keys: Vec::new(),
    };
    let signals = session.take_signals()?;
    let request = ExecProcessRequest {
        id: Some(work.id.clone()),
        process: Some(exec_process(&plan(args, &entry)?)),
        stdio: Some(work.stdio),
    };
    let mut client = work.guest.connect()?;
    match client.call(&request) {
        Err(CallError::Refused {
            code: code::NOT_FOUND,
            message,
            ..
        }) => {
            complain(&message);
            return Ok(ExitCode::from(127));
        }
        Err(CallError::Refused {
            code: code::INVALID,
            message,
            ..
        }) => {
            complain(&message);
            return Ok(ExitCode::from(126));
        }
        other => other?,
    };
    let events = EventLog::of(context.directories.state());
    events.add(
        "exec",
        &entry.pod.id,
        &entry.pod.name,
        Some(args.command.join(" ")),
    );
    if args.detach {
        return Ok(ExitCode::SUCCESS);
    }
    let raw = (args.interactive && args.tty && is_input())
        .then(Raw::begin)
        .transpose()?;
    let outputs = work.connect(args.interactive)?;
    if let Some(signals) = signals {
        let work = work.clone();
        thread::Builder::new()
            .name("signals".into())
            .spawn(move || work.pass_signals(&signals))?;
    }
    let exit = client.call(&WaitProcessRequest {
        id: Some(work.id.clone()),
    });
    outputs.finish(exit.as_ref().map_or([0, 0], |response| {
        response
            .exit
            .as_ref()
            .map_or([0, 0], |exit| [exit.stdout_bytes, exit.stderr_bytes])
    }));
    drop(raw);
    let exit = exit.context("the pod ended")?.exit.unwrap_or_default();
    Ok(ExitCode::from(u8::try_from(exit.code).unwrap_or(255)))
}

/// As the first process, but for what was said.
fn plan(args: &ExecArgs, entry: &Entry) -> anyhow::Result<ProcessPlan> {
    let first = &entry.pod.process;
    let mut plan = ProcessPlan {
        args: args.command.clone(),
        terminal: args.tty,
        stdin: args.interactive,
        size: size().unwrap_or((24, 80)),
        ulimits: Vec::new(),
        ..first.clone()
    };
    if let Some(cwd) = &args.workdir {
        plan.cwd.clone_from(cwd);
    }
    if let Some(user) = &args.user {
        let lists = crate::image::users(&entry.pod.root)?;
        let who = who(Some(user), &lists)?;
        (plan.uid, plan.gid, plan.groups) = (who.uid, who.gid, who.groups);
    }
    if args.privileged {
        plan.capabilities = capabilities(&["ALL".into()], &[])?;
    }
    for word in &args.env {
        let (name, value) = match word {
            EnvWord::Set(name, value) => (name, Some(value.clone())),
            EnvWord::Inherit(name) => (name, std::env::var(name).ok()),
        };
        plan.env.retain(|pair| pair.split('=').next() != Some(name));
        plan.env
            .extend(value.map(|value| format!("{name}={value}")));
    }
    Ok(plan)
}

fn process_id() -> anyhow::Result<ProcessId> {
    Ok(ProcessId {
        container: CONTAINER.into(),
        exec: format!("exec-{}", crate::state::new_id()?),
    })
}

/// Numbers nobody else has chosen.
fn stdio(args: &ExecArgs) -> anyhow::Result<Stdio> {
    let number = || -> anyhow::Result<u64> {
        // Beyond those of the first process, and not 0.
        Ok(u64::from_str_radix(&crate::state::new_id()?, 16)? | 1 << 48)
    };
    if args.detach {
        return Ok(Stdio::default());
    }
    let one = number()?;
    if args.tty {
        return Ok(Stdio {
            stdin: if args.interactive { one } else { 0 },
            stdout: one,
            stderr: 0,
        });
    }
    Ok(Stdio {
        stdin: if args.interactive { one } else { 0 },
        stdout: number()?,
        stderr: number()?,
    })
}

#[derive(Clone)]
struct Work {
    id: ProcessId,
    stdio: Stdio,
    guest: Guest,
    terminal: bool,
}

impl Work {
    fn connect(&self, stdin: bool) -> anyhow::Result<Outputs> {
        let out = self.guest.stream(self.stdio.stdout)?;
        if stdin {
            let to = if self.terminal {
                out.try_clone()?
            } else {
                self.guest.stream(self.stdio.stdin)?
            };
            thread::Builder::new()
                .name("input".into())
                .spawn(move || pass_input(to))?;
        }
        let err = (self.stdio.stderr != 0)
            .then(|| self.guest.stream(self.stdio.stderr))
            .transpose()?;
        Ok(Outputs {
            threads: vec![Output::start(out, io::stdout())?]
                .into_iter()
                .chain(
                    err.map(|err| Output::start(err, io::stderr()))
                        .transpose()?,
                )
                .collect(),
        })
    }

    fn pass_signals(&self, signals: &std::os::fd::OwnedFd) {
        loop {
            let mut fds = [PollFd::new(signals, PollFlags::IN)];
            let _ = poll(&mut fds, None);
            while let Some(number) = crate::os::next_signal(signals) {
                let id = Some(self.id.clone());
                let sent = if number == libc::SIGWINCH {
                    let Some((rows, columns)) = size() else {
                        continue;
                    };
                    let size = TtySize {
                        rows: rows.into(),
                        columns: columns.into(),
                    };
                    self.guest
                        .call(&ResizeTtyRequest {
                            id,
                            size: Some(size),
                        })
                        .map(drop)
                } else {
                    let signal = u32::try_from(number).unwrap_or_default();
                    self.guest
                        .call(&SignalProcessRequest {
                            id,
                            signal,
                            all: false,
                        })
                        .map(drop)
                };
                if let Err(e) = sent {
                    complain(&e.to_string());
                }
            }
        }
    }
}

fn pass_input(mut to: UnixStream) {
    let _ = io::copy(&mut io::stdin().lock(), &mut to);
    let _ = to.shutdown(Shutdown::Write);
}

/// Output on its way.
struct Outputs {
    threads: Vec<Output>,
}

struct Output {
    thread: thread::JoinHandle<()>,
    socket: UnixStream,
    /// The process has ended and has written so much; what it left behind may hold its output open.
    progress: Arc<Progress>,
}

#[derive(Default)]
struct Progress {
    /// Bytes passed on, and whether there will be no more.
    seen: Mutex<(u64, bool)>,
    changed: Condvar,
}

impl Progress {
    fn note(&self, more: usize, ended: bool) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.0 = seen
            .0
            .saturating_add(u64::try_from(more).unwrap_or_default());
        seen.1 |= ended;
        self.changed.notify_all();
    }

    fn wait_for(&self, wanted: u64) {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let _seen = self
            .changed
            .wait_while(seen, |(bytes, ended)| *bytes < wanted && !*ended);
    }
}

impl Output {
    fn start(from: UnixStream, to: impl Write + Send + 'static) -> io::Result<Self> {
        let (socket, progress) = (from.try_clone()?, Arc::new(Progress::default()));
        let seen = Arc::clone(&progress);
        let thread = thread::Builder::new()
            .name("output".into())
            .spawn(move || {
                pass_output(from, to, &seen);
                seen.note(0, true);
            })?;
        Ok(Self {
            thread,
            socket,
            progress,
        })
    }
}

fn pass_output(mut from: UnixStream, mut to: impl Write, seen: &Progress) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => length,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let bytes = buffer.get(..length).unwrap_or_default();
        if to.write_all(bytes).and_then(|()| to.flush()).is_err() {
            return;
        }
        seen.note(length, false);
    }
}

impl Outputs {
    /// Until all that the process wrote has been passed on.
    fn finish(self, wanted: [u64; 2]) {
        for (output, wanted) in self.threads.into_iter().zip(wanted) {
            output.progress.wait_for(wanted);
            let _ = output.socket.shutdown(Shutdown::Both);
            let _ = output.thread.join();
        }
    }
}
