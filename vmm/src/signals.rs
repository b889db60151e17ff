//! Signals that end the VM, and the one that says that the terminal has another size, as a descriptor
//! the control thread reads.
#![expect(unsafe_code, reason = "sigprocmask and signalfd")]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

/// Signals by which somebody asks the VMM to end.
const ENDING: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// The terminal has another size.
pub(crate) const WINDOW_CHANGED: u32 = libc::SIGWINCH.unsigned_abs();

/// A signalfd of all of them, which are blocked in the calling thread and in every thread
/// it starts from now on.
pub(crate) struct EndingSignals {
    file: File,
}

impl EndingSignals {
    /// Blocks the signals. Before any other thread exists.
    pub(crate) fn block() -> io::Result<Self> {
        // SAFETY: zeroed is a valid sigset_t for sigemptyset to initialise.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: `set` is valid.
        unsafe { libc::sigemptyset(&raw mut set) };
        for signal in ENDING.into_iter().chain([libc::SIGWINCH]) {
            // SAFETY: `set` is initialised and the signals exist.
            unsafe { libc::sigaddset(&raw mut set, signal) };
        }
        // SAFETY: `set` is initialised; the old mask is not asked for.
        if unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) }
            != 0
        {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `set` is initialised.
        let fd =
            unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            // SAFETY: signalfd returned a new descriptor that nobody else owns.
            file: unsafe { File::from_raw_fd(fd) },
        })
    }

    /// Number of the signal that waits, if one does.
    pub(crate) fn take(&mut self) -> Option<u32> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        self.file.read_exact(&mut info).ok()?;
        // ssi_signo is the first field (signalfd(2)).
        info.first_chunk().map(|n| u32::from_ne_bytes(*n))
    }
}

impl AsRawFd for EndingSignals {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}
