//! Signals by descriptor.
#![expect(unsafe_code, reason = "signal sets and signalfd are C's")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd};

/// Blocks these signals in this thread and those it starts, and gives a descriptor to read them from.
pub(crate) fn descriptor(signals: &[i32]) -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: the pointer is to memory of that type, which the call initialises.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    for signal in signals {
        // SAFETY: initialised above; an unknown number is an error, not a fault.
        if unsafe { libc::sigaddset(set.as_mut_ptr(), *signal) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: the set is initialised and only read; the old mask is not asked for.
    if unsafe { libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the set is initialised and only read.
    let fd = unsafe { libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Size of what a signalfd gives for each signal; its number is the first `u32`.
pub(crate) const RECORD: usize = 128;

/// Sends any signal there is, real-time ones too.
pub(crate) fn kill(pid: rustix::process::Pid, number: i32) -> io::Result<()> {
    // SAFETY: numbers go in; the process is somebody else.
    if unsafe { libc::kill(pid.as_raw_nonzero().get(), number) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
