//! Placing and copying the initial RAM disk.

use testudo_arch::x86_64::layout::HIGH_MEMORY;
use testudo_memory::RamView;

use super::{BootRequest, LoadError};
use crate::copy::{Copied, Copier};
use crate::image::ImageKind;
use crate::layout::{Layout, PlaceError, Reservation};
use crate::mapping::Pages;

/// Where an initrd ends for a kernel that does not say: what every x86_64 Linux says.
const BELOW: u64 = 0x8000_0000;
const PAGE: u64 = 4096;

pub(super) struct Initrd {
    /// Whole pages: the kernel frees them by the page.
    pub(super) place: Reservation,
    pub(super) size: u64,
    pub(super) copied: Copied,
    pub(super) leftover: Option<Pages>,
}

pub(super) fn load(
    layout: &mut Layout,
    ram: &RamView,
    request: &BootRequest<'_>,
) -> Result<Option<Initrd>, LoadError> {
    let Some(source) = request.initrd else {
        return Ok(None);
    };
    let below = match request.kernel.kind() {
        ImageKind::Bzimage(bz) => bz.initrd_addr_max.saturating_add(1),
        ImageKind::Elf(_) => BELOW,
    };
    let size = source.size();
    let pages = size.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
    let within = HIGH_MEMORY..below.max(HIGH_MEMORY);
    let place = layout
        .highest("initrd", pages, PAGE, within)
        .map_err(|error| match error {
            PlaceError::NoRoom { gap, .. } => LoadError::Initrd {
                name: source.name().into(),
                size,
                gap,
                below,
            },
            other => other.into(),
        })?;
    let mut copier = Copier::new(source, ram, request.ram_is_zero);
    copier.copy(0, size, &place, 0)?;
    let (copied, leftover) = copier.finish();
    Ok(Some(Initrd {
        place,
        size,
        copied,
        leftover,
    }))
}
