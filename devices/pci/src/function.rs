//! What a function is to its segment.

use testudo_bus::Access;

use crate::ConfigSpace;

/// One PCI function.
///
/// The segment calls it on vCPU threads, and on the control thread while plugging, always with the
/// function's lock held. It must not block and must not reach for the segment or the machine.
/// `offset` plus `data.len()` never passes the end of configuration space or of the BAR; widths
/// are 1, 2, 4 or 8 bytes, alignment is whatever the guest chose.
pub trait PciFunction: Send {
    /// The registers, from which the segment learns where the BARs are to be.
    fn config(&self) -> &ConfigSpace;

    /// A configuration read. `&mut self` because some registers have read side effects.
    fn config_read(&mut self, offset: u16, data: &mut [u8]);

    /// A configuration write. The segment moves BAR windows after it returns.
    fn config_write(&mut self, offset: u16, data: &[u8]);

    /// A read inside BAR `bar`.
    fn bar_read(&mut self, bar: u8, at: Access, data: &mut [u8]);

    /// A write inside BAR `bar`.
    fn bar_write(&mut self, bar: u8, at: Access, data: &[u8]);

    /// Stops whatever the function does by itself; no vCPU runs. Accesses may still come.
    fn pause(&mut self) {}
    /// Goes on where [`Self::pause`] stopped; the vCPUs are about to run.
    fn resume(&mut self) {}
    /// BAR `bar`'s window is now at `base`, or closed. Doorbells and memory mappings that depend
    /// on the address follow it here.
    fn bar_moved(&mut self, bar: u8, base: Option<u64>) {
        let _ = (bar, base);
    }
}
