use proptest::prelude::*;

use super::*;
use crate::testing::IDENTITY;
use crate::{Capability, PcieType};

fn space(bars: &[Bar]) -> ConfigSpace {
    let mut space = ConfigSpace::new(&IDENTITY);
    for bar in bars {
        space.add_bar(*bar).unwrap();
    }
    space
}

fn narrow(index: u8, size: u64) -> Bar {
    Bar {
        index,
        size,
        wide: false,
        prefetchable: false,
    }
}

fn wide(index: u8, size: u64) -> Bar {
    Bar {
        index,
        size,
        wide: true,
        prefetchable: true,
    }
}

#[test]
fn identity_is_readable_and_not_writable() {
    let mut space = space(&[]);
    let before: Vec<u8> = (0..0x40).map(|o| space.get_u8(o)).collect();
    assert_eq!(space.get_u32(0), 0x5678_1234);
    assert_eq!(space.get_u32(8), 0xff01_0209);
    assert_eq!(space.get_u32(0x2c), 0xef01_abcd);
    for offset in 0..0x40_u16 {
        space.write(offset, &[0xff]);
    }
    for (offset, old) in (0..0x40_u16).zip(before) {
        let writable = matches!(offset, 0x04 | 0x05 | 0x0c | 0x3c);
        assert!(writable || space.get_u8(offset) == old, "{offset:#x}");
    }
    assert_eq!(space.get_u16(regs::COMMAND), 0x0546);
}

#[test]
fn status_errors_clear_by_one() {
    let mut space = space(&[]);
    space.set(regs::STATUS, &0xf910_u16.to_le_bytes());
    space.write(regs::STATUS, &0x0100_u16.to_le_bytes());
    assert_eq!(space.get_u16(regs::STATUS), 0xf810);
    space.write(regs::STATUS, &[0xff, 0xff]);
    assert_eq!(space.get_u16(regs::STATUS), 0x0010);
}

#[test]
fn sizing_a_32_bit_bar() {
    let mut space = space(&[narrow(0, 0x1000)]);
    space.write(0x10, &[0xff; 4]);
    assert_eq!(space.get_u32(0x10), 0xffff_f000);
    space.write(0x10, &0xfebf_1234_u32.to_le_bytes());
    assert_eq!(space.bar_address(0), Some(0xfebf_1000));
}

#[test]
fn sizing_a_64_bit_bar_larger_than_4_gib() {
    let mut space = space(&[wide(2, 1 << 36)]);
    space.write(0x18, &[0xff; 4]);
    space.write(0x1c, &[0xff; 4]);
    assert_eq!(space.get_u32(0x18), regs::BAR_WIDE | regs::BAR_PREFETCHABLE);
    assert_eq!(space.get_u32(0x1c), 0xffff_fff0);
    assert_eq!(space.decoding(2), Decoding::Off);
    space.write(regs::COMMAND, &[2, 0]);
    assert_eq!(space.decoding(2), Decoding::Held);
    space.write(0x18, &[0; 4]);
    space.write(0x1c, &0x30_u32.to_le_bytes());
    assert_eq!(space.decoding(2), Decoding::At(0x30_0000_0000));
}

#[test]
fn absent_bars_read_zero() {
    let mut space = space(&[narrow(1, 0x100)]);
    space.write(0x10, &[0xff; 24]);
    assert_eq!(space.get_u32(0x10), 0);
    assert_eq!(space.get_u32(0x14), 0xffff_ff00);
    assert_eq!(space.get_u32(0x18), 0);
    assert_eq!(space.bar_address(0), None);
}

#[test]
fn impossible_bars_are_refused() {
    let mut space = space(&[wide(0, 0x1000)]);
    for bar in [
        narrow(1, 0x1000),
        narrow(0, 0x1000),
        narrow(6, 0x1000),
        wide(5, 0x1000),
        narrow(3, 0x1001),
        narrow(3, 8),
        narrow(3, 0),
        narrow(3, 1 << 32),
    ] {
        assert!(space.add_bar(bar).is_err(), "{bar:?}");
    }
    space.add_bar(wide(4, 1 << 63)).unwrap();
    space.add_bar(narrow(3, 1 << 31)).unwrap();
    assert!(space.add_bar(wide(2, 0x1000)).is_err());
}

#[test]
fn the_capability_list_is_walkable() {
    let mut space = space(&[]);
    assert_eq!(space.get_u16(regs::STATUS) & regs::STATUS_CAPABILITIES, 0);
    let vendor = Capability::vendor(&[1, 2, 3], &[0, 0xf0]);
    let a = space.add_capability(&vendor).unwrap();
    let express = Capability::pci_express(PcieType::RootComplexIntegrated);
    let b = space.add_capability(&express).unwrap();
    let mut seen = Vec::new();
    let mut at = u16::from(space.get_u8(regs::CAPABILITIES));
    while at != 0 {
        assert_eq!(at % 4, 0);
        seen.push((at, space.get_u8(at)));
        at = u16::from(space.get_u8(at + 1));
    }
    assert_eq!(seen, [(a, 0x09), (b, 0x10)]);
    assert_eq!(space.get_u8(a + 2), 6, "length of the vendor capability");
    assert_eq!(space.get_u16(b + 2), 0x92, "integrated endpoint, version 2");
    space.write(a + 3, &[0xff; 3]);
    assert_eq!(space.get_u32(a + 2), 0x03f2_0106);
}

#[test]
fn a_full_list_is_an_error() {
    let mut space = space(&[]);
    let big = Capability::vendor(&[0; 0x60], &[]);
    space.add_capability(&big).unwrap();
    let err = space.add_capability(&big).unwrap_err();
    assert_eq!(
        err,
        LayoutError::Full {
            id: 9,
            size: 0x63,
            free: 0x5c
        }
    );
}

#[test]
fn extended_capabilities_link_and_absent_ones_read_zero() {
    let mut space = space(&[]);
    assert_eq!(space.get_u32(0x100), 0);
    let a = space
        .add_extended_capability(3, 1, &[7; 8], &[0xff])
        .unwrap();
    let b = space.add_extended_capability(0xb, 1, &[0; 4], &[]).unwrap();
    assert_eq!((a, b), (0x100, 0x10c));
    assert_eq!(space.get_u32(a), 0x10c1_0003);
    assert_eq!(space.get_u32(b), 0x0001_000b);
    space.write(a, &[0xff; 12]);
    assert_eq!(space.get_u32(a), 0x10c1_0003);
    assert_eq!(space.get_u32(a + 4), 0x0707_07ff);
    let mut tail = [1; 8];
    space.read(0xffc, &mut tail);
    assert_eq!(tail, [0; 8]);
}

proptest! {
    /// Whatever the widths and the order, what the guest programs is what it reads back, and
    /// flags and low bits never move.
    #[test]
    fn bars_take_any_width(
        size_bits in 4_u32..48,
        writes in prop::collection::vec((0x0e_u16..0x2a, prop::collection::vec(any::<u8>(), 1..9)), 0..40),
    ) {
        let size = 1_u64 << size_bits;
        let mut space = space(&[wide(0, size)]);
        let mut model = [0_u8; 8];
        for (offset, data) in &writes {
            space.write(*offset, data);
            for (at, byte) in (*offset..).zip(data) {
                if let Some(cell) = at.checked_sub(0x10).and_then(|i| model.get_mut(usize::from(i))) {
                    *cell = *byte;
                }
            }
            let expected = u64::from_le_bytes(model) & !(size - 1);
            prop_assert_eq!(space.bar_address(0), Some(expected));
            prop_assert_eq!(space.get_u8(0x10) & 0xf, 0xc);
        }
    }
}
