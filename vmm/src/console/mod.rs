//! The host's end of the serial port.
//!
//! [`Console::open`] runs before the machine is built. Each machine's UART gets a sink of its own
//! ([`Console::sink`]) and is then connected ([`Console::connect`]); a guest that boots again gets
//! a new UART on the same console. On the `io` thread the console brings input to the guest as
//! fast as the FIFO empties, and output that had to wait to the sink once that takes bytes again.

mod escape;
mod events;
mod sink;
mod terminal;
mod unix;

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use testudo_legacy::SerialHandle;
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use escape::Escape;
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
    /// Standard input, without the buffer of `io::stdin`: what that holds no epoll tells of.
    Stdin(File),
    Unix(Listening),
}

/// The console of one VM.
pub(crate) struct Console {
    input: Input,
    /// The terminal is raw while this is here.
    terminal: Option<RawTerminal>,
    escape: Escape,
    /// Where output goes, unless it goes to the client of a socket or nowhere.
    output: Option<File>,
    /// Signalled by the sink when it refuses.
    stalled: Arc<EventFd>,
    serial: Option<SerialHandle>,
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
            output: None,
            stalled,
            serial: None,
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
                let file = inherited(*fd).ok_or(ConsoleOpenError::Closed { fd: *fd })?;
                console.output = Some(file.into());
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
            self.input = Input::Stdin(stdin.into());
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

    /// From now on the console is that of `serial`. Before it is attached to the `io` thread.
    pub(crate) fn connect(&mut self, serial: SerialHandle) {
        self.serial = Some(serial);
        if self.watch == Watch::Yes {
            self.watch = Watch::No;
        }
    }

    /// Sends what the UART still holds, for as long as the reader takes some within `patience`.
    /// When the VM has ended.
    pub(crate) fn drain(&self, patience: Duration) {
        let Some(serial) = &self.serial else { return };
        let mut last = Instant::now();
        while !serial.output_ready() {
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
        self.input = Input::None;
    }

    /// Bytes of output that were lost.
    pub(crate) fn lost(&self) -> u64 {
        self.serial.as_ref().map_or(0, SerialHandle::lost)
    }

    fn input_fd(&self) -> Option<RawFd> {
        match &self.input {
            Input::None => None,
            Input::Stdin(stdin) => Some(stdin.as_raw_fd()),
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
