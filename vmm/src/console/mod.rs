//! The host's end of a console: of the serial port, or of a virtio port.
//!
//! [`Console::open`] runs before the machine is built. Each machine's line (a UART, a port) gets a sink of its own
//! ([`Console::sink`]) and is then connected ([`Console::connect`]); a guest that boots
//! again gets a new line on the same console. On the `io` thread the console brings input to the guest as
//! fast as the FIFO empties, and output that had to wait to the sink once that takes bytes again.

mod escape;
mod events;
mod line;
mod pty;
mod sink;
mod terminal;
mod unix;

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use escape::Escape;
use line::Line;
use pty::Pty;
use sink::FdSink;
use terminal::RawTerminal;
pub use terminal::keep_terminal;
use unix::Listening;

use crate::spec::{ConsoleConfig, inherited};

/// The console could not be set up.
#[derive(Debug, Error)]
pub enum ConsoleOpenError {
    /// The log file.
    #[error("cannot create console file {}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The socket.
    #[error("cannot listen for console clients at {}: is it in use, does its folder exist, may this user write there?", path.display())]
    Unix {
        /// Its path.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The terminal.
    #[error("cannot make a terminal at {}: is something else there, does its folder exist?", path.display())]
    Pty {
        /// Its path.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// An inherited descriptor.
    #[error(
        "console fd:{fd} is not an open descriptor of this process; pass it on when starting testudo-vmm"
    )]
    Closed {
        /// Its number.
        fd: RawFd,
    },
    /// Standard input or output.
    #[error("cannot use standard input and output as the console")]
    Stdio(#[source] io::Error),
}

/// Where input comes from.
enum Input {
    None,
    /// A file, a socket, a terminal: standard input without the buffer of `io::stdin`, of which no
    /// epoll tells.
    File(File),
    Unix(Listening),
}

/// The console of one VM.
pub(crate) struct Console {
    input: Input,
    /// The terminal is raw while this is here.
    terminal: Option<RawTerminal>,
    escape: Escape,
    pty: Option<Pty>,
    /// Where output goes, unless it goes to the client of a socket or nowhere.
    output: Option<File>,
    /// Signalled by the sink when it refuses.
    stalled: Arc<EventFd>,
    line: Option<Box<dyn Line>>,
    /// Input that the guest's FIFO did not take.
    pending: Vec<u8>,
    watch: Watch,
    end_requested: Box<dyn Fn() + Send>,
}

/// Whether epoll knows the input descriptor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Watch {
    #[default]
    No,
    Yes,
    /// It cannot be waited for (a regular file): it is read whenever there is room.
    Impossible,
}

