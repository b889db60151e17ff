//! Whole loads of synthetic kernels into real guest RAM.

use std::fs::File;
use std::io::Write;

use testudo_arch::x86_64::MemoryMap;
use vm_memory::{Bytes, GuestAddress};

use super::samples::{BzimageSample, ElfSample, bzimage, elf, pattern};
use super::*;
use crate::source::Source;

const MIB: u64 = 1 << 20;

struct Guest {
    ram: RamView,
    map: MemoryMap,
}

impl Guest {
    fn new(mib: u64) -> Self {
        let map = MemoryMap::plan(mib * MIB, 40).unwrap();
        let ranges: Vec<_> = map
            .ram()
            .iter()
            .map(|s| (GuestAddress(s.base()), usize::try_from(s.size()).unwrap()))
            .collect();
        let ram = RamView::from_ranges(&ranges).unwrap();
        Self { ram, map }
    }

    fn load(&self, what: &What) -> Result<Loaded, LoadError> {
        let kernel = Image::identify(what.source(&what.kernel)).unwrap();
        let initrd = what.initrd.as_ref().map(|bytes| what.source(bytes));
        let cmdline = Cmdline::new(&what.cmdline).unwrap();
        let mut places = layout(&self.ram, self.map.e820());
        let request = BootRequest {
            kernel: &kernel,
            initrd: initrd.as_ref(),
            cmdline: &cmdline,
            e820: self.map.e820(),
            rsdp: Some(0xe0000),
            protocol: what.protocol,
            ram_is_zero: !what.dirty,
        };
        load(&mut places, &self.ram, &request)
    }

    fn bytes(&self, gpa: u64, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        self.ram.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    fn number<const N: usize>(&self, gpa: u64) -> u64 {
        let mut wide = [0; 8];
        wide[..N].copy_from_slice(&self.bytes(gpa, N));
        u64::from_le_bytes(wide)
    }
}

struct What {
    kernel: Vec<u8>,
    initrd: Option<Vec<u8>>,
    cmdline: String,
    protocol: BootProtocol,
    dirty: bool,
    /// Give images as files rather than from memory.
    files: bool,
}

impl What {
    fn new(kernel: Vec<u8>) -> Self {
        Self {
            kernel,
            initrd: Some(pattern(10_000)),
            cmdline: "console=ttyS0 quiet".into(),
            protocol: BootProtocol::Auto,
            dirty: false,
            files: false,
        }
    }

