//! Memory of the agent itself.
#![cfg_attr(target_env = "gnu", expect(unsafe_code, reason = "mallopt is C's"))]

/// One heap for all threads, given back when it is free: jobs' threads come and go.
pub(crate) fn small_heap() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [(libc::M_ARENA_MAX, 1), (libc::M_TRIM_THRESHOLD, 64 * 1024)] {
        // SAFETY: numbers go in; called before there is a second thread.
        unsafe { libc::mallopt(parameter, value) };
    }
}
