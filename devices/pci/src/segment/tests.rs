use proptest::prelude::*;

use super::*;
use crate::testing::{Moves, Tagged};
use crate::{Bar, HostBridge, fuzz};

const LOW: u64 = 0xc000_0000;
const LOW_LEN: u64 = 0x1000_0000;
const HIGH: u64 = 0x80_0000_0000;
const HIGH_LEN: u64 = 0x40_0000_0000;
const COMMAND: u16 = 4;

struct Bench {
    mmio: Bus,
    segment: Segment,
}

impl Bench {
    fn new() -> Self {
        let mmio = Bus::new("mmio");
        let apertures = vec![
            Range::new(LOW, LOW_LEN).unwrap(),
            Range::new(HIGH, HIGH_LEN).unwrap(),
        ];
        let segment = Segment::new(mmio.clone(), apertures);
        Self { mmio, segment }
    }

    fn byte(&self, addr: u64) -> u8 {
        let mut data = [0];
        self.mmio.read(addr, &mut data);
        data[0]
    }

    fn plug(&self, device: u8, tag: u8, bars: &[Bar], at: &[(u8, u64)]) -> (Plugged, Moves) {
        let function = Tagged::new(tag, bars);
        let moves = Arc::clone(&function.moves);
        let plugged = self
            .segment
            .plug(bdf(device), Box::new(function), at)
            .unwrap();
        (plugged, moves)
    }

    fn write(&self, device: u8, offset: u16, value: u32) {
        self.segment
            .config_write(bdf(device), offset, &value.to_le_bytes());
    }

    fn decode(&self, device: u8, on: bool) {
        let value = [if on { 2 } else { 0 }, 0];
        self.segment.config_write(bdf(device), COMMAND, &value);
    }
}

