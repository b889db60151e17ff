//! The C library's allocator, before there are threads.
#![expect(unsafe_code, reason = "mallopt")]

/// Heaps that threads share; as many as the allocator makes without looking at the machine.
const ARENAS: libc::c_int = 8;

/// Fixes the number of heaps. Otherwise the allocator asks how many CPUs there are when a ninth
/// thread comes: glibc opens a file in `/sys` for that, in whatever thread it is, and a system call
/// filter ends the process.
pub fn fix_arenas() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes two integers; called before other threads exist.
    if unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) } == 0 {
        log::debug!("the allocator takes no limit of heaps");
    }
}
