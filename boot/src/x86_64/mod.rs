//! Booting Linux on x86_64: by the 64-bit entry of the Linux boot protocol
//! (`Documentation/arch/x86/boot.rst`) or by PVH (Xen `public/arch-x86/hvm/start_info.h`).
//!
//! ```text
//!   0x6000  hvm_start_info, module list, memory map      (PVH)
//!   0x7000  zero page                                    (64-bit entry)
//!  0x20000  command line
//!  1 MiB..  kernel where its headers say, initrd as high as it may be
//! ```
//! The low addresses are `testudo_arch::x86_64::layout`'s.

mod initrd;
mod kernel;
#[cfg(test)]
pub(crate) mod samples;
mod start_info;
#[cfg(test)]
mod tests;
mod zero_page;

use testudo_arch::x86_64::{E820Entry, E820Kind, layout};
use testudo_memory::RamView;
use thiserror::Error;

use crate::blob::{BlobError, write};
use crate::cmdline::Cmdline;
use crate::copy::{Copied, CopyError, small_pages};
use crate::image::{Image, ImageKind};
use crate::layout::{Layout, PlaceError, Reservation};
use crate::mapping::Pages;
use crate::source::Source;

/// Longest command line of a kernel that does not say (`COMMAND_LINE_SIZE` of x86 less the
/// terminator).
const CMDLINE_SIZE: u64 = 2047;

/// Which contract the kernel is entered by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BootProtocol {
    /// PVH for an ELF kernel that has the note, the 64-bit entry otherwise.
    #[default]
    Auto,
    /// The 64-bit entry.
    Linux64,
    /// PVH.
    Pvh,
}

/// What to boot.
#[derive(Debug, Clone, Copy)]
pub struct BootRequest<'a> {
    /// The kernel.
    pub kernel: &'a Image,
    /// Initial RAM disk.
    pub initrd: Option<&'a Source>,
    /// Command line; whether this kernel takes one so long is checked here.
    pub cmdline: &'a Cmdline,
    /// Memory map as the guest is told it, by address.
    pub e820: &'a [E820Entry],
    /// Where the ACPI RSDP is.
    pub rsdp: Option<u64>,
    /// Contract to enter by.
    pub protocol: BootProtocol,
    /// Guest RAM holds zeroes wherever nothing was reserved in the layout: true for the first boot,
    /// false when the guest has run before.
    pub ram_is_zero: bool,
}

/// How the first vCPU enters the kernel. Addresses are guest-physical.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Long mode, identity-mapped: rip, and the zero page in rsi.
    Linux64 {
        /// First instruction.
        rip: u64,
        /// Zero page.
        boot_params: u64,
    },
    /// 32-bit protected mode without paging: eip, and the start info in ebx.
    Pvh {
        /// First instruction.
        eip: u32,
        /// `hvm_start_info`.
        start_info: u32,
    },
}

/// What was loaded, and where.
#[derive(Debug)]
pub struct Loaded {
    /// How to enter it.
    pub entry: Entry,
    /// The kernel, with what it claims beyond its image.
    pub kernel: Reservation,
    /// Initial RAM disk.
    pub initrd: Option<Reservation>,
    /// Command line, terminator included.
    pub cmdline: Reservation,
    /// What copying kernel and initrd took.
    pub copied: Copied,
    /// Drop it when the guest runs, or at once.
    pub leftovers: Leftovers,
}

