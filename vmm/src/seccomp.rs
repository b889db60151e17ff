//! System call filters, one for each kind of thread.
//!
//! The profiles are data: `seccomp/{ctl,io,vcpu}.json` in the source tree, compiled to BPF when the
//! VMM is built. Each thread applies its own as the first thing it does; the control thread
//! applies its own when everything is built, before it hears anything of the guest. Filters add up:
//! a thread that the control thread starts later has to pass both.
#![expect(unsafe_code, reason = "prctl and seccomp")]

use std::io;

use thiserror::Error;

use crate::spec::Seccomp;

/// Code, jump-true, jump-false, operand: `struct sock_filter`.
type Instruction = (u16, u8, u8, u32);

mod compiled {
    use super::Instruction;
    include!(concat!(env!("OUT_DIR"), "/seccomp.rs"));
}

/// Kinds of thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// Owns the machine.
    Ctl,
    /// Serves console and device queues.
    Io,
    /// Runs a vCPU.
    Vcpu,
}

/// A filter could not be applied.
#[derive(Debug, Error)]
#[error(
    "cannot apply the system call filter of a {thread:?} thread; does the host kernel have CONFIG_SECCOMP_FILTER? (--seccomp off runs without)"
)]
pub struct SeccompError {
    thread: ThreadKind,
    #[source]
    source: io::Error,
}

impl ThreadKind {
    fn program(self, mode: Seccomp) -> Option<&'static [Instruction]> {
        match (self, mode) {
            (_, Seccomp::Off) => None,
            (Self::Ctl, Seccomp::Kill) => Some(&compiled::CTL_KILL_PROCESS),
            (Self::Io, Seccomp::Kill) => Some(&compiled::IO_KILL_PROCESS),
            (Self::Vcpu, Seccomp::Kill) => Some(&compiled::VCPU_KILL_PROCESS),
            (Self::Ctl, Seccomp::Log) => Some(&compiled::CTL_LOG),
            (Self::Io, Seccomp::Log) => Some(&compiled::IO_LOG),
            (Self::Vcpu, Seccomp::Log) => Some(&compiled::VCPU_LOG),
        }
    }

    /// The kind a word names.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "ctl" => Some(Self::Ctl),
            "io" => Some(Self::Io),
            "vcpu" => Some(Self::Vcpu),
            _ => None,
        }
    }
}

/// Restricts the calling thread, for good.
pub fn apply(thread: ThreadKind, mode: Seccomp) -> Result<(), SeccompError> {
    let error = |source| SeccompError { thread, source };
    let Some(program) = thread.program(mode) else {
        return Ok(());
    };
    let program: Vec<libc::sock_filter> = program
        .iter()
        .map(|&(code, jt, jf, k)| libc::sock_filter { code, jt, jf, k })
        .collect();
    let len = u16::try_from(program.len()).map_err(|_| error(io::ErrorKind::InvalidData.into()))?;
    let filter = libc::sock_fprog {
        len,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: PR_SET_NO_NEW_PRIVS takes integers.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } < 0 {
        return Err(error(io::Error::last_os_error()));
    }
    // SAFETY: `filter` describes `program`, which the kernel copies before the call returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const filter,
        )
    };
    if result < 0 {
        return Err(error(io::Error::last_os_error()));
    }
    Ok(())
}

/// Applies the filter of `thread` and makes a call it does not list. Does not come back on a host
/// where filters work.
pub fn probe(thread: ThreadKind) -> Result<(), SeccompError> {
    apply(thread, Seccomp::Kill)?;
    // SAFETY: chroot to a path that cannot be: harmless if it is let through.
    unsafe { libc::chroot(c"/nonexistent/testudo".as_ptr()) };
    Ok(())
}