impl Console {
    /// Opens what `config` names. `end_requested` is called when the user types the escape.
    pub(crate) fn open(
        config: &ConsoleConfig,
        end_requested: Box<dyn Fn() + Send>,
    ) -> Result<Self, ConsoleOpenError> {
        let stalled = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(ConsoleOpenError::Stdio)?);
        let mut console = Self {
            input: Input::None,
            terminal: None,
            escape: Escape::default(),
            pty: None,
            output: None,
            stalled,
            line: None,
            pending: Vec::new(),
            watch: Watch::No,
            end_requested,
        };
        match config {
            ConsoleConfig::Off => {}
            ConsoleConfig::Stdio => console.open_stdio().map_err(ConsoleOpenError::Stdio)?,
            ConsoleConfig::File(path) => {
                let file = File::create(path).map_err(|source| ConsoleOpenError::File {
                    path: path.clone(),
                    source,
                })?;
                console.output = Some(file);
            }
            ConsoleConfig::Fd(fd) => {
                let closed = || ConsoleOpenError::Closed { fd: *fd };
                let file = File::from(inherited(*fd).ok_or_else(closed)?);
                let kind = file
                    .metadata()
                    .map_err(ConsoleOpenError::Stdio)?
                    .file_type();
                if kind.is_socket() {
                    let input = file.try_clone().map_err(ConsoleOpenError::Stdio)?;
                    console.input = Input::File(input);
                }
                console.output = Some(file);
            }
            ConsoleConfig::Pty(path) => {
                let error = |source| ConsoleOpenError::Pty {
                    path: path.clone(),
                    source,
                };
                let pty = Pty::open(path).map_err(error)?;
                let master = pty.master().try_clone().map_err(error)?;
                console.output = Some(pty.master().try_clone().map_err(error)?);
                console.input = Input::File(master);
                console.pty = Some(pty);
            }
            ConsoleConfig::Unix(path) => {
                let stalled = Arc::clone(&console.stalled);
                let listening =
                    Listening::bind(path, stalled).map_err(|source| ConsoleOpenError::Unix {
                        path: path.clone(),
                        source,
                    })?;
                console.input = Input::Unix(listening);
            }
        }
        Ok(console)
    }

    fn open_stdio(&mut self) -> io::Result<()> {
        self.output = Some(File::from(io::stdout().as_fd().try_clone_to_owned()?));
        self.terminal = RawTerminal::enter()?;
        let background = self.terminal.is_none() && io::stdin().is_terminal();
        if !background {
            let stdin = io::stdin().as_fd().try_clone_to_owned()?;
            self.input = Input::File(stdin.into());
        }
        Ok(())
    }

    /// Where a new UART sends its output.
    pub(crate) fn sink(&self) -> io::Result<Box<dyn Write + Send>> {
        if let Input::Unix(listening) = &self.input {
            return Ok(listening.sink());
        }
        match &self.output {
            None => Ok(Box::new(io::sink())),
            Some(file) => {
                let sink = FdSink::new(file.try_clone()?, Arc::clone(&self.stalled))?;
                Ok(Box::new(sink))
            }
        }
    }

    /// From now on the console is that of `line`. Before it is attached to the `io` thread.
    pub(crate) fn connect(&mut self, line: impl Line + 'static) {
        let nobody = matches!(&self.input, Input::Unix(unix) if unix.client_fd().is_none());
        line.set_connected(!nobody);
        self.line = Some(Box::new(line));
        if self.watch == Watch::Yes {
            self.watch = Watch::No;
        }
    }

    /// Sends what the line still holds, for as long as the reader takes some within `patience`.
    /// When the VM has ended.
    pub(crate) fn drain(&self, patience: Duration) {
        let Some(line) = &self.line else { return };
        let mut last = Instant::now();
        while !line.output_ready() {
            let Some(fd) = self.output_fd() else { return };
            if last.elapsed() > patience {
                log::warn!("the console's reader does not read: its last output is lost");
                return;
            }
            if sink::wait_writable(fd, Duration::from_millis(100)) {
                last = Instant::now();
            }
        }
    }

    /// Gives back what outlives the process: the terminal's settings, the socket's path.
    pub(crate) fn put_back(&mut self) {
        self.terminal = None;
        self.pty = None;
        self.input = Input::None;
    }

    /// Bytes of output that were lost.
    pub(crate) fn lost(&self) -> u64 {
        self.line.as_ref().map_or(0, |line| line.lost())
    }

    /// Columns and rows of the terminal that the console is on.
    pub(crate) fn window(&self) -> Option<(u16, u16)> {
        self.terminal.as_ref()?;
        let size = rustix::termios::tcgetwinsize(io::stdin()).ok()?;
        Some((size.ws_col, size.ws_row))
    }

    fn input_fd(&self) -> Option<RawFd> {
        match &self.input {
            Input::None => None,
            Input::File(stdin) => Some(stdin.as_raw_fd()),
            Input::Unix(listening) => listening.client_fd(),
        }
    }

    fn output_fd(&self) -> Option<RawFd> {
        match &self.input {
            Input::Unix(listening) => listening.client_fd(),
            _ => self.output.as_ref().map(AsRawFd::as_raw_fd),
        }
    }
}
