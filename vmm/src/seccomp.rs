//! System call filters, one for each kind of thread.
//!
//! The profiles are data: `seccomp/*.json` in the source tree, each named after its kind of thread,
//! compiled to BPF when the VMM is built (`build/tree.rs`). Each thread applies its own as the first thing it does; the control thread
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
    /// Serves a shared folder.
    pub const FS: Self = Self("fs");
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
    use std::collections::BTreeSet;

    use super::*;

    /// As seccompiler makes them.
    mod linear {
        use super::super::{Instruction, Profile};
        include!(concat!(env!("OUT_DIR"), "/seccomp_linear.rs"));
    }

    /// `struct seccomp_data`: number, architecture, instruction pointer, arguments.
    struct Call {
        number: u32,
        architecture: u32,
        arguments: [u64; 6],
    }

    impl Call {
        fn word(&self, offset: u32) -> u32 {
            let at = |n: u64| u32::try_from(n & 0xffff_ffff).unwrap();
            match offset {
                0 => self.number,
                4 => self.architecture,
                16..64 => {
                    let argument = self.arguments[usize::try_from((offset - 16) / 8).unwrap()];
                    at(if offset.is_multiple_of(8) {
                        argument
                    } else {
                        argument >> 32
                    })
                }
                _ => panic!("a filter does not look at {offset}"),
            }
        }
    }

    /// What `program` decides, and how many instructions that takes (Linux, filter.rst).
    fn run(program: &[Instruction], call: &Call) -> (u32, usize) {
        let (mut at, mut a, mut steps) = (0, 0, 0);
        loop {
            let (code, jt, jf, k) = program[at];
            steps += 1;
            at += 1;
            let taken = match code {
                0x20 => {
                    a = call.word(k);
                    continue;
                }
                0x54 => {
                    a &= k;
                    continue;
                }
                0x06 => return (k, steps),
                0x05 => {
                    at += usize::try_from(k).unwrap();
                    continue;
                }
                0x15 => a == k,
                0x25 => a > k,
                0x35 => a >= k,
                _ => panic!("instruction {code:#x}"),
            };
            at += usize::from(if taken { jt } else { jf });
        }
    }

    /// The architecture that the programs accept.
    fn architecture(program: &[Instruction]) -> u32 {
        program[1].3
    }

    #[test]
    fn searching_filters_decide_as_linear_ones() {
        for (fast, slow) in compiled::PROFILES.iter().zip(linear::PROFILES) {
            assert_eq!(fast.name, slow.name);
            for (fast, slow) in [(fast.kill_process, slow.kill_process), (fast.log, slow.log)] {
                assert!(fast.len() < slow.len());
                // All values that a program compares with, and their neighbours.
                let interesting: BTreeSet<u64> = slow
                    .iter()
                    .flat_map(|&(.., k)| [k.wrapping_sub(1), k, k.wrapping_add(1), !k])
                    .flat_map(|k| [u64::from(k), u64::from(k) | 1 << 32])
                    .collect();
                let native = architecture(slow);
                let numbers = (0..600).chain([0x3fff_ffff, 0x4000_0000, 0x4000_0010, u32::MAX]);
                for number in numbers {
                    let check = |architecture, arguments| {
                        let call = Call {
                            number,
                            architecture,
                            arguments,
                        };
                        let (decision, expected) = (run(fast, &call).0, run(slow, &call).0);
                        assert_eq!(decision, expected, "{number} {arguments:x?}");
                    };
                    check(native ^ 1, [0; 6]);
                    for value in &interesting {
                        check(native, [*value; 6]);
                    }
                    for place in 0..6 {
                        let mut arguments = [0; 6];
                        for value in [1, 2, 4, 5, 7, u64::MAX] {
                            arguments[place] = value;
                            check(native, arguments);
                        }
                    }
                }
            }
        }
    }

    /// What the kernel does for every number when a filter is installed.
    #[test]
    fn searching_filters_take_few_steps() {
        for (fast, slow) in compiled::PROFILES.iter().zip(linear::PROFILES) {
            let steps = |program: &[Instruction]| -> usize {
                let all = (0..450).map(|number| {
                    let call = Call {
                        number,
                        architecture: architecture(program),
                        arguments: [0; 6],
                    };
                    run(program, &call).1
                });
                all.sum()
            };
            let (fast_steps, slow_steps) = (steps(fast.kill_process), steps(slow.kill_process));
            println!(
                "{}: {} instructions, {fast_steps} steps for all numbers; linear {}, {slow_steps}",
                fast.name,
                fast.kill_process.len(),
                slow.kill_process.len()
            );
            assert!(fast_steps * 4 < slow_steps, "{}", fast.name);
        }
    }

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
