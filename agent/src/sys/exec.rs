//! What a process does just before it is another program.
#![expect(unsafe_code, reason = "execve, close_range and signal dispositions")]

use std::ffi::{CStr, CString};
use std::io;

/// Marks every descriptor from this one on to be closed by the next execution.
pub(crate) fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: close_range(2) with CLOSE_RANGE_CLOEXEC closes nothing now: no descriptor that somebody owns
    // becomes invalid.
    let done = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Rust programs ignore SIGPIPE, and what is ignored stays so over an execution.
pub(crate) fn default_sigpipe() {
    // SAFETY: installs no handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Becomes another program. Returns only why not.
pub(crate) fn execve(program: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |of: &[CString]| -> Vec<*const libc::c_char> {
        let each = of.iter().map(|s| s.as_ptr());
        each.chain([std::ptr::null()]).collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: NUL-terminated strings in arrays that end with a null pointer, alive during the call.
    unsafe { libc::execve(program.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// Puts this process, and all it becomes, under a filter; 8 bytes for each step.
pub(crate) fn filter(program: &[u8], flags: u32) -> io::Result<()> {
    let steps: Vec<libc::sock_filter> = program
        .chunks_exact(8)
        .filter_map(|step| {
            let [c0, c1, jt, jf, k0, k1, k2, k3] = *step.first_chunk::<8>()?;
            Some(libc::sock_filter {
                code: u16::from_ne_bytes([c0, c1]),
                jt,
                jf,
                k: u32::from_ne_bytes([k0, k1, k2, k3]),
            })
        })
        .collect();
    let program = libc::sock_fprog {
        len: libc::c_ushort::try_from(steps.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: steps.as_ptr().cast_mut(),
    };
    // SAFETY: the program points to as many steps as it says, alive during the call, and only read; the
    // kernel checks what they do.
    let done = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
