//! The debug port: one byte that every VMM can see leave the guest.
#![expect(
    unsafe_code,
    reason = "port I/O is an instruction, and a system call to be allowed it"
)]

use std::io;

/// The POST code port.
const DEBUG_PORT: u16 = 0x80;
/// "init runs", to whoever measures the boot.
pub(crate) const BOOT_MARK: u8 = 0x41;

/// Writes one byte to port 0x80. Fails with EPERM or ENOSYS in a kernel without `ioperm`.
pub(crate) fn write_debug_port(value: u8) -> io::Result<()> {
    // SAFETY: ioperm(2) takes plain numbers and touches no memory of ours.
    if unsafe { libc::ioperm(libc::c_ulong::from(DEBUG_PORT), 1, 1) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the port was opened to this thread above, so `out` cannot fault; it changes no memory,
    // no flag and no register, and nothing but the VMM listens on this port.
    unsafe {
        core::arch::asm!("out dx, al", in("dx") DEBUG_PORT, in("al") value, options(nomem, nostack, preserves_flags));
    }
    Ok(())
}
