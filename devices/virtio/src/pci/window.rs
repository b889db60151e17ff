//! The PCI configuration access capability (virtio 1.2 §4.1.4.9): a window in configuration space
//! through which firmware reaches BAR regions it has not mapped.

use testudo_pci::ConfigSpace;

use super::layout;

/// Where the capability is.
pub(super) struct Window {
    capability: u16,
}

const BAR: u16 = 4;
const OFFSET: u16 = 8;
const LENGTH: u16 = 12;
const DATA: u16 = 16;

impl Window {
    pub(super) fn new(capability: u16) -> Self {
        Self { capability }
    }

    fn at(&self, field: u16) -> u16 {
        self.capability.saturating_add(field)
    }

    /// Offset of the data field.
    pub(super) fn data(&self) -> u16 {
        self.at(DATA)
    }

    fn touches_data(&self, offset: u16, len: usize) -> bool {
        let start = usize::from(offset);
        let data = usize::from(self.data());
        start < data.saturating_add(4) && data < start.saturating_add(len)
    }

    /// Offset in the BAR and width the fields name, if they make a legal access: 1, 2 or 4 bytes,
    /// aligned, inside the BAR.
    fn access(&self, config: &ConfigSpace) -> Option<(u64, usize)> {
        let bar = config.get_u8(self.at(BAR));
        let offset = u64::from(config.get_u32(self.at(OFFSET)));
        let width = u64::from(config.get_u32(self.at(LENGTH)));
        let legal = bar == layout::BAR
            && matches!(width, 1 | 2 | 4)
            && offset & width.wrapping_sub(1) == 0
            && offset.saturating_add(width) <= layout::BAR_SIZE;
        let len = usize::try_from(width).ok()?;
        legal.then_some((offset, len))
    }

    /// The BAR access a configuration read of `len` bytes at `offset` implies.
    pub(super) fn read_through(
        &self,
        config: &ConfigSpace,
        offset: u16,
        len: usize,
    ) -> Option<(u64, usize)> {
        self.touches_data(offset, len)
            .then(|| self.access(config))?
    }

    /// The BAR access a configuration write implies; call it after the registers took the write.
    pub(super) fn write_through(
        &self,
        config: &ConfigSpace,
        offset: u16,
        len: usize,
    ) -> Option<(u64, usize)> {
        self.touches_data(offset, len)
            .then(|| self.access(config))?
    }
}
