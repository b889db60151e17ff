//! A command that is attached to a pod: input, signals and the terminal's size go there, its end comes back.
//!
//! One thread, one poll(2). What the supervisor cannot take yet is held here and no more is read, so that a
//! container that reads slowly slows its writer down.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::stdio::stdin;

use crate::link::{Ask, INPUT_MOST, INPUT_WINDOW, Link, Tell};
use crate::terminal::{KeyWatch, Raw, is_input, size};
use crate::values::Signal;

/// What is passed on. A terminal's own signals come as bytes when it is raw.
const FORWARDED: [i32; 7] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGWINCH,
];

/// How a session ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// With the pod.
    Exited {
        /// Its exit code.
        code: u8,
        /// What ended it, if not the container itself.
        why: Option<String>,
    },
    /// The pod could not be started.
    Failed {
        /// Why.
        why: String,
        /// As a shell counts.
        code: u8,
    },
    /// By the detach keys.
    Detached,
    /// The supervisor has gone without a word.
    Lost,
}

/// What a session does with this command's descriptors.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    /// Input is sent.
    pub(crate) stdin: bool,
    /// The container has a terminal.
    pub(crate) terminal: bool,
    /// Signals are passed on.
    pub(crate) signals: bool,
    /// Keys that end it.
    pub(crate) keys: Vec<u8>,
}

struct Work<'a> {
    link: &'a Link,
    signals: Option<OwnedFd>,
    keys: KeyWatch,
    terminal: bool,
    stdin_open: bool,
    /// Read and not sent.
    held: Option<Vec<u8>>,
    /// Packets sent and not taken.
    under_way: usize,
    detached: bool,
}

impl Session {
    /// To be called before anything is started: from here on signals wait instead of ending this process.
    pub(crate) fn take_signals(&self) -> io::Result<Option<OwnedFd>> {
        self.signals
            .then(|| crate::os::signals(&FORWARDED))
            .transpose()
    }

    /// Until the end.
    pub(crate) fn run(&self, link: &Link, signals: Option<OwnedFd>) -> io::Result<Ended> {
        let raw = (self.stdin && self.terminal && is_input())
            .then(Raw::begin)
            .transpose()?;
        let keys = if raw.is_some() {
            self.keys.clone()
        } else {
            Vec::new()
        };
        let mut work = Work {
            link,
            signals,
            keys: KeyWatch::new(keys),
            terminal: self.terminal,
            stdin_open: self.stdin,
            held: None,
            under_way: 0,
            detached: false,
        };
        link.0.set_nonblocking(true)?;
        let ended = work.turns();
        drop(raw);
        ended
    }
}

impl Work<'_> {
    fn turns(&mut self) -> io::Result<Ended> {
        loop {
            let ready = self.wait()?;
            if ready.signal {
                self.pass_signals()?;
            }
            if ready.link
                && let Some(ended) = self.hear()?
            {
                return Ok(ended);
            }
            if ready.room {
                self.send_held()?;
            }
            if ready.input && self.held.is_none() {
                self.pass_input()?;
            }
            if self.detached {
                self.link.0.set_nonblocking(false)?;
                self.link.ask(&Ask::Detach, &[])?;
                return Ok(Ended::Detached);
            }
        }
    }

    fn wait(&self) -> io::Result<Ready> {
        let link = self.link.0.as_fd();
        let full = self.held.is_some();
        let of_link = if full {
            PollFlags::IN | PollFlags::OUT
        } else {
            PollFlags::IN
        };
        let mut fds = vec![PollFd::from_borrowed_fd(link, of_link)];
        if let Some(signals) = &self.signals {
            fds.push(PollFd::new(signals, PollFlags::IN));
        }
        let reads = self.stdin_open && !full && self.under_way < INPUT_WINDOW;
        if reads {
            fds.push(PollFd::from_borrowed_fd(stdin(), PollFlags::IN));
        }
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let mut seen = fds.iter().map(PollFd::revents);
        let of_link = seen.next().unwrap_or(PollFlags::empty());
        let signal = self.signals.is_some() && seen.next().is_some_and(|flags| !flags.is_empty());
        let input = reads && seen.next().is_some_and(|flags| !flags.is_empty());
        Ok(Ready {
            link: of_link.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR),
            room: of_link.contains(PollFlags::OUT),
            signal,
            input,
        })
    }

    fn hear(&mut self) -> io::Result<Option<Ended>> {
        let told = match self.link.told() {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            told => told?,
        };
        Ok(match told {
            None => Some(Ended::Lost),
            Some(Tell::Exited { code, why }) => Some(Ended::Exited { code, why }),
            Some(Tell::Failed { why, code }) => Some(Ended::Failed { why, code }),
            Some(Tell::Started) => {
                // The terminal may have changed while the guest came up.
                self.resize()?;
                None
            }
            Some(Tell::Taken) => {
                self.under_way = self.under_way.saturating_sub(1);
                None
            }
            Some(Tell::Done | Tell::Refused { .. }) => None,
        })
    }

    fn resize(&self) -> io::Result<()> {
        match size() {
            Some((rows, columns)) if self.terminal => {
                soft(self.link.ask(&Ask::Resize { rows, columns }, &[]))
            }
            _ => Ok(()),
        }
    }

    fn pass_signals(&self) -> io::Result<()> {
        let Some(signals) = &self.signals else {
            return Ok(());
        };
        while let Some(number) = crate::os::next_signal(signals) {
            if number == libc::SIGWINCH {
                self.resize()?;
            } else if let Ok(number) = u32::try_from(number) {
                soft(self.link.ask(
                    &Ask::Signal {
                        signal: Signal(number),
                    },
                    &[],
                ))?;
            }
        }
        Ok(())
    }

    fn pass_input(&mut self) -> io::Result<()> {
        let mut buffer = vec![0; INPUT_MOST];
        let length = match rustix::io::read(stdin(), &mut buffer) {
            Ok(length) => length,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            // A terminal that has gone.
            Err(Errno::IO) => 0,
            Err(e) => return Err(e.into()),
        };
        if length == 0 {
            self.stdin_open = false;
            return soft(self.link.ask(&Ask::EndOfInput, &[]));
        }
        let bytes = buffer.get(..length).unwrap_or_default();
        let (bytes, detached) = self.keys.pass(bytes);
        self.detached = detached;
        self.held = (!bytes.is_empty()).then_some(bytes);
        self.send_held()
    }

    fn send_held(&mut self) -> io::Result<()> {
        let Some(bytes) = self.held.take() else {
            return Ok(());
        };
        match self.link.input(&bytes) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.held = Some(bytes),
            other => {
                soft(other)?;
                self.under_way = self.under_way.saturating_add(1);
            }
        }
        Ok(())
    }
}

struct Ready {
    link: bool,
    room: bool,
    signal: bool,
    input: bool,
}

/// What cannot be said to a supervisor that has gone is not the error to tell: its end is.
fn soft(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::BrokenPipe
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::WouldBlock
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// Both outputs of this command, to be handed to the supervisor.
pub(crate) fn outputs() -> [BorrowedFd<'static>; 2] {
    [rustix::stdio::stdout(), rustix::stdio::stderr()]
}
