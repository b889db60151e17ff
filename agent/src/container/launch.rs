//! From an order to a process that waits for its start: what a job does with a stage.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::process::{Pid, Signal, kill_process};
use testudo_agent_protocol::{IdMapping, Stdio, code};

use crate::cgroup::Group;
use crate::failure::{During, Failure};
use crate::stage::channel::{Channel, MAX_FDS, Order, Report, Told, Word};
use crate::stdio::{Ends, Pipes};
use crate::sys::spawn::{Spawn, spawn};

/// A stage that says nothing for so long is stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a stage is started with.
pub(crate) struct Launch {
    pub(crate) order: Order,
    /// Namespaces to join, the root, bind mounts: in the order in which a stage takes them.
    pub(crate) fds: Vec<OwnedFd>,
    pub(crate) stdio: Stdio,
    pub(crate) group: Option<Group>,
    /// Of a new user namespace.
    pub(crate) maps: (Vec<IdMapping>, Vec<IdMapping>),
    pub(crate) oom_score_adj: Option<i32>,
}

/// A process that is ready.
pub(crate) struct Launched {
    pub(crate) pid: Pid,
    pub(crate) stage: Channel,
    pub(crate) ends: Ends,
    pub(crate) terminal: Option<OwnedFd>,
}

/// Starts a stage and brings it to where it waits for the word to start, or, if there is no container to
/// build, to where it executes. `born` is called as soon as there is a process, before it does anything.
pub(crate) fn launch(
    what: &Launch,
    born: impl FnOnce(Pid) -> Result<(), Failure>,
) -> Result<Launched, Failure> {
    if what.fds.len() > MAX_FDS {
        return Err(Failure::of(
            code::EXHAUSTED,
            format!(
                "{} bind mounts and namespaces; {MAX_FDS} can be",
                what.fds.len()
            ),
        ));
    }
    let terminal = what
        .order
        .process
        .as_ref()
        .is_some_and(|process| process.terminal);
    let (pipes, ends) = Pipes::new(&what.stdio, terminal)?;
    let (stage, theirs) = Channel::pair().during(|| "make a socket".into())?;
    set_socket_timeout(&stage, Timeout::Recv, Some(PATIENCE)).during(|| "set a timeout".into())?;
    let mut killer = Killer::default();
    killer.pids.push(start(&pipes, theirs.as_fd())?);
    // Only the process itself may hold these: their ends are told by them.
    drop((pipes, theirs));
    let conversation = talk(what, &stage, &mut killer, born);
    match conversation {
        Ok((pid, terminal)) => {
            killer.pids.clear();
            set_socket_timeout(&stage, Timeout::Recv, None).during(|| "set a timeout".into())?;
            Ok(Launched {
                pid,
                stage,
                ends,
                terminal,
            })
        }
        Err(failure) => Err(failure),
    }
}

/// Kills what was started unless all went well.
#[derive(Default)]
struct Killer {
    pids: Vec<Pid>,
}

impl Drop for Killer {
    fn drop(&mut self) {
        // In a birth: nobody else can have these numbers by now.
        for pid in &self.pids {
            let _ = kill_process(*pid, Signal::KILL);
        }
    }
}

fn start(pipes: &Pipes, channel: BorrowedFd<'_>) -> Result<Pid, Failure> {
    let [stdin, stdout, stderr] = pipes.descriptors();
    let program = crate::settings::own_program();
    let args = [c"testudo-agent".into(), CString::from(c"stage")];
    spawn(&Spawn {
        program: &program,
        args: &args,
        env: &[],
        fds: &[stdin, stdout, stderr, channel],
    })
    .during(|| "start a stage".into())
}

fn talk(
    what: &Launch,
    stage: &Channel,
    killer: &mut Killer,
    born: impl FnOnce(Pid) -> Result<(), Failure>,
) -> Result<(Pid, Option<OwnedFd>), Failure> {
    let first = *killer
        .pids
        .first()
        .ok_or_else(|| Failure::new("no stage"))?;
    if let Some(group) = &what.group {
        group.add(first)?;
    }
    if let Some(adjust) = what.oom_score_adj {
        write_proc(first, "oom_score_adj", &adjust.to_string())?;
    }
    let fds: Vec<BorrowedFd<'_>> = what.fds.iter().map(AsFd::as_fd).collect();
    stage
        .send_order(&what.order, &fds)
        .during(|| "give orders to a stage".into())?;
    let mut born = Some(born);
    let mut pid = None;
    loop {
        let (report, fd) = stage.next_report().map_err(silent)?;
        match told(&report) {
            Told::NeedsMap => {
                map_ids(first, &what.maps)?;
                stage.say(Word::Mapped).during(|| "answer a stage".into())?;
            }
            Told::Born => {
                let sibling = Pid::from_raw(report.pid)
                    .filter(|pid| pid.as_raw_nonzero().get() > 0)
                    .ok_or_else(|| Failure::new("a stage told of nobody's birth"))?;
                // The first has done its work and ends by itself.
                killer.pids = vec![sibling];
                pid = Some(sibling);
                if let Some(born) = born.take() {
                    born(sibling)?;
                }
                stage.say(Word::Begin).during(|| "answer a stage".into())?;
            }
            Told::Ready => {
                let pid = pid.ok_or_else(|| Failure::new("a stage is ready without a birth"))?;
                return Ok((pid, fd));
            }
            Told::Failed => return Err(report.into_failure()),
            Told::Nothing => return Err(Failure::new("a stage told nothing")),
        }
    }
}

fn told(report: &Report) -> Told {
    Told::try_from(report.told).unwrap_or(Told::Nothing)
}

fn silent(e: io::Error) -> Failure {
    match e.kind() {
        io::ErrorKind::UnexpectedEof => Failure::new(
            "the process was killed while it was being prepared; is its memory limit too small?",
        ),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Failure::of(
            code::DEADLINE,
            format!("a stage said nothing for {PATIENCE:?}"),
        ),
        _ => Failure {
            code: code::INTERNAL,
            what: "hear from a stage".into(),
            source: Some(e),
        },
    }
}

fn map_ids(pid: Pid, maps: &(Vec<IdMapping>, Vec<IdMapping>)) -> Result<(), Failure> {
    let lines = |maps: &[IdMapping]| -> String {
        maps.iter()
            .map(|m| format!("{} {} {}\n", m.container_id, m.host_id, m.size))
            .collect()
    };
    write_proc(pid, "uid_map", &lines(&maps.0))?;
    write_proc(pid, "gid_map", &lines(&maps.1))
}

fn write_proc(pid: Pid, file: &str, text: &str) -> Result<(), Failure> {
    let path = format!("/proc/{}/{file}", pid.as_raw_nonzero());
    fs::write(&path, text).during(|| format!("write {text:?} to {path}"))
}

/// Waits until a process that needs no word to start has executed.
pub(crate) fn executed(launched: &Launched) -> Result<(), Failure> {
    match launched.stage.next_report() {
        // The socket closed with the execution.
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
        Ok((report, _)) if told(&report) == Told::Failed => Err(report.into_failure()),
        Ok(_) => Err(Failure::new("a stage told something unexpected")),
        Err(e) => Err(silent(e)),
    }
}
