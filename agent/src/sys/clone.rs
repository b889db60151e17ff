//! A sibling: a child of this process's parent, with a copy of this process's memory.
#![expect(unsafe_code, reason = "clone(2) returns twice")]

use std::io;

use rustix::process::Pid;

/// Who returns from [`sibling`].
pub(crate) enum Who {
    /// The process that called; the sibling's number as this process's PID namespace counts.
    Caller(Pid),
    /// The new one.
    Sibling,
}

/// Clones. The caller must be single-threaded, which stages are: no lock is held by a thread that the
/// sibling lacks.
pub(crate) fn sibling() -> io::Result<Who> {
    let flags = libc::CLONE_PARENT | libc::SIGCHLD;
    // SAFETY: without CLONE_VM and with no stack given this is fork(2): the sibling goes on here on a copy
    // of the stack. No thread-local pointers are asked for.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match i32::try_from(pid).ok().map(Pid::from_raw) {
        Some(Some(pid)) if pid.as_raw_nonzero().get() > 0 => Ok(Who::Caller(pid)),
        Some(None) => Ok(Who::Sibling),
        _ => Err(io::Error::last_os_error()),
    }
}
