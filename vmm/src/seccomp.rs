//! System call filters, one for each kind of thread.
//!
//! The profiles are data: `seccomp/*.json` in the source tree, each named after its kind of thread, compiled to BPF when the
//! VMM is built. Each thread applies its own as the first thing it does; the control thread
//! applies its own when everything is built, before it hears anything of the guest. Filters add up:
//! a thread that the control thread starts later has to pass both.
#![expect(unsafe_code, reason = "prctl and seccomp")]

use std::{fmt, io};

use thiserror::Error;

use crate::spec::Seccomp;

/// Code, jump-true, jump-false, operand: `struct sock_filter`.
type Instruction = (u16, u8, u8, u32);

mod compiled {
    use super::{Instruction, Profile};
    include!(concat!(env!("OUT_DIR"), "/seccomp.rs"));
}

/// One kind of thread and its filter in both modes.
struct Profile {
    name: &'static str,
    kill_process: &'static [Instruction],
    log: &'static [Instruction],
}

/// A kind of thread: the name of its profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThreadKind(&'static str);

impl ThreadKind {
    /// Owns the machine.
    pub const CTL: Self = Self("ctl");
    /// Serves console and device queues.
    pub const IO: Self = Self("io");
    /// Flushes the file of a pmem device.
    pub const PMEM: Self = Self("pmem");
    /// Talks to a vhost-user back-end.
    pub const VHOST_USER: Self = Self("vhost-user");
    /// Runs a vCPU.
    pub const VCPU: Self = Self("vcpu");
    /// Serves a queue pair of a network device.
    pub const NET: Self = Self("net");
    /// Serves a disk.
    pub const BLK: Self = Self("blk");
    /// Serves the sockets between guest and host.
    pub const VSOCK: Self = Self("vsock");
}

/// A filter could not be applied.
#[derive(Debug, Error)]
#[error(
    "cannot apply the system call filter of a {thread} thread; does the host kernel have CONFIG_SECCOMP_FILTER? (--seccomp off runs without)"
)]
pub struct SeccompError {
    thread: ThreadKind,
    #[source]
    source: io::Error,
}

impl ThreadKind {
    fn profile(self) -> Option<&'static Profile> {
        compiled::PROFILES.iter().find(|p| p.name == self.0)
    }

    /// The kind a word names.
    pub fn from_name(name: &str) -> Option<Self> {
        let profile = compiled::PROFILES.iter().find(|p| p.name == name);
        profile.map(|p| Self(p.name))
    }

    /// All kinds there are.
    pub fn all() -> impl Iterator<Item = Self> {
        compiled::PROFILES.iter().map(|p| Self(p.name))
    }
}

impl fmt::Display for ThreadKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// Restricts the calling thread, for good.
pub fn apply(thread: ThreadKind, mode: Seccomp) -> Result<(), SeccompError> {
    let error = |source| SeccompError { thread, source };
    let profile = || {
        let missing = || error(io::Error::other("there is no profile of that name"));
        thread.profile().ok_or_else(missing)
    };
    let program = match mode {
        Seccomp::Off => return Ok(()),
        Seccomp::Kill => profile()?.kill_process,
        Seccomp::Log => profile()?.log,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_profile() {
        for kind in [
            ThreadKind::CTL,
            ThreadKind::IO,
            ThreadKind::VCPU,
            ThreadKind::BLK,
            ThreadKind::PMEM,
            ThreadKind::VSOCK,
            ThreadKind::VHOST_USER,
        ] {
            assert!(kind.profile().is_some(), "{kind}");
        }
        assert_eq!(ThreadKind::from_name("io"), Some(ThreadKind::IO));
        assert_eq!(ThreadKind::from_name("cat"), None);
    }
}
