//! The guest's console: whole lines, nothing lost. Used by the one thread there is.

use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;

use rustix::termios::{self, LocalModes, OptionalActions};

/// Where the init speaks and listens.
pub(crate) struct Console {
    terminal: File,
}

impl Console {
    /// The kernel gives init the console as its first three descriptors if the initramfs holds the
    /// node; this opens it again by name, by which it is certain.
    pub(crate) fn open() -> io::Result<Console> {
        let terminal = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/console")?;
        Ok(Console { terminal })
    }

    /// Prints one line. A console that takes nothing is no reason to stop carrying out orders.
    pub(crate) fn line(&mut self, text: impl Display) {
        let _ = self.terminal.write_all(format!("{text}\n").as_bytes());
    }

    /// Prints `FACT key=value`.
    pub(crate) fn fact(&mut self, key: impl Display, value: impl Display) {
        self.line(format_args!("FACT {key}={value}"));
    }

    /// Prints these bytes as they are.
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.terminal.write_all(bytes)
    }

    /// A standard stream for a child.
    pub(crate) fn descriptor(&self) -> io::Result<File> {
        self.terminal.try_clone()
    }

    /// Returns when the last byte has left the UART: a machine that ends loses what is queued.
    pub(crate) fn drain(&mut self) {
        let _ = termios::tcdrain(self.terminal.as_fd());
    }

    /// The terminal for reading, from which on it does not echo what comes in.
    pub(crate) fn silent_input(&mut self) -> io::Result<File> {
        let mut modes = termios::tcgetattr(self.terminal.as_fd())?;
        modes.local_modes.remove(LocalModes::ECHO);
        termios::tcsetattr(self.terminal.as_fd(), OptionalActions::Flush, &modes)?;
        self.terminal.try_clone()
    }

    /// Sends lines back as `ECHO line` until `quit` or the end; returns how many.
    ///
    /// The terminal's own echo goes off first, and `ECHO ready` says that it is off.
    pub(crate) fn echo(&mut self) -> io::Result<u64> {
        let mut lines = BufReader::new(self.silent_input()?);
        self.line("ECHO ready");
        let mut count = 0_u64;
        loop {
            let mut line = Vec::new();
            if lines.read_until(b'\n', &mut line)? == 0 {
                return Ok(count);
            }
            let text = line.trim_ascii_end();
            if text == b"quit" {
                return Ok(count);
            }
            count = count.saturating_add(1);
            self.raw(&[b"ECHO ", text, b"\n"].concat())?;
        }
    }
}
