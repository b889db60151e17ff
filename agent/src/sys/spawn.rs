//! Starting a program without copying the agent: `posix_spawn`, which shares memory with the child until
//! it executes. `std::process` would do as much, but waits for a child whose program is missing, and the
//! agent's loop reaps every child there is.
#![expect(unsafe_code, reason = "posix_spawn and its attributes are C's")]

use std::ffi::{CStr, CString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use rustix::process::Pid;

/// A program to start.
pub(crate) struct Spawn<'a> {
    pub(crate) program: &'a CStr,
    pub(crate) args: &'a [CString],
    pub(crate) env: &'a [CString],
    /// What becomes descriptors 0, 1, 2 and so on; nothing else is inherited, given that all of the
    /// agent's descriptors are close-on-exec.
    pub(crate) fds: &'a [BorrowedFd<'a>],
}

/// Undoes `posix_spawn_file_actions_init`.
struct Actions(libc::posix_spawn_file_actions_t);

impl Drop for Actions {
    fn drop(&mut self) {
        // SAFETY: initialised by Actions::new, destroyed once.
        unsafe { libc::posix_spawn_file_actions_destroy(&raw mut self.0) };
    }
}

impl Actions {
    fn new() -> io::Result<Self> {
        let mut actions = MaybeUninit::uninit();
        // SAFETY: the pointer is to memory of that type, which the call initialises.
        checked(unsafe { libc::posix_spawn_file_actions_init(actions.as_mut_ptr()) })?;
        // SAFETY: initialised by the call above, which succeeded.
        Ok(Self(unsafe { actions.assume_init() }))
    }

    fn dup(&mut self, from: i32, to: i32) -> io::Result<()> {
        // SAFETY: initialised; the numbers are only numbers until the child uses them.
        checked(unsafe { libc::posix_spawn_file_actions_adddup2(&raw mut self.0, from, to) })
    }
}

/// Undoes `posix_spawnattr_init`.
struct Attributes(libc::posix_spawnattr_t);

impl Drop for Attributes {
    fn drop(&mut self) {
        // SAFETY: initialised by Attributes::new, destroyed once.
        unsafe { libc::posix_spawnattr_destroy(&raw mut self.0) };
    }
}

impl Attributes {
    /// No signal blocked, every signal as by default.
    fn new() -> io::Result<Self> {
        let mut attributes = MaybeUninit::uninit();
        // SAFETY: the pointer is to memory of that type, which the call initialises.
        checked(unsafe { libc::posix_spawnattr_init(attributes.as_mut_ptr()) })?;
        // SAFETY: initialised by the call above, which succeeded.
        let mut this = Self(unsafe { attributes.assume_init() });
        let (mut none, mut all) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        // SAFETY: the pointer is to memory of that type, which the call initialises.
        unsafe { libc::sigemptyset(none.as_mut_ptr()) };
        // SAFETY: as above.
        unsafe { libc::sigfillset(all.as_mut_ptr()) };
        // SAFETY: both are initialised.
        checked(unsafe { libc::posix_spawnattr_setsigmask(&raw mut this.0, none.as_ptr()) })?;
        // SAFETY: both are initialised.
        checked(unsafe { libc::posix_spawnattr_setsigdefault(&raw mut this.0, all.as_ptr()) })?;
        let flags = libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF;
        let flags = libc::c_short::try_from(flags).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: initialised.
        checked(unsafe { libc::posix_spawnattr_setflags(&raw mut this.0, flags) })?;
        Ok(this)
    }
}

fn checked(code: i32) -> io::Result<()> {
    match code {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

fn pointers(strings: &[CString]) -> Vec<*mut libc::c_char> {
    let each = strings.iter().map(|s| s.as_ptr().cast_mut());
    each.chain([ptr::null_mut()]).collect()
}

/// Starts it. The child is the caller's to reap.
pub(crate) fn spawn(what: &Spawn<'_>) -> io::Result<Pid> {
    let mut actions = Actions::new()?;
    // First above all targets, so that no target is a source still needed; what is dup'ed onto itself
    // would keep its close-on-exec flag.
    let high = 100;
    for (fd, at) in what.fds.iter().zip(high..) {
        actions.dup(fd.as_raw_fd(), at)?;
    }
    for (from, to) in (high..).zip(0..).take(what.fds.len()) {
        actions.dup(from, to)?;
    }
    for (_, at) in what.fds.iter().zip(high..) {
        // SAFETY: initialised; the child closes its own copy.
        checked(unsafe { libc::posix_spawn_file_actions_addclose(&raw mut actions.0, at) })?;
    }
    let attributes = Attributes::new()?;
    let (args, env) = (pointers(what.args), pointers(what.env));
    let mut pid = 0;
    // SAFETY: program, arguments and environment are NUL-terminated strings in arrays that end with a null
    // pointer, all alive during the call and only read; actions and attributes are initialised.
    checked(unsafe {
        libc::posix_spawn(
            &raw mut pid,
            what.program.as_ptr(),
            &raw const actions.0,
            &raw const attributes.0,
            args.as_ptr(),
            env.as_ptr(),
        )
    })?;
    Pid::from_raw(pid).ok_or_else(|| io::Error::other("posix_spawn gave no process"))
}