    fn source(&self, bytes: &[u8]) -> Source {
        if !self.files {
            return Source::from_bytes("image", bytes.to_vec()).unwrap();
        }
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let reader = File::open(file.path()).unwrap();
        drop(file);
        Source::from_file("image", reader).unwrap()
    }
}

#[test]
fn a_bzimage_is_entered_with_a_zero_page() {
    let sample = BzimageSample::default();
    let guest = Guest::new(64);
    let loaded = guest.load(&What::new(bzimage(&sample))).unwrap();
    let Entry::Linux64 { rip, boot_params } = loaded.entry else {
        panic!("{loaded:?}")
    };
    assert_eq!((rip, boot_params), (16 * MIB + 0x200, 0x7000));
    assert_eq!(
        (loaded.kernel.gpa(), loaded.kernel.size()),
        (16 * MIB, 4 * MIB)
    );
    assert_eq!(guest.bytes(16 * MIB, sample.payload.len()), sample.payload);

    let initrd = loaded.initrd.unwrap();
    assert_eq!((initrd.gpa(), initrd.size()), (64 * MIB - 12288, 12288));
    assert_eq!(guest.bytes(initrd.gpa(), 10_000), pattern(10_000));
    assert_eq!(
        guest.bytes(loaded.cmdline.gpa(), 20),
        b"console=ttyS0 quiet\0"
    );

    let page = boot_params;
    assert_eq!(guest.bytes(page + 0x202, 4), b"HdrS");
    assert_eq!(guest.number::<1>(page + 0x210), 0xff);
    assert_eq!(guest.number::<4>(page + 0x214), 16 * MIB);
    assert_eq!(guest.number::<4>(page + 0x218), initrd.gpa());
    assert_eq!(guest.number::<4>(page + 0x21c), 10_000);
    assert_eq!(guest.number::<4>(page + 0x228), loaded.cmdline.gpa());
    assert_eq!(
        guest.number::<8>(page + 0x250),
        0,
        "setup_data is not taken from the file"
    );
    assert_eq!(guest.number::<8>(page + 0x070), 0xe0000);
    let entries = guest.map.e820();
    assert_eq!(guest.number::<1>(page + 0x1e8), entries.len() as u64);
    assert_eq!(guest.bytes(page + 0x2d0, 20), entries[0].to_bytes());
}

#[test]
fn a_vmlinux_with_the_note_is_entered_by_pvh() {
    let sample = ElfSample::default();
    let guest = Guest::new(64);
    let loaded = guest.load(&What::new(elf(&sample))).unwrap();
    assert_eq!(
        loaded.entry,
        Entry::Pvh {
            eip: 0x100_0040,
            start_info: 0x6000
        }
    );
    assert_eq!(guest.bytes(0x100_0000, sample.text.len()), sample.text);
    assert_eq!(guest.bytes(0x120_0000, 778)[776..], [0x5a, 0]);

    assert_eq!(guest.number::<4>(0x6000), 0x336e_c578);
    assert_eq!(guest.number::<4>(0x6004), 1);
    assert_eq!(guest.number::<4>(0x600c), 1);
    let module = guest.number::<8>(0x6010);
    assert_eq!(guest.number::<8>(module), loaded.initrd.unwrap().gpa());
    assert_eq!(guest.number::<8>(module + 8), 10_000);
    assert_eq!(guest.number::<8>(0x6018), loaded.cmdline.gpa());
    assert_eq!(guest.number::<8>(0x6020), 0xe0000);
    let map = guest.number::<8>(0x6028);
    assert_eq!(guest.number::<4>(0x6030), guest.map.e820().len() as u64);
    let last = guest.map.e820().last().unwrap();
    let at = map + 24 * (guest.map.e820().len() as u64 - 1);
    assert_eq!(guest.number::<8>(at), last.span.base());
    assert_eq!(guest.number::<4>(at + 16), u64::from(last.kind.code()));
}

#[test]
fn the_64_bit_entry_can_be_asked_for_and_is_used_without_a_note() {
    for what in [
        What {
            protocol: BootProtocol::Linux64,
            ..What::new(elf(&ElfSample::default()))
        },
        What::new(elf(&ElfSample {
            pvh: None,
            ..Default::default()
        })),
    ] {
        let guest = Guest::new(64);
        let loaded = guest.load(&what).unwrap();
        assert_eq!(
            loaded.entry,
            Entry::Linux64 {
                rip: 0x100_0000,
                boot_params: 0x7000
            }
        );
        assert_eq!(guest.number::<2>(0x7000 + 0x1fe), 0xaa55);
        assert_eq!(guest.number::<4>(0x7000 + 0x21c), 10_000);
    }
    let what = What {
        protocol: BootProtocol::Pvh,
        ..What::new(bzimage(&BzimageSample::default()))
    };
    assert!(matches!(
        Guest::new(64).load(&what),
        Err(LoadError::NoPvh { .. })
    ));
}

#[test]
fn files_are_mapped_and_zeroes_are_not_written() {
    let sample = ElfSample {
        text: [pattern(5000), vec![0; 100_000], pattern(333)].concat(),
        ..Default::default()
    };
    for (files, dirty) in [(false, false), (true, false), (false, true), (true, true)] {
        let guest = Guest::new(64);
        guest
            .ram
            .write_slice(&[0xee; 200], GuestAddress(0x100_0000 + 50_000))
            .unwrap();
        guest
            .ram
            .write_slice(&[0xee; 200], GuestAddress(0x120_0000 + 5_000))
            .unwrap();
        let loaded = guest
            .load(&What {
                files,
                dirty,
                ..What::new(elf(&sample))
            })
            .unwrap();
        let stale = if dirty { 0 } else { 0xee };
        assert_eq!(guest.bytes(0x100_0000 + 50_000, 1)[0], stale);
        assert_eq!(guest.bytes(0x120_0000 + 5_000, 1)[0], stale);
        assert_eq!(loaded.copied.mapped > 0, files, "{:?}", loaded.copied);
        assert_eq!(
            loaded.copied.skipped > 1 << 20,
            !dirty,
            "{:?}",
            loaded.copied
        );
        let text = guest.bytes(0x100_0000, sample.text.len());
        assert_eq!(text[..5000], sample.text[..5000]);
        assert_eq!(text[105_000..], sample.text[105_000..]);
    }
}

#[test]
fn a_file_that_shrank_after_it_was_identified_is_an_error() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&elf(&ElfSample::default())).unwrap();
    let source = Source::open(file.path()).unwrap();
    let kernel = Image::identify(source).unwrap();
    file.as_file().set_len(5000).unwrap();
    let guest = Guest::new(64);
    let cmdline = Cmdline::new("").unwrap();
    let request = BootRequest {
        kernel: &kernel,
        initrd: None,
        cmdline: &cmdline,
        e820: guest.map.e820(),
        rsdp: None,
        protocol: BootProtocol::Auto,
        ram_is_zero: true,
    };
    let fail = || {
        let mut places = layout(&guest.ram, guest.map.e820());
        let error = load(&mut places, &guest.ram, &request).unwrap_err();
        assert!(error.to_string().starts_with("cannot read "), "{error}");
    };
    // Read, because somebody has it open for writing; then mapped.
    fail();
    let path = file.into_temp_path();
    fail();
    drop(path);
}

