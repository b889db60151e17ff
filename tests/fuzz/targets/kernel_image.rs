//! Any file as a kernel: it is told what it is, and a kernel is loaded into a small guest.
//!
//! The first byte chooses how to load, the rest is the file.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use testudo_arch::x86_64::MemoryMap;
use testudo_boot::x86_64::{BootProtocol, BootRequest, Entry, layout, load};
use testudo_boot::{Cmdline, Image, Source};
use testudo_memory::RamView;
use vm_memory::GuestAddress;

const RAM: u64 = 32 << 20;

struct Guest {
    ram: RamView,
    map: MemoryMap,
    cmdline: Cmdline,
    initrd: Source,
}

static GUEST: LazyLock<Guest> = LazyLock::new(|| Guest {
    ram: RamView::from_ranges(&[(GuestAddress(0), 32 << 20)]).expect("32 MiB of memory"),
    map: MemoryMap::plan(RAM, 40).expect("32 MiB is a map"),
    cmdline: Cmdline::new("console=ttyS0 -- sh").expect("a command line"),
    initrd: Source::from_bytes("initrd", vec![7; 5000]).expect("bytes"),
});

fuzz_target!(|data: &[u8]| {
    let Some((&how, file)) = data.split_first() else {
        return;
    };
    let Ok(source) = Source::from_bytes("kernel", file.to_vec()) else {
        return;
    };
    let Ok(kernel) = Image::identify(source) else {
        return;
    };
    let guest = &*GUEST;
    let mut places = layout(&guest.ram, guest.map.e820());
    let request = BootRequest {
        kernel: &kernel,
        initrd: (how & 1 != 0).then_some(&guest.initrd),
        cmdline: &guest.cmdline,
        e820: guest.map.e820(),
        rsdp: Some(0xe0000),
        protocol: match how >> 1 & 3 {
            1 => BootProtocol::Linux64,
            2 => BootProtocol::Pvh,
            _ => BootProtocol::Auto,
        },
        // Clearing 16 MiB of .bss each time would be most of the work.
        ram_is_zero: how & 0xf8 != 0,
    };
    let Ok(loaded) = load(&mut places, &guest.ram, &request) else {
        return;
    };
    let entry = match loaded.entry {
        Entry::Linux64 { rip, .. } => rip,
        Entry::Pvh { eip, .. } => u64::from(eip),
    };
    assert!(loaded.kernel.gpa() <= entry && entry < loaded.kernel.end());
    let mut end = 0;
    for (what, range) in places.taken() {
        assert!(
            end <= range.start && range.end <= RAM,
            "{what} at {range:x?}"
        );
        end = range.end;
    }
});
