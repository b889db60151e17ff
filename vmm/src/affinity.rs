//! Binding a thread to host CPUs.
#![expect(unsafe_code, reason = "sched_setaffinity")]

use std::io;

use crate::spec::CpuList;

/// Lets the calling thread run on `cpus` only.
pub(crate) fn bind_this_thread(cpus: &CpuList) -> io::Result<()> {
    // SAFETY: an all-zero cpu_set_t is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for cpu in cpus.iter().filter_map(|c| usize::try_from(c).ok()) {
        // SAFETY: a CpuList holds no number that a cpu_set_t has no bit for.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    // SAFETY: `set` is valid; 0 is the calling thread.
    if unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) } < 0 {
        let error = io::Error::last_os_error();
        return Err(io::Error::new(
            error.kind(),
            format!("cannot bind to host CPUs {cpus}: {error}"),
        ));
    }
    Ok(())
}
