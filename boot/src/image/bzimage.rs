//! bzImage: setup code, then a protected-mode kernel that decompresses itself.
//! Linux `Documentation/arch/x86/boot.rst`.

use crate::image::{KernelError, damaged, reaches};
use crate::source::Source;

/// Where the setup header begins.
pub(crate) const HEADER: usize = 0x1f1;
/// Where it ends at the latest: what follows in the zero page belongs to others.
const HEADER_MAX: usize = 0x290;

const SETUP_SECTS: usize = 0x1f1;
const SYSSIZE: usize = 0x1f4;
const HEADER_LENGTH: usize = 0x201;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const LOADFLAGS: usize = 0x211;
const INITRD_ADDR_MAX: usize = 0x22c;
const KERNEL_ALIGNMENT: usize = 0x230;
const RELOCATABLE: usize = 0x234;
const XLOADFLAGS: usize = 0x236;
const CMDLINE_SIZE: usize = 0x238;
const PREF_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;

/// The 64-bit entry is this far into the protected-mode kernel.
pub(crate) const ENTRY_64: u64 = 0x200;

const OLDEST: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// Largest alignment taken: the largest Linux can be configured for is 16 MiB.
const ALIGNMENT_MAX: u64 = 1 << 30;

/// The facts in a setup header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bzimage {
    /// The header as it stands in the file, from 0x1f1, for the zero page.
    pub(crate) header: Vec<u8>,
    /// Where the protected-mode kernel begins in the file, and its bytes.
    pub(crate) payload: (u64, u64),
    /// Where it wants to run, a multiple of `alignment` if `relocatable`.
    pub(crate) pref_address: u64,
    /// Bytes it needs from there before it reads the memory map; no less than the payload.
    pub(crate) init_size: u64,
    /// Alignment of other places to run, a power of two.
    pub(crate) alignment: u64,
    /// Whether it runs in other places.
    pub(crate) relocatable: bool,
    /// Highest address the initrd may touch.
    pub(crate) initrd_addr_max: u64,
    /// Longest command line, without terminator.
    pub(crate) cmdline_size: u64,
    version: u16,
}

pub(super) fn has_magic(head: &[u8]) -> bool {
    head.get(MAGIC..)
        .is_some_and(|rest| rest.starts_with(b"HdrS"))
}

impl Bzimage {
    pub(super) fn parse(source: &Source, head: &[u8]) -> Result<Self, KernelError> {
        let name = || source.name().into();
        let version = u16_at(head, VERSION);
        if version < OLDEST {
            return Err(KernelError::Protocol {
                name: name(),
                version,
            });
        }
        reaches(source, "the setup header", INIT_SIZE as u64 + 4)?;
        if u16_at(head, XLOADFLAGS) & XLF_KERNEL_64 == 0 {
            return Err(KernelError::Not64 { name: name() });
        }
        if byte_at(head, LOADFLAGS) & LOADED_HIGH == 0 {
            return Err(damaged(
                source,
                "it is a zImage, whose kernel is loaded low",
            ));
        }
        let end = MAGIC.saturating_add(usize::from(byte_at(head, HEADER_LENGTH)));
        let header = head
            .get(HEADER..end.clamp(INIT_SIZE + 4, HEADER_MAX))
            .ok_or_else(|| damaged(source, "its setup header has no end"))?
            .to_vec();

        let sectors = match byte_at(head, SETUP_SECTS) {
            0 => 4,
            n => u64::from(n),
        };
        let start = sectors.saturating_add(1).saturating_mul(512);
        let size = u64::from(u32_at(head, SYSSIZE)).saturating_mul(16);
        if size <= ENTRY_64 {
            return Err(damaged(source, "its kernel ends before its 64-bit entry"));
        }
        reaches(source, "the kernel", start.saturating_add(size))?;

        let alignment = u64::from(u32_at(head, KERNEL_ALIGNMENT));
        if !alignment.is_power_of_two() || !(4096..=ALIGNMENT_MAX).contains(&alignment) {
            return Err(damaged(
                source,
                "its alignment is no power of two between 4 KiB and 1 GiB",
            ));
        }
        Ok(Self {
            header,
            payload: (start, size),
            pref_address: u64_at(head, PREF_ADDRESS),
            init_size: u64::from(u32_at(head, INIT_SIZE)).max(size),
            alignment,
            relocatable: byte_at(head, RELOCATABLE) != 0,
            initrd_addr_max: u64::from(u32_at(head, INITRD_ADDR_MAX)),
            cmdline_size: u64::from(u32_at(head, CMDLINE_SIZE)),
            version,
        })
    }

    /// Version of the boot protocol, major in the high byte.
    pub fn version(&self) -> u16 {
        self.version
    }
}

fn byte_at(head: &[u8], offset: usize) -> u8 {
    bytes_at::<1>(head, offset).map_or(0, u8::from_le_bytes)
}

fn u16_at(head: &[u8], offset: usize) -> u16 {
    bytes_at(head, offset).map_or(0, u16::from_le_bytes)
}

fn u32_at(head: &[u8], offset: usize) -> u32 {
    bytes_at(head, offset).map_or(0, u32::from_le_bytes)
}

fn u64_at(head: &[u8], offset: usize) -> u64 {
    bytes_at(head, offset).map_or(0, u64::from_le_bytes)
}

fn bytes_at<const N: usize>(head: &[u8], offset: usize) -> Option<[u8; N]> {
    head.get(offset..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Image, ImageKind};
    use crate::x86_64::samples::{BzimageSample, bzimage};

    fn identify(bytes: Vec<u8>) -> Result<Image, KernelError> {
        Image::identify(Source::from_bytes("vmlinuz", bytes).unwrap())
    }

    fn message(bytes: Vec<u8>) -> String {
        identify(bytes).unwrap_err().to_string()
    }

    #[test]
    fn header_fields_are_taken() {
        let image = identify(bzimage(&BzimageSample::default())).unwrap();
        let ImageKind::Bzimage(bz) = image.kind() else {
            panic!("{image:?}")
        };
        assert_eq!(bz.payload, (512 * 5, 64 * 1024));
        assert_eq!(
            (bz.pref_address, bz.alignment, bz.relocatable),
            (16 << 20, 2 << 20, true)
        );
        assert_eq!(bz.header.len(), 0x26c - 0x1f1);
        assert_eq!(bz.version(), 0x20f);
    }

    #[test]
    fn bad_headers_are_named() {
        let old = bzimage(&BzimageSample {
            version: 0x20b,
            ..Default::default()
        });
        assert!(message(old).starts_with("vmlinuz speaks boot protocol 2.11, and 2.12"));
        let small = bzimage(&BzimageSample {
            xloadflags: 0,
            ..Default::default()
        });
        assert!(message(small).contains("32-bit"));
        let odd = bzimage(&BzimageSample {
            alignment: 0x30_0000,
            ..Default::default()
        });
        assert!(message(odd).contains("power of two"));
        let mut cut = bzimage(&BzimageSample::default());
        cut.truncate(30_000);
        assert_eq!(
            message(cut),
            "vmlinuz is truncated: the kernel ends at byte 68096 and the file has 30000"
        );
        let mut cut = bzimage(&BzimageSample::default());
        cut.truncate(0x220);
        assert!(message(cut).contains("truncated: the setup header"));
    }
}
