//! The zero page, `struct boot_params`. Linux `Documentation/arch/x86/zero-page.rst`.

use testudo_memory::RamView;

use super::kernel::Kernel;
use super::{BootRequest, CMDLINE_SIZE, LoadError, Places};
use crate::blob::write;
use crate::image::ImageKind;

const SIZE: usize = 4096;

const ACPI_RSDP_ADDR: usize = 0x070;
const EXT_RAMDISK_IMAGE: usize = 0x0c0;
const EXT_RAMDISK_SIZE: usize = 0x0c4;
const E820_ENTRIES: usize = 0x1e8;
const HEADER: usize = 0x1f1;
const VID_MODE: usize = 0x1fa;
const BOOT_FLAG: usize = 0x1fe;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const CODE32_START: usize = 0x214;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const KERNEL_ALIGNMENT: usize = 0x230;
const CMDLINE_SIZE_FIELD: usize = 0x238;
const SETUP_DATA: usize = 0x250;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY: usize = 20;
const E820_MAX: usize = 128;

/// A loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
const LOADED_HIGH: u8 = 1;
const VID_MODE_NORMAL: u16 = 0xffff;

struct ZeroPage([u8; SIZE]);

impl ZeroPage {
    fn put(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset.saturating_add(bytes.len());
        if let Some(to) = self.0.get_mut(offset..end) {
            to.copy_from_slice(bytes);
        }
    }

    /// A 64-bit value in a pair of 32-bit fields.
    fn put_halves(&mut self, low: usize, high: usize, value: u64) {
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        self.put(low, &[a, b, c, d]);
        self.put(high, &[e, f, g, h]);
    }

    /// The lower half of an address below 4 GiB.
    fn put_low(&mut self, offset: usize, value: u64) {
        let [a, b, c, d, ..] = value.to_le_bytes();
        self.put(offset, &[a, b, c, d]);
    }
}

pub(super) fn write_all(
    ram: &RamView,
    request: &BootRequest<'_>,
    places: &Places<'_>,
    kernel: &Kernel,
) -> Result<(), LoadError> {
    let mut page = ZeroPage([0; SIZE]);
    let flags = match request.kernel.kind() {
        ImageKind::Bzimage(bz) => {
            page.put(HEADER, &bz.header);
            page.put_low(CODE32_START, kernel.place.gpa());
            bz.header.get(LOADFLAGS - HEADER).copied().unwrap_or(0)
        }
        ImageKind::Elf(_) => {
            page.put(BOOT_FLAG, &[0x55, 0xaa]);
            page.put(MAGIC, b"HdrS");
            page.put(VERSION, &0x020cu16.to_le_bytes());
            page.put(KERNEL_ALIGNMENT, &0x0100_0000u32.to_le_bytes());
            page.put_low(CMDLINE_SIZE_FIELD, CMDLINE_SIZE);
            0
        }
    };
    page.put(VID_MODE, &VID_MODE_NORMAL.to_le_bytes());
    page.put(TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
    page.put(LOADFLAGS, &[flags | LOADED_HIGH]);
    page.put(SETUP_DATA, &[0; 8]);
    // The extended half of the command line's address stays zero: it lies low.
    page.put_low(CMD_LINE_PTR, places.cmdline.gpa());
    let (initrd, initrd_size) = places.initrd.unwrap_or((0, 0));
    page.put_halves(RAMDISK_IMAGE, EXT_RAMDISK_IMAGE, initrd);
    page.put_halves(RAMDISK_SIZE, EXT_RAMDISK_SIZE, initrd_size);
    page.put(ACPI_RSDP_ADDR, &request.rsdp.unwrap_or(0).to_le_bytes());

    let count = request.e820.len();
    let entries = u8::try_from(count).ok().filter(|_| count <= E820_MAX);
    let Some(entries) = entries else {
        return Err(LoadError::MemoryMap {
            count,
            limit: E820_MAX,
        });
    };
    page.put(E820_ENTRIES, &[entries]);
    for (index, entry) in request.e820.iter().enumerate() {
        let at = E820_TABLE.saturating_add(index.saturating_mul(E820_ENTRY));
        page.put(at, &entry.to_bytes());
    }
    Ok(write(ram, places.params, &page.0)?)
}
