//! What a process gets as descriptors 0, 1 and 2, and what the agent keeps of it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use testudo_agent_protocol::Stdio;

use crate::failure::{During, Failure};

/// The process's ends.
pub(crate) struct Pipes {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

/// The agent's ends; what the host did not ask for there is none of.
#[derive(Default)]
pub(crate) struct Ends {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
}

/// What a pipe holds: each time it is full or empty somebody has to be woken. Pages come with the bytes.
const CAPACITY: usize = 256 * 1024;

fn pipe() -> Result<(OwnedFd, OwnedFd), Failure> {
    let ends = pipe_with(PipeFlags::CLOEXEC).during(|| "make pipes".into())?;
    // As the kernel makes them, if it does not allow more.
    let _ = rustix::pipe::fcntl_setpipe_size(&ends.1, CAPACITY);
    Ok(ends)
}

impl Pipes {
    /// For a process without a terminal; one with a terminal gets its descriptors from the stage.
    pub(crate) fn new(stdio: &Stdio, terminal: bool) -> Result<(Self, Ends), Failure> {
        let about = || "make pipes".into();
        let null = || {
            rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
                .during(about)
        };
        let mut ends = Ends::default();
        let wanted = |number: u64| number != 0 && !terminal;
        let stdin = if wanted(stdio.stdin) {
            let (theirs, ours) = pipe()?;
            rustix::io::ioctl_fionbio(&ours, true).during(about)?;
            ends.stdin = Some(ours);
            theirs
        } else {
            null()?
        };
        let output = |number: u64, end: &mut Option<OwnedFd>| {
            if !wanted(number) {
                return null();
            }
            let (ours, theirs) = pipe()?;
            rustix::io::ioctl_fionbio(&ours, true).during(about)?;
            *end = Some(ours);
            Ok(theirs)
        };
        let stdout = output(stdio.stdout, &mut ends.stdout)?;
        let stderr = output(stdio.stderr, &mut ends.stderr)?;
        let pipes = Self {
            stdin,
            stdout,
            stderr,
        };
        Ok((pipes, ends))
    }

    /// In the order of their numbers.
    pub(crate) fn descriptors(&self) -> [BorrowedFd<'_>; 3] {
        [self.stdin.as_fd(), self.stdout.as_fd(), self.stderr.as_fd()]
    }
}
