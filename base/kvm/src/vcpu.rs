//! One vCPU and what comes out of running it.
#![expect(
    unsafe_code,
    reason = "reads the union in the run page that an exit reason selects"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use testudo_bus::Bus;
use thiserror::Error;

use crate::kick::Kick;

/// Why `run` came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// An access was answered; run again.
    Handled,
    /// A write to memory that nobody took: read-only memory, or none at all. Run again.
    Ignored,
    /// Kicked or interrupted by a signal: look for orders.
    Interrupted,
    /// The guest shut the processor down (triple fault on x86_64) or asked for a reset.
    Reset,
    /// The guest asked the hypervisor to power it off.
    PowerOff,
    /// The guest told the hypervisor that it crashed.
    Crashed,
}

/// The vCPU cannot go on.
#[derive(Debug, Error)]
pub enum RunError {
    /// The ioctl failed.
    #[error("KVM_RUN failed")]
    Host(#[source] io::Error),
    /// The processor refused the guest state.
    #[error("the processor refused to enter the guest (hardware reason {reason:#x})")]
    FailEntry {
        /// Vendor-specific reason.
        reason: u64,
    },
    /// KVM gave up on an instruction or an event.
    #[error("KVM cannot go on emulating the guest (suberror {suberror}, data {data:x?})")]
    Internal {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// What KVM added.
        data: Vec<u64>,
    },
    /// The guest touched memory the host could not provide.
    #[error("the host cannot provide guest memory at {gpa:#x} (+{size:#x})")]
    MemoryFault {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// The same from a host that does not say where.
    #[error("the host cannot provide guest memory that the guest has touched")]
    MemoryGone(#[source] io::Error),
    /// An exit nobody asked for.
    #[error("unexpected KVM exit: {0}")]
    Unexpected(String),
}

impl RunError {
    /// Whether the vCPU could go on if the memory were there.
    pub fn is_of_memory(&self) -> bool {
        matches!(self, Self::MemoryFault { .. } | Self::MemoryGone(_))
    }
}

/// A vCPU. Owned by its thread once that runs.
pub struct Vcpu {
    fd: VcpuFd,
    kick: Kick,
}

impl Vcpu {
    pub(crate) fn new(fd: VcpuFd, run_size: usize) -> io::Result<Self> {
        // SAFETY: `fd` is open for as long as the borrow.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        let kick = Kick::new(borrowed, run_size)?;
        Ok(Self { fd, kick })
    }

    /// The descriptor, for what `arch` sets up.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// A handle by which other threads interrupt this vCPU.
    pub fn kick(&self) -> Kick {
        self.kick.clone()
    }

    /// Makes the calling thread the vCPU's thread. Once, before the first `run`.
    pub fn adopt_this_thread(&self) {
        self.kick.adopt_this_thread();
    }

    /// Forgets kicks so far. Call it before looking for orders, never between that and `run`.
    pub fn clear_kick(&self) {
        self.kick.clear();
    }

    /// Tells the guest's clock that the host had it paused, so that its watchdogs do not take the
    /// gap for a lockup. A guest that does not use such a clock is not told.
    pub fn tell_paused(&self) {
        #[cfg(target_arch = "x86_64")]
        if let Err(error) = self.fd.kvmclock_ctrl() {
            log::debug!("the guest's clock was not told of the pause: {error}");
        }
    }

    /// Runs the guest until something happens, answering port and memory accesses on the buses.
    pub fn run(&mut self, pio: &Bus, mmio: &Bus) -> Result<Exit, RunError> {
        match self.fd.run() {
            Ok(VcpuExit::MmioRead(addr, data)) => {
                mmio.read(addr, data);
                Ok(Exit::Handled)
            }
            Ok(VcpuExit::MmioWrite(addr, data)) => {
                // A read-only memslot exits like a place without memory (KVM api.rst 4.35).
                Ok(if mmio.write(addr, data) {
                    Exit::Handled
                } else {
                    Exit::Ignored
                })
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                let data: *mut [u8] = data;
                let unit = self.io_unit();
                // SAFETY: the slice lies in the run page, which `self` keeps mapped; the borrow of
                // the page in `io_unit` has ended.
                let data = unsafe { &mut *data };
                for item in data.chunks_mut(unit) {
                    pio.read(u64::from(port), item);
                }
                Ok(Exit::Handled)
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                let data: *const [u8] = data;
                let unit = self.io_unit();
                // SAFETY: as above.
                let data = unsafe { &*data };
                for item in data.chunks(unit) {
                    pio.write(u64::from(port), item);
                }
                Ok(Exit::Handled)
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => Ok(Exit::Interrupted),
            Ok(VcpuExit::Shutdown) => Ok(Exit::Reset),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => Ok(Exit::Reset),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => Ok(Exit::PowerOff),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => Ok(Exit::Crashed),
            Ok(VcpuExit::FailEntry(reason, _)) => Err(RunError::FailEntry { reason }),
            Ok(VcpuExit::InternalError) => Err(self.internal_error()),
            Ok(VcpuExit::MemoryFault { gpa, size, .. }) => Err(RunError::MemoryFault { gpa, size }),
            Ok(other) => Err(RunError::Unexpected(format!("{other:?}"))),
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {
                Ok(Exit::Interrupted)
            }
            Err(e) if e.errno() == libc::EFAULT => Err(RunError::MemoryGone(e.into())),
            Err(e) => Err(RunError::Host(e.into())),
        }
    }

    /// Width of one item of a port access: string instructions bring several in one exit.
    fn io_unit(&mut self) -> usize {
        // SAFETY: called for KVM_EXIT_IO alone, which selects this member.
        let io = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io };
        usize::from(io.size).max(1)
    }

    fn internal_error(&mut self) -> RunError {
        // SAFETY: called for KVM_EXIT_INTERNAL_ERROR alone, which selects this member.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let count = usize::try_from(internal.ndata).unwrap_or(0);
        RunError::Internal {
            suberror: internal.suberror,
            data: internal.data.iter().take(count).copied().collect(),
        }
    }
}
