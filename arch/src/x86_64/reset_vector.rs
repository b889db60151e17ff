//! Code where a PC's firmware starts.
//!
//! A Linux kernel with EFI support takes a hardware-reduced machine for an EFI one and, when
//! asked to reboot, finds no EFI and jumps to the BIOS reset vector in real mode (`BOOT_EFI`, then
//! `BOOT_BIOS`, in its `arch/x86/kernel/reboot.c`). There is no BIOS: what stands there instead
//! writes to the reset register.

use super::layout::{RESET_VALUE, RESET_VECTOR, port};
use crate::GuestBlob;

/// 16-bit code: reset the machine; should it still run, halt for good.
pub(super) fn blob() -> GuestBlob {
    let [low, high] = port::RESET.to_le_bytes();
    let code = [
        0xba,
        low,
        high, // mov dx, RESET
        0xb0,
        RESET_VALUE, // mov al, RESET_VALUE
        0xee,        // out dx, al
        0xf4,        // hlt
        0xeb,
        0xfd, // jmp back to hlt
    ];
    GuestBlob {
        name: "reset vector",
        gpa: RESET_VECTOR,
        bytes: code.to_vec(),
    }
}
