//! What no safe wrapper has: signals by descriptor, inherited descriptors, children that die with us.
#![expect(
    unsafe_code,
    reason = "signal sets, inherited descriptors and what a child does before exec are C's"
)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

/// Blocks these signals in this thread and those it starts, and gives a descriptor to read them from.
pub(crate) fn signals(numbers: &[i32]) -> io::Result<OwnedFd> {
    let set = signal_set(numbers)?;
    // SAFETY: the set is initialised and only read; the old mask is not asked for.
    if unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the set is initialised and only read.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn signal_set(numbers: &[i32]) -> io::Result<libc::sigset_t> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: the pointer is to memory of that type, which the call initialises.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    for number in numbers {
        // SAFETY: initialised above; an unknown number is an error, not a fault.
        if unsafe { libc::sigaddset(set.as_mut_ptr(), *number) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: initialised above.
    Ok(unsafe { set.assume_init() })
}

/// The next signal that waits in a descriptor of [`signals`].
pub(crate) fn next_signal(fd: &OwnedFd) -> Option<i32> {
    let mut record = [0; size_of::<libc::signalfd_siginfo>()];
    let length = rustix::io::read(fd, &mut record).ok()?;
    let number = record.get(..length)?.first_chunk()?;
    i32::try_from(u32::from_ne_bytes(*number)).ok()
}

/// A descriptor that this program was started with for its own use.
///
/// To be called once for each, first in `main`: that is when nobody else can have it.
pub(crate) fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: asks about a number; an unknown one is an error.
    if fd <= 2 || unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(io::Error::other(format!("{fd} is no inherited descriptor")));
    }
    // SAFETY: open, as the call above has shown, and the starter's promise is that it is for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// One heap for all threads: they do little, and each heap is memory.
pub(crate) fn one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes two integers; called before other threads exist.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Starts a program that the kernel kills when the calling thread ends, however it ends.
pub(crate) fn spawn_mortal(command: &mut Command) -> io::Result<Child> {
    let parent = rustix::process::getpid();
    let before = move || {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        if rustix::process::getppid() != Some(parent) {
            // It died before the line above.
            return Err(io::ErrorKind::NotFound.into());
        }
        unblock()
    };
    // SAFETY: between fork and exec it makes system calls and allocates nothing.
    unsafe { command.pre_exec(before) };
    command.spawn()
}

/// A new program starts with no signal blocked.
fn unblock() -> io::Result<()> {
    let set = signal_set(&[])?;
    // SAFETY: the set is initialised and only read; the old mask is not asked for.
    if unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
