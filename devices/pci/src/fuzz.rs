//! One entry for fuzzing: bytes in, configuration and BAR accesses out.

use std::sync::Arc;

use testudo_bus::{Access, Bus, Target};

use crate::Segment;

/// Bytes of one step: a kind, a width, a value and an address.
const STEP: usize = 16;
/// How far into a window way 2 reaches.
const NEAR: u64 = (16 << 20) - 1;

/// Runs `bytes` as accesses against `segment` through `mmio`, ECAM and ports 0xcf8 to 0xcff.
///
/// Each step takes 16 bytes: way (0 ECAM, 1 mechanism #1, 2 the first 16 MiB of the first memory
/// window, 3 anywhere on the MMIO bus) and direction (bit 7), width, six bytes of address, eight
/// of data. Nothing a guest can do through these may panic or hang.
pub fn run(segment: &Segment, mmio: &Bus, bytes: &[u8]) {
    let (ecam, cf8) = (segment.ecam(), segment.cf8());
    for step in bytes.as_chunks::<STEP>().0 {
        let [kind, width, address @ .., d0, d1, d2, d3, d4, d5, d6, d7] = *step;
        let [a0, a1, a2, a3, a4, a5] = address;
        let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, 0, 0]);
        let mut data = [d0, d1, d2, d3, d4, d5, d6, d7];
        let width = 1_usize.wrapping_shl(u32::from(width & 3));
        let Some(data) = data.get_mut(..width) else {
            continue;
        };
        let write = kind & 0x80 != 0;
        match kind & 3 {
            0 => touch(
                &ecam,
                address & (Segment::ECAM_LEN.wrapping_sub(1)),
                data,
                write,
            ),
            1 => touch(
                &cf8,
                address & (Segment::CF8_LEN.wrapping_sub(1)),
                data,
                write,
            ),
            way => {
                let window = segment.first_window().filter(|_| way == 2);
                let at = match window {
                    Some(base) => base.wrapping_add(address & NEAR),
                    None => address,
                };
                if write {
                    mmio.write(at, data);
                } else {
                    mmio.read(at, data);
                }
            }
        }
    }
}

fn touch(target: &Arc<dyn Target>, offset: u64, data: &mut [u8], write: bool) {
    let at = Access { offset };
    if write {
        target.write(at, data);
    } else {
        target.read(at, data);
    }
}