/// Mappings of the images, which nobody needs any more. Unmapping takes time by the page (about a
/// tenth of the load), so it is kept out of the way of the guest's first instruction.
#[derive(Debug, Default)]
pub struct Leftovers(#[expect(dead_code, reason = "held to be dropped")] Vec<Pages>);

/// A guest could not be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// Something does not fit.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The kernel does not fit where it must be.
    #[error("{name} needs {size:#x} bytes of guest RAM at {gpa:#x}; give the guest at least {} MiB", mib(gpa.saturating_add(*size)))]
    Kernel {
        /// The file.
        name: Box<str>,
        /// First guest-physical address it can run at.
        gpa: u64,
        /// Bytes it needs there.
        size: u64,
        /// Who is in the way, if it is not the lack of RAM.
        #[source]
        source: PlaceError,
    },
    /// The initrd is larger than what is left.
    #[error(
        "the initrd {name} has {size} bytes and the largest gap guest RAM has for it below {below:#x} is {gap} bytes; \
         give the guest more memory"
    )]
    Initrd {
        /// The file.
        name: Box<str>,
        /// Its bytes.
        size: u64,
        /// Largest gap.
        gap: u64,
        /// It has to end below.
        below: u64,
    },
    /// The command line is longer than this kernel takes.
    #[error("the kernel command line has {size} bytes and {name} takes {limit}; shorten it")]
    Cmdline {
        /// The kernel.
        name: Box<str>,
        /// Bytes of the line, without terminator.
        size: u64,
        /// Most bytes it takes.
        limit: u64,
    },
    /// PVH was asked for and the kernel has no PVH entry.
    #[error(
        "{name} has no PVH entry (XEN_ELFNOTE_PHYS32_ENTRY); use a vmlinux built with CONFIG_PVH, or boot it by its 64-bit entry"
    )]
    NoPvh {
        /// The kernel.
        name: Box<str>,
    },
    /// More entries than the contract has room for.
    #[error("the memory map has {count} entries and the boot protocol has room for {limit}")]
    MemoryMap {
        /// Entries.
        count: usize,
        /// Room.
        limit: usize,
    },
    /// Bytes could not be copied.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// Boot parameters could not be written.
    #[error(transparent)]
    Write(#[from] BlobError),
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// What lies below is mostly holes: firmware's and, for the host, those of the fixed MTRRs.
const LOW_MEMORY: u64 = 2 << 20;

/// A layout over `ram` in which the RAM entries of `e820` are usable. Page 0 is nobody's: a null
/// address means absence in both protocols. Make it before anything is written to guest RAM, as it
/// also asks the host for small pages where a guest uses only few.
pub fn layout(ram: &RamView, e820: &[E820Entry]) -> Layout {
    small_pages(ram, 0, LOW_MEMORY);
    Layout::new(
        ram,
        e820.iter()
            .filter(|e| e.kind == E820Kind::Ram)
            .map(|e| e.span.base().max(0x1000)..e.span.end()),
    )
}

/// Puts kernel, initrd, command line and boot parameters into guest RAM. What has a fixed address
/// (firmware tables, boot-time page tables) must have been reserved in `layout` before.
pub fn load(
    layout: &mut Layout,
    ram: &RamView,
    request: &BootRequest<'_>,
) -> Result<Loaded, LoadError> {
    let pvh_entry = pvh_entry(request)?;
    let boot_params = match pvh_entry {
        Some(_) => layout::PVH_START_INFO,
        None => layout::ZERO_PAGE,
    };
    let params = layout.at("boot parameters", boot_params.base(), boot_params.size())?;
    let cmdline = load_cmdline(layout, ram, request)?;
    let kernel = kernel::load(layout, ram, request)?;
    let initrd = initrd::load(layout, ram, request)?;

    let places = Places {
        params: &params,
        cmdline: &cmdline,
        initrd: initrd.as_ref().map(|i| (i.place.gpa(), i.size)),
    };
    let entry = match pvh_entry {
        Some(eip) => start_info::write_all(ram, request, &places, eip)?,
        None => {
            zero_page::write_all(ram, request, &places, &kernel)?;
            Entry::Linux64 {
                rip: kernel.entry64,
                boot_params: params.gpa(),
            }
        }
    };
    let mut copied = kernel.copied;
    let mut leftovers: Vec<Pages> = kernel.leftover.into_iter().collect();
    let initrd = initrd.map(|initrd| {
        copied = copied.plus(initrd.copied);
        leftovers.extend(initrd.leftover);
        initrd.place
    });
    log::debug!(
        "{} at {:#x}: {copied:?}",
        request.kernel.source().name(),
        kernel.place.gpa()
    );
    Ok(Loaded {
        entry,
        kernel: kernel.place,
        initrd,
        cmdline,
        copied,
        leftovers: Leftovers(leftovers),
    })
}

/// What the boot parameters point to.
struct Places<'a> {
    params: &'a Reservation,
    cmdline: &'a Reservation,
    /// Address and exact size.
    initrd: Option<(u64, u64)>,
}

/// The PVH entry if it is the one to use.
fn pvh_entry(request: &BootRequest<'_>) -> Result<Option<u32>, LoadError> {
    let has = match request.kernel.kind() {
        ImageKind::Elf(elf) => elf.pvh_entry,
        ImageKind::Bzimage(_) => None,
    };
    match request.protocol {
        BootProtocol::Auto => Ok(has),
        BootProtocol::Linux64 => Ok(None),
        BootProtocol::Pvh => has.map(Some).ok_or_else(|| LoadError::NoPvh {
            name: request.kernel.source().name().into(),
        }),
    }
}

fn load_cmdline(
    layout: &mut Layout,
    ram: &RamView,
    request: &BootRequest<'_>,
) -> Result<Reservation, LoadError> {
    let limit = match request.kernel.kind() {
        ImageKind::Bzimage(bz) => bz.cmdline_size,
        ImageKind::Elf(_) => CMDLINE_SIZE,
    };
    let bytes = request.cmdline.to_bytes();
    let with_end = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    let size = with_end.saturating_sub(1);
    if size > limit {
        return Err(LoadError::Cmdline {
            name: request.kernel.source().name().into(),
            size,
            limit,
        });
    }
    let place = layout.at("command line", layout::CMDLINE.base(), with_end)?;
    write(ram, &place, &bytes)?;
    Ok(place)
}
