//! What a device is to a bus.

/// One access by the guest, already resolved to the range of the device that answers it.
///
/// The width is the length of the data slice: 1, 2, 4 or 8 bytes for MMIO and 1, 2 or 4 for port
/// I/O; an access never runs past the end of the range it was mapped with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Offset from the start of the range, in bytes.
    pub offset: u64,
}

/// A device that answers accesses at the offsets of one range.
///
/// Called on a vCPU thread with the slot's lock held. It must not block, must not touch the
/// machine, and must answer every access: what it does not implement reads as it sees fit (the
/// field's custom is all-ones or zero) and swallows writes. `data` holds guest-endian bytes.
pub trait Device: Send {
    /// Answers a read by filling all of `data`.
    fn read(&mut self, at: Access, data: &mut [u8]);
    /// Takes a write of `data`.
    fn write(&mut self, at: Access, data: &[u8]);
}

/// Anything a [`Bus`](crate::Bus) can route an access to, shared between vCPU threads.
///
/// [`Slot`](crate::Slot) implements it by locking; a target with several faces (a PCI function
/// answering for each of its BARs) implements it by locking what the faces share.
pub trait Target: Send + Sync {
    /// Answers a read by filling all of `data`.
    fn read(&self, at: Access, data: &mut [u8]);
    /// Takes a write of `data`.
    fn write(&self, at: Access, data: &[u8]);
}

/// Fills `data` with what a bus returns where nothing answers: all ones.
pub fn fill_absent(data: &mut [u8]) {
    data.fill(0xff);
}
