//! The host bridge at 00:00.0.
//!
//! It has no registers of its own; a guest finds it, sees a root complex, and goes on. The ids are
//! Red Hat's generic PCIe host bridge (1b36:0008): no quirk in Linux is keyed to them, while ids
//! of real chipsets bring their errata and, on x86, probing of ECAM registers we do not have
//! (Linux `arch/x86/pci/mmconfig-shared.c`).

use testudo_bus::{Access, fill_absent};

use crate::{ClassCode, ConfigSpace, Identity, PciFunction};

const RED_HAT: u16 = 0x1b36;
const GENERIC_PCIE_HOST: u16 = 0x0008;
const RED_HAT_QUMRANET: u16 = 0x1af4;
const GENERIC_SUBSYSTEM: u16 = 0x1100;

/// The bridge.
pub struct HostBridge {
    config: ConfigSpace,
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl HostBridge {
    /// A bridge without state.
    pub fn new() -> Self {
        Self {
            config: ConfigSpace::new(&Identity {
                vendor: RED_HAT,
                device: GENERIC_PCIE_HOST,
                revision: 0,
                class: ClassCode {
                    base: 0x06,
                    sub: 0x00,
                    interface: 0x00,
                },
                subsystem_vendor: RED_HAT_QUMRANET,
                subsystem: GENERIC_SUBSYSTEM,
            }),
        }
    }
}

impl PciFunction for HostBridge {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }

    fn bar_read(&mut self, _bar: u8, _at: Access, data: &mut [u8]) {
        fill_absent(data);
    }

    fn bar_write(&mut self, _bar: u8, _at: Access, _data: &[u8]) {}
}
