//! The two ways a guest reaches configuration space.

use std::sync::atomic::{AtomicU32, Ordering};

use testudo_bus::{Access, Target, fill_absent};

use super::Segment;
use crate::Bdf;

/// Enhanced configuration access: bus, device, function and register are the address
/// (PCIe 6.0 §7.2.2).
pub(super) struct Ecam(pub(super) Segment);

fn ecam_address(offset: u64) -> Option<(Bdf, u16)> {
    let id = u16::try_from(offset >> 12).ok()?;
    let register = u16::try_from(offset & 0xfff).ok()?;
    Some((Bdf::from_routing_id(id), register))
}

impl Target for Ecam {
    fn read(&self, at: Access, data: &mut [u8]) {
        match ecam_address(at.offset) {
            Some((bdf, register)) => self.0.config_read(bdf, register, data),
            None => fill_absent(data),
        }
    }

    fn write(&self, at: Access, data: &[u8]) {
        if let Some((bdf, register)) = ecam_address(at.offset) {
            self.0.config_write(bdf, register, data);
        }
    }
}

const ADDRESS: u64 = 0;
const DATA: u64 = 4;
const ENABLE: u32 = 1 << 31;
/// Bus, device, function, register; bits 1:0 and 30:24 read as zero.
const LATCHED: u32 = ENABLE | 0x00ff_fffc;

/// Configuration mechanism #1 (PCI Local Bus 3.0 §3.2.2.3.2): an address register that takes
/// dwords only, and four data ports. Bytes at 0xcf9 and the like are other registers of other
/// chipsets and fall through to nothing.
pub(super) struct Mechanism1 {
    segment: Segment,
    address: AtomicU32,
}

impl Mechanism1 {
    pub(super) fn new(segment: Segment) -> Self {
        Self {
            segment,
            address: AtomicU32::new(0),
        }
    }

    /// The function and register a data access of `len` bytes at `offset` reaches.
    fn target(&self, offset: u64, len: usize) -> Option<(Bdf, u16)> {
        let lane = u16::try_from(offset.checked_sub(DATA)?).ok()?;
        let end = usize::from(lane).checked_add(len)?;
        let address = self.address.load(Ordering::Acquire);
        if address & ENABLE == 0 || end > 4 {
            return None;
        }
        let [register, low, high, _] = address.to_le_bytes();
        let bdf = Bdf::from_routing_id(u16::from_le_bytes([low, high]));
        Some((bdf, u16::from(register) | lane))
    }
}

impl Target for Mechanism1 {
    fn read(&self, at: Access, data: &mut [u8]) {
        if at.offset == ADDRESS
            && let Ok(dword) = <&mut [u8; 4]>::try_from(&mut *data)
        {
            *dword = self.address.load(Ordering::Acquire).to_le_bytes();
            return;
        }
        match self.target(at.offset, data.len()) {
            Some((bdf, register)) => self.segment.config_read(bdf, register, data),
            None => fill_absent(data),
        }
    }

    fn write(&self, at: Access, data: &[u8]) {
        if at.offset == ADDRESS
            && let Ok(dword) = <[u8; 4]>::try_from(data)
        {
            let address = u32::from_le_bytes(dword) & LATCHED;
            self.address.store(address, Ordering::Release);
            return;
        }
        if let Some((bdf, register)) = self.target(at.offset, data.len()) {
            self.segment.config_write(bdf, register, data);
        }
    }
}
