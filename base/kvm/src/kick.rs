//! Getting a vCPU thread out of `KVM_RUN`, without a race.
//!
//! The kicker first sets `immediate_exit` in the vCPU's run page, then signals the thread. If the
//! thread is in the guest, the signal brings it out; if it is about to enter, the flag makes
//! `KVM_RUN` return at once. The thread clears the flag *before* it looks for orders, so an order
//! posted before a kick is never overlooked.
#![expect(unsafe_code, reason = "maps the run page a second time; tgkill")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};

use kvm_bindings::kvm_run;

/// The signal that interrupts `KVM_RUN`; its handler does nothing.
fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

/// Installs the handler that makes the kick signal harmless. Once per process, before any vCPU
/// thread exists.
pub fn install_kick_handler() -> io::Result<()> {
    extern "C" fn nothing(_: i32) {}
    // SAFETY: zeroed is a valid `sigaction`: no flags (in particular no SA_RESTART), empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(i32) = nothing;
    action.sa_sigaction = handler as libc::sighandler_t;
    // SAFETY: `action` is initialised and its handler is async-signal-safe: it does nothing.
    let result = unsafe { libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A second mapping of a vCPU's run page, so that a kick cannot outlive what it writes to.
struct RunPage {
    addr: *mut libc::c_void,
    len: usize,
}

// SAFETY: the mapping is process-wide and only its `immediate_exit` byte is accessed, atomically.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    fn immediate_exit(&self) -> &AtomicU8 {
        let offset = std::mem::offset_of!(kvm_run, immediate_exit);
        // SAFETY: `immediate_exit` lies within the run page, whose length KVM itself gave.
        let byte = unsafe { self.addr.cast::<u8>().add(offset) };
        // SAFETY: the page stays mapped while `self` lives; the kernel reads the byte, this
        // process accesses it only atomically.
        unsafe { AtomicU8::from_ptr(byte) }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is this struct's own and no reference into it is left.
        unsafe { libc::munmap(self.addr, self.len) };
    }
}

/// Interrupts one vCPU. Cheap to clone, usable from any thread, before, during and after the
/// vCPU's thread.
#[derive(Clone)]
pub struct Kick {
    page: Arc<RunPage>,
    thread: Arc<AtomicI32>,
}

impl Kick {
    pub(crate) fn new(vcpu: BorrowedFd<'_>, run_size: usize) -> io::Result<Self> {
        // SAFETY: a new shared mapping at an address of the kernel's choice.
        let addr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                run_size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if addr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            page: Arc::new(RunPage {
                addr,
                len: run_size,
            }),
            thread: Arc::default(),
        })
    }

    /// Makes the calling thread the one to signal.
    pub(crate) fn adopt_this_thread(&self) {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        self.thread.store(tid, Ordering::SeqCst);
    }

    /// Clears the flag; whatever was posted before a kick that this overwrites is visible to the
    /// caller afterwards.
    pub(crate) fn clear(&self) {
        self.page.immediate_exit().swap(0, Ordering::SeqCst);
    }

    /// Brings the vCPU out of the guest, or keeps it from entering once.
    pub fn kick(&self) {
        self.page.immediate_exit().store(1, Ordering::SeqCst);
        let tid = self.thread.load(Ordering::SeqCst);
        if tid != 0 {
            let process = std::process::id();
            // SAFETY: tgkill has no memory preconditions; a thread that is gone answers ESRCH.
            unsafe { libc::syscall(libc::SYS_tgkill, process, tid, kick_signal()) };
        }
    }
}