#[test]
fn what_does_not_fit_names_the_sizes() {
    let message = |mib, what: What| Guest::new(mib).load(&what).unwrap_err().to_string();
    let big = bzimage(&BzimageSample {
        init_size: 54 << 20,
        ..Default::default()
    });
    assert_eq!(
        message(64, What::new(big)),
        "image needs 0x3600000 bytes of guest RAM at 0x1000000; give the guest at least 70 MiB"
    );
    let what = What {
        initrd: Some(vec![1; 50 << 20]),
        ..What::new(bzimage(&BzimageSample::default()))
    };
    assert_eq!(
        message(64, what),
        "the initrd image has 52428800 bytes and the largest gap guest RAM has for it below 0x80000000 is 46137344 bytes; \
         give the guest more memory"
    );
    let long = What {
        cmdline: "x".repeat(300),
        ..What::new(bzimage(&BzimageSample {
            cmdline_size: 255,
            ..Default::default()
        }))
    };
    assert_eq!(
        message(64, long),
        "the kernel command line has 300 bytes and image takes 255; shorten it"
    );
}

#[test]
fn a_relocatable_kernel_moves_up_and_another_does_not() {
    let guest = Guest::new(64);
    let mut places = layout(&guest.ram, guest.map.e820());
    let _taken = places.at("something", 17 * MIB, 4096).unwrap();
    let load_beside = |places: &mut Layout, relocatable| {
        let kernel = bzimage(&BzimageSample {
            relocatable,
            ..Default::default()
        });
        let kernel = Image::identify(Source::from_bytes("image", kernel).unwrap()).unwrap();
        let request = BootRequest {
            kernel: &kernel,
            initrd: None,
            cmdline: &Cmdline::new("").unwrap(),
            e820: guest.map.e820(),
            rsdp: None,
            protocol: BootProtocol::Auto,
            ram_is_zero: true,
        };
        load(places, &guest.ram, &request)
    };
    assert!(matches!(
        load_beside(&mut places, false),
        Err(LoadError::Kernel { .. })
    ));
    let mut places = layout(&guest.ram, guest.map.e820());
    let _taken = places.at("something", 17 * MIB, 4096).unwrap();
    assert_eq!(
        load_beside(&mut places, true).unwrap().kernel.gpa(),
        18 * MIB
    );
}

#[test]
fn an_initrd_stays_below_the_hole_when_there_is_ram_above() {
    let guest = Guest::new(5 << 10);
    let loaded = guest.load(&What::new(elf(&ElfSample::default()))).unwrap();
    assert_eq!(
        loaded.initrd.unwrap().end(),
        guest.map.low_ram_end().min(0x8000_0000)
    );
}
