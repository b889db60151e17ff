//! Placing and copying the kernel.

use testudo_memory::RamView;

use super::{BootRequest, LoadError};
use crate::copy::{Copied, Copier, HUGE, small_pages, sparse_huge_pages};
use crate::image::{Bzimage, ENTRY_64, Elf, ImageKind};
use crate::layout::{Layout, PlaceError, Reservation};
use crate::mapping::Pages;

/// Kernels end below: the boot page tables map the first 4 GiB, and PVH enters without paging.
const FOUR_GIB: u64 = 1 << 32;

pub(super) struct Kernel {
    pub(super) place: Reservation,
    pub(super) entry64: u64,
    pub(super) copied: Copied,
    pub(super) leftover: Option<Pages>,
}

pub(super) fn load(
    layout: &mut Layout,
    ram: &RamView,
    request: &BootRequest<'_>,
) -> Result<Kernel, LoadError> {
    let source = request.kernel.source();
    let no_room = |gpa, size| {
        let name = source.name().into();
        move |source| LoadError::Kernel {
            name,
            gpa,
            size,
            source,
        }
    };
    let mut copier = Copier::new(source, ram, request.ram_is_zero);
    let (place, entry64) = match request.kernel.kind() {
        ImageKind::Bzimage(bz) => {
            let place =
                place_bzimage(layout, bz).map_err(no_room(bz.pref_address, bz.init_size))?;
            let (offset, size) = bz.payload;
            copier.copy(offset, size, &place, 0)?;
            let entry = place.gpa().saturating_add(ENTRY_64);
            (place, entry)
        }
        ImageKind::Elf(elf) => {
            let (gpa, size) = elf.extent();
            let place = layout
                .usable_at("kernel", gpa, size)
                .map_err(no_room(gpa, size))?;
            for page in sparse_huge_pages(&file_parts(elf)) {
                small_pages(ram, page, HUGE);
            }
            copy_segments(&mut copier, elf, &place)?;
            (place, elf.entry)
        }
    };
    let (copied, leftover) = copier.finish();
    Ok(Kernel {
        place,
        entry64,
        copied,
        leftover,
    })
}

/// Where it prefers, or above: below its preferred address the decompressor would move itself there
/// anyway, onto whatever is in the way.
fn place_bzimage(layout: &mut Layout, bz: &Bzimage) -> Result<Reservation, PlaceError> {
    let preferred = layout.usable_at("kernel", bz.pref_address, bz.init_size);
    match preferred {
        Err(_) if bz.relocatable => layout.lowest(
            "kernel",
            bz.init_size,
            bz.alignment,
            bz.pref_address..FOUR_GIB,
        ),
        other => other,
    }
}

/// What the file has bytes for, as addresses and sizes. The .bss behind a segment's bytes counts as
/// full, since the kernel will use it.
fn file_parts(elf: &Elf) -> Vec<(u64, u64)> {
    elf.segments.iter().map(|s| (s.gpa, s.size)).collect()
}

fn copy_segments(copier: &mut Copier<'_>, elf: &Elf, place: &Reservation) -> Result<(), LoadError> {
    for segment in &elf.segments {
        let at = segment.gpa.saturating_sub(place.gpa());
        copier.copy(segment.offset, segment.file_size, place, at)?;
        let rest = segment.size.saturating_sub(segment.file_size);
        copier.clear(rest, place, at.saturating_add(segment.file_size))?;
    }
    Ok(())
}
