//! The terminal in raw mode, and back whatever happens.
//!
//! A guard restores the terminal when it is dropped. A VMM that is killed drops nothing, so a
//! small child process stands by, waits for the VMM to be gone, and restores it then.
#![expect(
    unsafe_code,
    reason = "termios, fork and the little a forked child may do"
)]

use std::io::{self, IsTerminal, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// The terminal on stdin, in raw mode while this lives.
pub(crate) struct RawTerminal {
    saved: libc::termios,
    keeper: Option<Child>,
}

const STDIN: RawFd = libc::STDIN_FILENO;

impl RawTerminal {
    /// Puts stdin into raw mode; `None` if it is not a terminal of which this is the foreground
    /// job.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        // SAFETY: neither call has preconditions.
        let foreground = unsafe { libc::tcgetpgrp(STDIN) };
        // SAFETY: as above.
        if foreground != unsafe { libc::getpgrp() } {
            // A background job that touched the terminal would be stopped by it.
            return Ok(None);
        }
        let saved = get(STDIN)?;
        let keeper = keeper(saved)
            .map_err(|error| log::warn!("nobody stands by to restore the terminal: {error}"))
            .ok();
        let terminal = Self { saved, keeper };
        let mut raw = saved;
        // SAFETY: `raw` is a valid termios.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        // Output keeps its processing: a guest sends its own carriage returns, but what the VMM
        // itself says on stderr must not make stairs.
        raw.c_oflag = saved.c_oflag;
        set(STDIN, &raw)?;
        Ok(Some(terminal))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Err(error) = set(STDIN, &self.saved) {
            log::warn!("cannot restore the terminal: {error}");
        }
        if let Some(keeper) = &mut self.keeper {
            // Closing its stdin tells the keeper that the VMM is gone; it restores once more.
            drop(keeper.stdin.take());
            let _ = keeper.wait();
        }
    }
}

fn get(fd: RawFd) -> io::Result<libc::termios> {
    // SAFETY: zeroed is a valid termios, which tcgetattr overwrites.
    let mut termios: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: `termios` is valid for writes.
    if unsafe { libc::tcgetattr(fd, &raw mut termios) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(termios)
}

fn set(fd: RawFd, termios: &libc::termios) -> io::Result<()> {
    // SAFETY: `termios` is valid for reads.
    if unsafe { libc::tcsetattr(fd, libc::TCSANOW, termios) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Starts this program again as the keeper: it reads its stdin, a pipe from the VMM, to the end,
/// then restores the terminal, which it has as its stderr. It runs in the VMM's process group but
/// ignores what the terminal and a shell send to it.
fn keeper(saved: libc::termios) -> io::Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("testudo-vmm: terminal")
        .args(["keep-terminal", &encode(&saved)])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::from(
            std::os::fd::AsFd::as_fd(&io::stdin()).try_clone_to_owned()?,
        ));
    // SAFETY: the closure only calls signal(2), which is async-signal-safe.
    unsafe { command.pre_exec(ignore_ending_signals) };
    command.spawn()
}

/// Runs between fork and exec.
fn ignore_ending_signals() -> io::Result<()> {
    use libc::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGTTOU};
    for signal in [SIGINT, SIGQUIT, SIGHUP, SIGTERM, SIGTTOU, SIGTSTP] {
        // SAFETY: ignoring a signal runs no handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    Ok(())
}

/// What the keeper does; `saved` is what [`encode`] wrote.
pub fn keep_terminal(saved: &str) -> io::Result<()> {
    let saved = decode(saved).ok_or(io::ErrorKind::InvalidInput)?;
    let _ = io::stdin().read_to_end(&mut Vec::new());
    set(io::stderr().as_raw_fd(), &saved)
}

fn encode(termios: &libc::termios) -> String {
    let flags = [
        termios.c_iflag,
        termios.c_oflag,
        termios.c_cflag,
        termios.c_lflag,
    ];
    let words = flags.iter().map(|f| format!("{f:x}"));
    let chars = termios.c_cc.iter().map(|c| format!("{c:x}"));
    words.chain(chars).collect::<Vec<_>>().join(",")
}

fn decode(text: &str) -> Option<libc::termios> {
    let mut words = text.split(',').map(|w| u32::from_str_radix(w, 16).ok());
    let mut word = || words.next().flatten();
    let mut termios = get(libc::STDERR_FILENO).ok()?;
    termios.c_iflag = word()?;
    termios.c_oflag = word()?;
    termios.c_cflag = word()?;
    termios.c_lflag = word()?;
    for c in &mut termios.c_cc {
        *c = u8::try_from(word()?).ok()?;
    }
    Some(termios)
}
