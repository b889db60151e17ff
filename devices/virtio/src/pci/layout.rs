//! Where things are in BAR 0, and the capabilities that say so (virtio 1.2 §4.1.4).

use testudo_pci::{
    Bar, BarOffset, Capability, ClassCode, ConfigSpace, Identity, LayoutError, Msix,
};

use super::window::Window;
use crate::model::Shape;

pub(super) const BAR: u8 = 0;
pub(super) const BAR_SIZE: u64 = 0x8000;
/// The BAR in which a shared memory region is.
pub(super) const SHARED_BAR: u8 = 2;
/// One vector per queue and one for configuration must fit the table's page.
pub(super) const MAX_QUEUES: usize = 255;

const PAGE: u64 = 0x1000;
const COMMON: u32 = 0x0000;
const ISR: u32 = 0x1000;
const DEVICE: u32 = 0x2000;
const NOTIFY: u32 = 0x3000;
const MSIX_TABLE: u32 = 0x4000;
const MSIX_PBA: u32 = 0x5000;

/// Bytes of the common configuration up to and with `queue_reset`.
pub(super) const COMMON_LEN: u32 = 0x3c;
const NOTIFY_MULTIPLIER: u32 = 4;

const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;
const CFG_SHARED_MEMORY: u8 = 8;

const VENDOR: u16 = 0x1af4;
/// Device ids of modern devices start here (virtio 1.2 §4.1.2).
const DEVICE_BASE: u16 = 0x1040;
/// At least 1 for a device that is not transitional.
const REVISION: u8 = 1;

/// A part of BAR 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Region {
    Common,
    Isr,
    Device,
    Notify,
    MsixTable,
    MsixPba,
}

/// The region at `offset` of BAR `bar` and the offset within it.
pub(super) fn region(bar: u8, offset: u64) -> Option<(Region, u64)> {
    let regions = [
        Region::Common,
        Region::Isr,
        Region::Device,
        Region::Notify,
        Region::MsixTable,
        Region::MsixPba,
    ];
    let page = usize::try_from(offset / PAGE).ok()?;
    let region = regions.get(page).filter(|_| bar == BAR)?;
    Some((*region, offset % PAGE))
}

/// Offset in BAR 0 of queue `index`'s notification.
pub(super) fn notify_offset(index: u16) -> u64 {
    u64::from(NOTIFY).saturating_add(u64::from(index).saturating_mul(u64::from(NOTIFY_MULTIPLIER)))
}

/// The queue whose notification is at `offset` of the notify region.
pub(super) fn notify_index(offset: u64) -> Option<u16> {
    u16::try_from(offset >> NOTIFY_MULTIPLIER.trailing_zeros()).ok()
}

/// The class a guest sorts the device under; virtio itself does not look at it.
fn class(device_type: u16) -> ClassCode {
    let (base, sub) = match device_type {
        // net, blk, console, scsi, gpu, input, vsock, fs
        1 => (0x02, 0x00),
        2 | 8 => (0x01, 0x00),
        3 => (0x07, 0x80),
        16 => (0x03, 0x80),
        18 => (0x09, 0x80),
        19 => (0x02, 0x80),
        26 => (0x01, 0x80),
        _ => (0xff, 0x00),
    };
    ClassCode {
        base,
        sub,
        interface: 0,
    }
}

fn structure(kind: u8, offset: u32, length: u32, more: &[u8]) -> Capability {
    let mut payload = vec![kind, BAR, 0, 0, 0];
    payload.extend(offset.to_le_bytes());
    payload.extend(length.to_le_bytes());
    payload.extend(more);
    Capability::vendor(&payload, &[])
}

/// A region that fills its BAR (virtio 1.2 §4.1.4.7): offset and length have high halves.
fn shared_memory(id: u8, length: u64) -> Capability {
    let [a, b, c, d, e, f, g, h] = length.to_le_bytes();
    let payload = [
        CFG_SHARED_MEMORY,
        SHARED_BAR,
        id,
        0,
        0,
        0,
        0,
        0,
        0,
        a,
        b,
        c,
        d,
        0,
        0,
        0,
        0,
        e,
        f,
        g,
        h,
    ];
    Capability::vendor(&payload, &[])
}

/// The access window: BAR, offset, length and data are the guest's to write.
fn access_window() -> Capability {
    let payload = [CFG_PCI, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let writable = [
        0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    ];
    Capability::vendor(&payload, &writable)
}

/// The configuration space of a device of `shape` whose vectors are `msix`.
pub(super) fn config_space(
    shape: &Shape,
    msix: &mut Msix,
) -> Result<(ConfigSpace, Window), LayoutError> {
    let device = DEVICE_BASE.saturating_add(shape.device_type);
    let mut config = ConfigSpace::new(&Identity {
        vendor: VENDOR,
        device,
        revision: REVISION,
        class: class(shape.device_type),
        subsystem_vendor: VENDOR,
        subsystem: device,
    });
    config.add_bar(Bar {
        index: BAR,
        size: BAR_SIZE,
        wide: true,
        prefetchable: true,
    })?;
    if let Some(shared) = &shape.shared_memory {
        config.add_bar(Bar {
            index: SHARED_BAR,
            size: shared.window.len(),
            wide: true,
            prefetchable: true,
        })?;
        config.add_capability(&shared_memory(shared.id, shared.window.len()))?;
    }
    msix.add_capability(
        &mut config,
        BarOffset {
            bar: BAR,
            offset: MSIX_TABLE,
        },
        BarOffset {
            bar: BAR,
            offset: MSIX_PBA,
        },
    )?;
    let queues = u32::try_from(shape.queues.len()).unwrap_or(0);
    let notify_len = queues.saturating_mul(NOTIFY_MULTIPLIER);
    config.add_capability(&structure(CFG_COMMON, COMMON, COMMON_LEN, &[]))?;
    config.add_capability(&structure(CFG_ISR, ISR, 1, &[]))?;
    if shape.config_len != 0 {
        config.add_capability(&structure(CFG_DEVICE, DEVICE, shape.config_len, &[]))?;
    }
    let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
    config.add_capability(&structure(CFG_NOTIFY, NOTIFY, notify_len, &multiplier))?;
    let window = Window::new(config.add_capability(&access_window())?);
    Ok((config, window))
}
