//! A process's terminal: a pair of the container's own devpts.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use testudo_agent_protocol::{Process, TtySize};

use super::mounts::{detached, onto};
use super::tree::{self, Kind};
use crate::failure::{During, Failure};

/// Both ends.
pub(super) struct Terminal {
    master: OwnedFd,
    own: OwnedFd,
}

/// A size as the kernel takes it; more than it can say is its most.
pub(crate) fn winsize(size: &TtySize) -> Winsize {
    Winsize {
        ws_row: u16::try_from(size.rows).unwrap_or(u16::MAX),
        ws_col: u16::try_from(size.columns).unwrap_or(u16::MAX),
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// Opens a pair in the devpts that is at /dev/pts of `root`.
pub(super) fn open(root: BorrowedFd<'_>, process: &Process) -> Result<Terminal, Failure> {
    let master = tree::open(
        root,
        Path::new("/dev/pts/ptmx"),
        OFlags::RDWR | OFlags::NOCTTY,
    )
    .during(|| "open /dev/pts/ptmx of the container; has it a devpts?".into())?;
    pair(master, process)
}

/// As [`open`], for a process that is already in the container.
pub(super) fn open_at(_: BorrowedFd<'_>, process: &Process) -> Result<Terminal, Failure> {
    let root = rustix::fs::open(
        "/",
        OFlags::PATH | OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .during(|| "open the root".into())?;
    open(root.as_fd(), process)
}

fn pair(master: OwnedFd, process: &Process) -> Result<Terminal, Failure> {
    unlockpt(&master).during(|| "unlock the terminal".into())?;
    // By the master, not by name: a name could be somebody else's.
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let own = ioctl_tiocgptpeer(&master, flags).during(|| "open the terminal".into())?;
    if let Some(size) = &process.console_size {
        tcsetwinsize(&own, winsize(size)).during(|| "size the terminal".into())?;
    }
    let _ = rustix::fs::fchown(
        &own,
        process
            .user
            .as_ref()
            .map(|user| rustix::process::Uid::from_raw(user.uid)),
        None,
    );
    Ok(Terminal { master, own })
}

impl Terminal {
    /// Shows it as /dev/console.
    pub(super) fn show(&self, root: BorrowedFd<'_>) -> Result<(), Failure> {
        let about = || "mount /dev/console".into();
        let at = tree::ensure(root, Path::new("/dev/console"), Kind::File)?;
        // A mount of the very file that is open: through its descriptor.
        let name = rustix::pty::ptsname(&self.master, Vec::new()).during(about)?;
        let number = name
            .to_str()
            .ok()
            .and_then(|name| name.strip_prefix("/dev/pts/"))
            .unwrap_or_default()
            .to_owned();
        let node = tree::open(
            root,
            &Path::new("/dev/pts").join(number),
            OFlags::PATH | OFlags::NOFOLLOW,
        )
        .during(about)?;
        let (named, opened) = (
            rustix::fs::statat(&node, "", rustix::fs::AtFlags::EMPTY_PATH).during(about)?,
            rustix::fs::fstat(&self.own).during(about)?,
        );
        if (named.st_rdev, named.st_ino, named.st_dev)
            != (opened.st_rdev, opened.st_ino, opened.st_dev)
        {
            return Err(Failure::new("/dev/pts of the container is not its devpts"));
        }
        onto(detached(node, false).during(about)?, at).during(about)
    }

    /// Makes it this session's terminal and descriptors 0, 1 and 2; gives the other end.
    pub(super) fn take_over(self) -> Result<OwnedFd, Failure> {
        let about = || "take the terminal over".into();
        rustix::process::ioctl_tiocsctty(&self.own).during(about)?;
        rustix::stdio::dup2_stdin(&self.own).during(about)?;
        rustix::stdio::dup2_stdout(&self.own).during(about)?;
        rustix::stdio::dup2_stderr(&self.own).during(about)?;
        Ok(self.master)
    }
}
