//! `hvm_start_info` version 1, with the module list and the memory map right behind it.
//! Xen `public/arch-x86/hvm/start_info.h`.

use testudo_memory::RamView;

use super::{BootRequest, Entry, LoadError, Places};
use crate::blob::write;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const START_INFO: u64 = 56;
const MODULE: u64 = 32;
/// Most entries of the memory map: what Linux copies, and what the page has room for.
const MEMORY_MAP_MAX: usize = 128;

pub(super) fn write_all(
    ram: &RamView,
    request: &BootRequest<'_>,
    places: &Places<'_>,
    eip: u32,
) -> Result<Entry, LoadError> {
    let count = request.e820.len();
    let entries = u32::try_from(count)
        .ok()
        .filter(|_| count <= MEMORY_MAP_MAX);
    let Some(entries) = entries else {
        return Err(LoadError::MemoryMap {
            count,
            limit: MEMORY_MAP_MAX,
        });
    };
    let start_info = places.params.gpa();
    let modules = start_info.saturating_add(START_INFO);
    let memory_map = modules.saturating_add(MODULE);

    let mut bytes = Vec::new();
    let mut put = |field: &[u8]| bytes.extend_from_slice(field);
    put(&MAGIC.to_le_bytes());
    put(&VERSION.to_le_bytes());
    put(&0u32.to_le_bytes()); // flags
    put(&u32::from(places.initrd.is_some()).to_le_bytes());
    put(&modules.to_le_bytes());
    put(&places.cmdline.gpa().to_le_bytes());
    put(&request.rsdp.unwrap_or(0).to_le_bytes());
    put(&memory_map.to_le_bytes());
    put(&entries.to_le_bytes());
    put(&0u32.to_le_bytes()); // reserved

    let (initrd, initrd_size) = places.initrd.unwrap_or((0, 0));
    put(&initrd.to_le_bytes());
    put(&initrd_size.to_le_bytes());
    put(&0u64.to_le_bytes()); // command line of the module
    put(&0u64.to_le_bytes()); // reserved

    for entry in request.e820 {
        put(&entry.span.base().to_le_bytes());
        put(&entry.span.size().to_le_bytes());
        put(&entry.kind.code().to_le_bytes());
        put(&0u32.to_le_bytes()); // reserved
    }
    write(ram, places.params, &bytes)?;
    Ok(Entry::Pvh {
        eip,
        // The page lies in the first MiB.
        start_info: u32::try_from(start_info).unwrap_or(0),
    })
}
