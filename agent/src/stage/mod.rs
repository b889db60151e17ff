//! The stage: what a process of a container is before it is that process.
//!
//! The agent starts its own program anew with one word, so that a stage has one thread, no copy of the
//! agent's memory and no descriptor that it was not given. All its orders come over one socket; paths of
//! the guest mean nothing to it, for what it needs from outside of the container it gets as descriptors.
//!
//! ```text
//!  agent (a job's thread)          stage                           its sibling
//!  spawn ────────────────────────▶ waits for orders
//!  order, descriptors ───────────▶ joins, leaves namespaces
//!   ◀── needs-map ── (a new user namespace only) ── mapped ──▶
//!                                  clones ───────────────────────▶ waits
//!   ◀───────────────────────── born(pid), exits
//!  begin ────────────────────────────────────────────────────────▶ mounts, devices, …
//!   ◀──────────────────────────────────────────────── ready, with the terminal
//!  start ────────────────────────────────────────────────────────▶ identity, capabilities, filter
//!   ◀──────────────────────────── the socket closes ────────────── executes
//! ```
//! Anything that fails is told in words and by number over the same socket, after which the stage ends.

pub(crate) mod channel;
mod devices;
mod execute;
mod identity;
mod join;
mod limits;
mod masks;
mod mounts;
pub(crate) mod options;
mod root;
mod terminal;
mod tree;

use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use channel::{Channel, Order, Report, Word};

use crate::failure::{During, Failure};
use crate::sys::clone::{Who, sibling};

/// The word that makes this program a stage.
pub(crate) const WORD: &str = "stage";
/// Where a stage finds its socket; 0, 1 and 2 are the process's own.
const CHANNEL: i32 = 3;

/// Everything a stage does.
pub(crate) fn main() -> ExitCode {
    let Ok(channel) = Channel::inherited(CHANNEL) else {
        return ExitCode::FAILURE;
    };
    match run(&channel) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // If nobody listens, nobody minds.
            let _ = channel.report(&Report::failed(&failure), None);
            ExitCode::FAILURE
        }
    }
}

fn run(channel: &Channel) -> Result<(), Failure> {
    let (order, fds) = channel.order().during(|| "receive orders".into())?;
    let mut given = Given::sort(&order, fds)?;
    join::enter(&order, &given, channel)?;
    if let Who::Caller(pid) = sibling().during(|| "clone".into())? {
        channel
            .report(&Report::born(pid), None)
            .during(|| "report a birth".into())?;
        return Ok(());
    }
    channel.await_word(Word::Begin)?;
    rustix::process::setsid().during(|| "begin a session".into())?;
    let process = order.process.clone().unwrap_or_default();
    let terminal = if let Some(spec) = &order.spec {
        root::build(&order, spec, &mut given)?
    } else if process.terminal {
        Some(terminal::open_at(rustix::fs::CWD.as_fd(), &process)?)
    } else {
        None
    };
    let master = match terminal {
        Some(terminal) => Some(terminal.take_over()?),
        None => None,
    };
    drop(given);
    let ready = execute::prepare(&process, (order.filter, order.filter_flags))?;
    channel
        .report(&Report::ready(), master.as_ref().map(AsFd::as_fd))
        .during(|| "report readiness".into())?;
    drop(master);
    if order.spec.is_some() {
        channel.await_word(Word::Start)?;
    }
    Err(ready.execute())
}

/// The descriptors that came with an order, by what they are for.
pub(crate) struct Given {
    /// Namespaces to join, as the order lists them.
    pub(crate) joins: Vec<OwnedFd>,
    /// A mount of the root, attached nowhere yet.
    pub(crate) root: Option<OwnedFd>,
    /// Mounts of what bind mounts take, as the specification lists them.
    pub(crate) binds: std::vec::IntoIter<OwnedFd>,
}

impl Given {
    fn sort(order: &Order, fds: Vec<OwnedFd>) -> Result<Self, Failure> {
        let mut fds = fds.into_iter();
        let joins: Vec<OwnedFd> = fds.by_ref().take(order.joins.len()).collect();
        let root = if order.spec.is_some() {
            fds.next()
        } else {
            None
        };
        if joins.len() != order.joins.len() || (order.spec.is_some() && root.is_none()) {
            return Err(Failure::new("an order came with too few descriptors"));
        }
        Ok(Self {
            joins,
            root,
            binds: fds,
        })
    }
}

/// For the agent's own mounts.
pub(crate) use mounts::{detached, make as make_filesystem};
pub(crate) use terminal::winsize;

/// Whether what a descriptor is of is a folder.
pub(crate) fn kind_is_folder(fd: impl AsFd) -> Result<bool, Failure> {
    Ok(tree::kind_of(fd)? == tree::Kind::Folder)
}
