use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::*;
use crate::testing::{FakeMsi, IDENTITY};

const ENABLE: u16 = 0x8000;
const FUNCTION_MASK: u16 = 0x4000;

struct Bench {
    msi: FakeMsi,
    msix: Msix,
    config: ConfigSpace,
    cap: u16,
}

impl Bench {
    fn new(count: u16) -> Self {
        let msi = FakeMsi::default();
        let mut msix = Msix::new(count, &msi).unwrap();
        let mut config = ConfigSpace::new(&IDENTITY);
        let table = BarOffset {
            bar: 0,
            offset: 0x4000,
        };
        let pba = BarOffset {
            bar: 0,
            offset: 0x5000,
        };
        msix.add_capability(&mut config, table, pba).unwrap();
        let cap = u16::from(config.get_u8(0x34));
        Self {
            msi,
            msix,
            config,
            cap,
        }
    }

    fn control(&mut self, value: u16) {
        self.config.write(self.cap + 2, &value.to_le_bytes());
        self.msix.config_written(&self.config);
    }

    fn dword(&mut self, offset: u64, value: u32) {
        self.msix.table_write(offset, &value.to_le_bytes());
    }

    fn unmask(&mut self, index: u64, data: u32) {
        self.dword(index * 16, 0xfee0_0000);
        self.dword(index * 16 + 8, data);
        self.dword(index * 16 + 12, 0);
    }

    fn pba(&self) -> u64 {
        let mut data = [0; 8];
        self.msix.pba_read(0, &mut data);
        u64::from_le_bytes(data)
    }
}

#[test]
fn the_capability_names_size_table_and_pba() {
    let bench = Bench::new(3);
    assert_eq!(bench.config.get_u32(bench.cap), 0x0002_0011);
    assert_eq!(bench.config.get_u32(bench.cap + 4), 0x4000);
    assert_eq!(bench.config.get_u32(bench.cap + 8), 0x5000);
    assert_eq!((bench.msix.table_len(), bench.msix.pba_len()), (48, 8));
}

#[test]
fn a_vector_is_routed_only_when_nothing_masks_it() {
    let mut bench = Bench::new(2);
    bench.unmask(1, 0x41);
    assert_eq!(bench.msi.calls.load(Ordering::SeqCst), 0, "lazy");
    bench.control(ENABLE | FUNCTION_MASK);
    assert_eq!(bench.msi.route(1), None);
    bench.control(ENABLE);
    let message = MsiMessage {
        address: 0xfee0_0000,
        data: 0x41,
    };
    assert_eq!(bench.msi.route(1), Some(message));
    assert_eq!(bench.msi.route(0), None);
    assert_eq!(bench.msi.calls.load(Ordering::SeqCst), 1);
    bench.dword(28, 1);
    assert_eq!(bench.msi.route(1), None);
    bench.dword(28, 0);
    bench.control(0);
    assert_eq!(bench.msi.route(1), None);
}

#[test]
fn a_masked_vector_keeps_what_was_signalled() {
    let mut bench = Bench::new(70);
    bench.control(ENABLE);
    bench.unmask(0, 1);
    let vectors = bench.msix.vectors();
    vectors.fire(1);
    vectors.fire(69);
    vectors.fire(70);
    assert_eq!(bench.pba(), 0b10);
    let mut second = [0; 4];
    bench.msix.pba_read(8, &mut second);
    assert_eq!(u32::from_le_bytes(second), 1 << 5);
    let mut past = [0; 8];
    bench.msix.pba_read(16, &mut past);
    assert_eq!(past, [0xff; 8], "70 vectors have two words");
    assert_eq!(bench.pba(), 0b10, "reading does not clear");
    bench.unmask(1, 2);
    assert_eq!(bench.pba(), 0);
    assert_eq!(
        vectors.get(1).unwrap().eventfd().read().unwrap(),
        1,
        "the signal is there for the route to take"
    );
}

#[test]
fn reset_masks_everything_and_forgets_pending() {
    let mut bench = Bench::new(2);
    bench.control(ENABLE);
    bench.unmask(0, 1);
    bench.msix.vectors().fire(1);
    bench.msix.reset();
    assert_eq!(bench.msi.route(0), None);
    assert_eq!(bench.pba(), 0);
    let mut control = [0; 4];
    bench.msix.table_read(12, &mut control);
    assert_eq!(control, [1, 0, 0, 0]);
}

proptest! {
    /// ch#8506: any access of any width at any offset is answered; only aligned 4- and 8-byte
    /// writes inside the table change it.
    #[test]
    fn table_and_pba_take_any_access(
        steps in prop::collection::vec((any::<bool>(), 0_u64..0x60, 0_usize..9, any::<u64>()), 0..60),
    ) {
        let mut bench = Bench::new(3);
        let mut model = [[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0_u8]; 3].concat();
        bench.control(ENABLE);
        for (write, offset, width, value) in steps {
            let mut data = value.to_le_bytes()[..width].to_vec();
            let start = usize::try_from(offset).unwrap();
            let legal = matches!(width, 4 | 8) && start % width == 0;
            let cells = model.get_mut(start..start + width).filter(|_| legal);
            if write {
                bench.msix.table_write(offset, &data);
                if let Some(cells) = cells {
                    cells.copy_from_slice(&data);
                }
            } else {
                bench.msix.table_read(offset, &mut data);
                let expected = cells.map_or(vec![0xff; width], |c| c.to_vec());
                prop_assert_eq!(&data, &expected);
                bench.msix.pba_read(offset, &mut data);
            }
            for vector in 0..3_usize {
                let live = model[vector * 16 + 12] & 1 == 0;
                prop_assert_eq!(bench.msi.route(vector).is_some(), live);
            }
        }
    }
}
