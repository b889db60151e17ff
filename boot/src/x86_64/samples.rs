//! Small synthetic kernels for tests.

/// Fields of a synthetic bzImage worth varying.
pub(crate) struct BzimageSample {
    pub(crate) version: u16,
    pub(crate) xloadflags: u16,
    pub(crate) alignment: u32,
    pub(crate) relocatable: bool,
    pub(crate) init_size: u32,
    pub(crate) cmdline_size: u32,
    pub(crate) payload: Vec<u8>,
}

impl Default for BzimageSample {
    fn default() -> Self {
        Self {
            version: 0x20f,
            xloadflags: 0x7f,
            alignment: 2 << 20,
            relocatable: true,
            init_size: 4 << 20,
            cmdline_size: 2047,
            payload: pattern(64 * 1024),
        }
    }
}

/// Bytes that are all different from their neighbours and never zero.
pub(crate) fn pattern(size: usize) -> Vec<u8> {
    (1..=251).cycle().take(size).collect()
}

pub(crate) fn bzimage(sample: &BzimageSample) -> Vec<u8> {
    let mut image = vec![0; 5 * 512];
    let mut put =
        |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[4]);
    put(
        0x1f4,
        &(u32::try_from(sample.payload.len()).unwrap() / 16).to_le_bytes(),
    );
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &sample.version.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &sample.alignment.to_le_bytes());
    put(0x234, &[u8::from(sample.relocatable), 21]);
    put(0x236, &sample.xloadflags.to_le_bytes());
    put(0x238, &sample.cmdline_size.to_le_bytes());
    put(0x250, &[0xaa; 8]);
    put(0x258, &(16u64 << 20).to_le_bytes());
    put(0x260, &sample.init_size.to_le_bytes());
    image.extend_from_slice(&sample.payload);
    image
}

/// Fields of a synthetic vmlinux worth varying.
pub(crate) struct ElfSample {
    pub(crate) pvh: Option<u32>,
    pub(crate) text: Vec<u8>,
    pub(crate) bss: u64,
}

impl Default for ElfSample {
    fn default() -> Self {
        Self {
            pvh: Some(0x100_0040),
            text: pattern(12_345),
            bss: 1 << 20,
        }
    }
}

/// Text at 16 MiB, data with .bss at 18 MiB; the entry is the first byte of the text.
pub(crate) fn elf(sample: &ElfSample) -> Vec<u8> {
    const LOAD: u32 = 1;
    const NOTE: u32 = 4;
    let mut note = Vec::new();
    for value in [4u32, 5, 1] {
        note.extend_from_slice(&value.to_le_bytes());
    }
    note.extend_from_slice(b"GNU\0abcde\0\0\0");
    if let Some(entry) = sample.pvh {
        for value in [4u32, 8, 18] {
            note.extend_from_slice(&value.to_le_bytes());
        }
        note.extend_from_slice(b"Xen\0");
        note.extend_from_slice(&u64::from(entry).to_le_bytes());
    }
    let data = [0x5a; 777];
    let text_size = sample.text.len() as u64;
    let headers = [
        (LOAD, 0x1000, 0x100_0000u64, text_size, text_size),
        (
            LOAD,
            0x1000 + text_size,
            0x120_0000,
            data.len() as u64,
            sample.bss,
        ),
        (
            NOTE,
            0x400,
            0x100_0000,
            note.len() as u64,
            note.len() as u64,
        ),
    ];
    let mut image = Vec::new();
    image.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    image.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    for value in [0x100_0000u64, 64, 0] {
        image.extend_from_slice(&value.to_le_bytes());
    }
    image.extend_from_slice(&[0, 0, 0, 0, 64, 0, 56, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
    for (kind, offset, gpa, file_size, size) in headers {
        image.extend_from_slice(&kind.to_le_bytes());
        image.extend_from_slice(&7u32.to_le_bytes());
        for value in [offset, gpa, gpa, file_size, size, 4] {
            image.extend_from_slice(&value.to_le_bytes());
        }
    }
    image.resize(0x400, 0);
    image.extend_from_slice(&note);
    image.resize(0x1000, 0);
    image.extend_from_slice(&sample.text);
    image.extend_from_slice(&data);
    image
}
