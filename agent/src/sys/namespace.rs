//! Leaving namespaces. A stage has one thread, so that the process changes as a whole.
#![expect(
    unsafe_code,
    reason = "rustix leaves it to the caller that no other thread minds"
)]

use rustix::thread::UnshareFlags;

/// Gives this process new namespaces.
pub(crate) fn unshare(flags: UnshareFlags) -> rustix::io::Result<()> {
    // SAFETY: unsound only with CLONE_FILES, when another thread uses a descriptor that this thread then
    // closes; stages have one thread and never pass it.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}
