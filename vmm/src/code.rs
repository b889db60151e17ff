//! The VMM's own code in memory.
//!
//! Most of it runs once: flags, configuration, planning, loading a kernel. What of it was read in is
//! in the page cache, where it can stay; but each page that is mapped counts as this process's, and
//! a guest that runs needs a few of them. So they are unmapped once, when the guest has begun, and
//! what is needed again comes back by a minor fault.
#![expect(
    unsafe_code,
    reason = "the linker's symbols, and madvise of what is between them"
)]

use std::io;

const PAGE: usize = 4096;

unsafe extern "C" {
    /// The linker's: the first byte of the program in memory.
    static __executable_start: u8;
    /// The linker's: the first byte behind its code.
    static etext: u8;
}

/// Unmaps the program's code and constants; the next access maps them again.
pub(crate) fn unmap() -> io::Result<()> {
    let start = (&raw const __executable_start).addr();
    let end = (&raw const etext).addr();
    let start = start.next_multiple_of(PAGE);
    let Some(len) = (end & !(PAGE - 1)).checked_sub(start) else {
        return Ok(());
    };
    let at = std::ptr::with_exposed_provenance_mut(start);
    // SAFETY: from its first byte to the end of its code the program is a private mapping of its
    // file, read-only and as it is in the file (relocations lie behind, in data), so a page that is
    // dropped comes back with the same content.
    if unsafe { libc::madvise(at, len, libc::MADV_DONTNEED) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_goes_on_with_code_that_was_unmapped() {
        let before: Vec<String> = (0..100).map(|n| format!("{n:#x}")).collect();
        unmap().unwrap();
        let after: Vec<String> = (0..100).map(|n| format!("{n:#x}")).collect();
        assert_eq!(before, after);
    }
}