fn bdf(device: u8) -> Bdf {
    Bdf::new(0, device, 0).unwrap()
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
fn the_window_follows_decode_and_address() {
    let bench = Bench::new();
    let (_p, moves) = bench.plug(1, 7, &[wide(0, 0x4000)], &[(0, HIGH)]);
    assert_eq!(bench.byte(HIGH), 0xff, "decode is off after reset");
    bench.decode(1, true);
    assert_eq!(bench.byte(HIGH + 0x3fff), 7);
    assert_eq!(bench.byte(HIGH + 0x4000), 0xff);
    let moved = u32::try_from(LOW).unwrap();
    bench.write(1, 0x14, 0);
    assert_eq!(bench.byte(HIGH), 0xff, "half way: address 0 is nowhere");
    bench.write(1, 0x10, moved);
    assert_eq!(bench.byte(LOW), 7);
    bench.decode(1, false);
    assert_eq!(bench.byte(LOW), 0xff);
    assert_eq!(
        *moves.lock().unwrap(),
        [(0, Some(HIGH)), (0, None), (0, Some(LOW)), (0, None)]
    );
}

#[test]
fn sizing_with_decode_on_disturbs_nothing() {
    let bench = Bench::new();
    let (_p, moves) = bench.plug(1, 7, &[wide(0, 0x4000)], &[(0, HIGH)]);
    bench.decode(1, true);
    for (offset, old) in [(0x10, 0), (0x14, u32::try_from(HIGH >> 32).unwrap())] {
        bench.write(1, offset, u32::MAX);
        assert_eq!(bench.byte(HIGH), 7);
        bench.write(1, offset, old);
        assert_eq!(bench.byte(HIGH), 7);
    }
    assert_eq!(moves.lock().unwrap().len(), 1);
}

#[test]
fn a_move_to_zero_or_out_of_the_apertures_only_unmaps() {
    let bench = Bench::new();
    let low = u32::try_from(LOW).unwrap();
    let (_p, _) = bench.plug(1, 7, &[narrow(0, 0x1000)], &[(0, LOW)]);
    bench.decode(1, true);
    for nowhere in [0, 0xfee0_0000, low - 0x1000, low + 0x1000_0000] {
        bench.write(1, 0x10, nowhere);
        assert_eq!(bench.byte(LOW), 0xff);
        assert_eq!(bench.byte(u64::from(nowhere)), 0xff);
        bench.write(1, 0x10, low);
        assert_eq!(bench.byte(LOW), 7);
    }
}

#[test]
fn a_conflicting_bar_waits_and_gets_its_window_when_space_is_free() {
    let bench = Bench::new();
    let low = u32::try_from(LOW).unwrap();
    let (first, _) = bench.plug(1, 1, &[narrow(0, 0x1000)], &[(0, LOW)]);
    let (_second, _) = bench.plug(2, 2, &[narrow(0, 0x1000)], &[(0, LOW + 0x1000)]);
    bench.decode(1, true);
    bench.decode(2, true);
    bench.write(2, 0x10, low);
    assert_eq!(bench.byte(LOW), 1);
    assert_eq!(bench.byte(LOW + 0x1000), 0xff);
    bench.write(1, 0x10, low + 0x1000);
    assert_eq!(bench.byte(LOW), 2, "swapped");
    assert_eq!(bench.byte(LOW + 0x1000), 1);
    bench.write(2, 0x10, low + 0x1000);
    drop(first);
    assert_eq!(bench.byte(LOW + 0x1000), 2, "unplugging frees too");
}

#[test]
fn unplug_hands_the_function_back_and_leaves_nothing() {
    let bench = Bench::new();
    let (plugged, _) = bench.plug(3, 9, &[narrow(0, 0x1000)], &[(0, LOW)]);
    bench.decode(3, true);
    assert_eq!(bench.byte(LOW), 9);
    assert_eq!(bench.segment.functions(), [bdf(3)]);
    let function = plugged.unplug().unwrap();
    assert_eq!(function.config().get_u16(0), 0x1234);
    assert_eq!(bench.byte(LOW), 0xff);
    let mut id = [0; 4];
    bench.segment.config_read(bdf(3), 0, &mut id);
    assert_eq!(id, [0xff; 4]);
    let (_again, _) = bench.plug(3, 9, &[narrow(0, 0x1000)], &[(0, LOW)]);
}

#[test]
fn bad_plugs_are_refused() {
    let bench = Bench::new();
    let (_p, _) = bench.plug(1, 1, &[], &[]);
    let tagged = || Box::new(Tagged::new(2, &[narrow(0, 0x1000)]));
    let taken = bench.segment.plug(bdf(1), tagged(), &[]).err();
    assert_eq!(taken, Some(PlugError::Taken { bdf: bdf(1) }));
    for base in [LOW + 0x800, 0, HIGH, LOW + LOW_LEN] {
        let err = bench.segment.plug(bdf(2), tagged(), &[(0, base)]).err();
        assert!(matches!(err, Some(PlugError::Place { .. })), "{base:#x}");
    }
    let err = bench.segment.plug(bdf(2), tagged(), &[(1, LOW)]).err();
    assert!(matches!(err, Some(PlugError::Place { bar: 1, .. })));
}

#[test]
fn ecam_and_mechanism_1_reach_the_same_registers() {
    let bench = Bench::new();
    let _bridge = bench
        .segment
        .plug(Bdf::HOST_BRIDGE, Box::new(HostBridge::new()), &[])
        .unwrap();
    let (_p, _) = bench.plug(4, 1, &[], &[]);
    let (ecam, cf8) = (bench.segment.ecam(), bench.segment.cf8());
    let mut id = [0; 4];
    ecam.read(Access { offset: 0 }, &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x0008_1b36);
    ecam.read(Access { offset: 4 << 15 }, &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x5678_1234);
    ecam.read(Access { offset: 5 << 15 }, &mut id);
    assert_eq!(id, [0xff; 4]);
    let mut across = [0; 8];
    ecam.read(Access { offset: 0xffc }, &mut across);
    assert_eq!(
        across, [0xff; 8],
        "an access may not pass the function's end"
    );

    let address = 0x8000_2000_u32;
    cf8.write(Access { offset: 0 }, &address.to_le_bytes());
    cf8.write(Access { offset: 1 }, &[0xff]);
    cf8.write(Access { offset: 0 }, &[0xff, 0xff]);
    cf8.read(Access { offset: 0 }, &mut id);
    assert_eq!(u32::from_le_bytes(id), address, "dwords only");
    cf8.read(Access { offset: 4 }, &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x5678_1234);
    let mut half = [0; 2];
    cf8.read(Access { offset: 6 }, &mut half);
    assert_eq!(half, [0x78, 0x56]);
    cf8.read(Access { offset: 7 }, &mut half);
    assert_eq!(half, [0xff; 2], "a data access may not pass the dword");
    cf8.write(
        Access { offset: 0 },
        &(address & !0x8000_0000).to_le_bytes(),
    );
    cf8.read(Access { offset: 4 }, &mut id);
    assert_eq!(id, [0xff; 4], "disabled");
}

#[test]
fn function_0_says_when_there_are_others() {
    let bench = Bench::new();
    let header = |offset: u16, len: usize| {
        let mut data = vec![0; len];
        bench.segment.config_read(bdf(6), offset, &mut data);
        data
    };
    let (_zero, _) = bench.plug(6, 1, &[], &[]);
    assert_eq!(header(0x0e, 1), [0]);
    let other = Bdf::new(0, 6, 5).unwrap();
    let plugged = bench
        .segment
        .plug(other, Box::new(Tagged::new(1, &[])), &[]);
    assert_eq!(header(0x0e, 1), [0x80]);
    assert_eq!(header(0x0c, 4), [0, 0, 0x80, 0]);
    assert_eq!(header(0x0f, 1), [0]);
    drop(plugged);
    assert_eq!(header(0x0e, 1), [0]);
}

proptest! {
    /// Whatever a guest programs, the windows never overlap, never leave the apertures, and a BAR
    /// that decodes inside an aperture has a window unless somebody else is there.
    #[test]
    fn bars_move_anywhere(
        steps in prop::collection::vec((1_u8..4, 0_u16..4, 0_u32..8, any::<bool>()), 0..80),
    ) {
        let bench = Bench::new();
        let guards: Vec<_> = (1..4_u8)
            .map(|n| bench.plug(n, n, &[narrow(0, 0x1000), wide(2, 0x2000)], &[]))
            .collect();
        let low = u32::try_from(LOW).unwrap();
        for (device, what, where_, flag) in steps {
            match what {
                0 => bench.decode(device, flag),
                1 => bench.write(device, 0x10, if flag { low + where_ * 0x1000 } else { where_ }),
                2 => bench.write(device, 0x18, if where_ == 7 { u32::MAX } else { where_ * 0x2000 }),
                _ => bench.write(device, 0x1c, if flag { 0x80 } else { where_ }),
            }
            for (_, moves) in &guards {
                for (_, base) in moves.lock().unwrap().iter() {
                    prop_assert!(base.is_none_or(|b| b >= LOW));
                }
            }
        }
        for device in 1..4_u8 {
            bench.decode(device, false);
        }
        for page in 0..8 {
            prop_assert_eq!(bench.byte(LOW + page * 0x1000), 0xff);
            prop_assert_eq!(bench.byte(HIGH + page * 0x1000), 0xff);
        }
    }

    #[test]
    fn any_accesses_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        let bench = Bench::new();
        let _guards: Vec<_> = (0..4_u8)
            .map(|n| bench.plug(n, n, &[narrow(0, 0x1000), wide(2, 0x2000)], &[(0, LOW)]))
            .collect();
        fuzz::run(&bench.segment, &bench.mmio, &bytes);
    }
}
