//! The transport's registers under a driver that does not keep to the rules.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use testudo_bus::Access;
use testudo_pci::PciFunction;

use super::Subject;
use crate::driver::{Areas, Driver, RAM_SIZE, reg};
use crate::{Status, VirtioPci, features};

fn queue_registers(driver: &mut Driver) -> Vec<u8> {
    (reg::QUEUE_SIZE..0x38)
        .map(|offset| driver.read::<1>(offset)[0])
        .collect()
}

fn scribble_on_queue(driver: &mut Driver) {
    for size in [0, 1, 3, 8, 32, 0x8000, 0xffff] {
        driver.put_u16(reg::QUEUE_SIZE, size);
    }
    for field in [reg::QUEUE_DESC, reg::QUEUE_DRIVER, reg::QUEUE_DEVICE] {
        driver.put_u64(field, u64::MAX);
        driver.put_u32(field, 0x1234);
        driver.put_u32(field + 4, 0xffff_ffff);
    }
    driver.put_u16(reg::QUEUE_VECTOR, 0);
    driver.put_u16(reg::QUEUE_ENABLE, 0);
}

/// CVE-2026-5747: the size of a running queue was changed.
pub(crate) fn queue_registers_are_frozen_at_driver_ok(subject: &Subject) {
    let mut driver = subject.driver();
    driver.start_full();
    driver.put_u16(reg::QUEUE_SELECT, subject.queue);
    let before = queue_registers(&mut driver);
    let vector = driver.u16(reg::CONFIG_VECTOR);
    subject.serve(&mut driver);
    scribble_on_queue(&mut driver);
    driver.put_u16(reg::CONFIG_VECTOR, 1);
    driver.put_u32(reg::DRIVER_FEATURE_SELECT, 0);
    driver.put_u32(reg::DRIVER_FEATURE, 0);
    assert_ne!(driver.read(reg::DRIVER_FEATURE), [0; 4]);
    assert_eq!(queue_registers(&mut driver), before);
    assert_eq!(driver.u16(reg::CONFIG_VECTOR), vector);
    for _ in 0..40 {
        subject.serve(&mut driver);
    }
    // Neither does a failed start open them.
    assert!(driver.negotiate(features::COMMON));
    driver.put_u16(reg::QUEUE_SELECT, subject.queue);
    driver.put_u16(reg::QUEUE_ENABLE, 1);
    driver.driver_ok();
    assert_eq!(driver.status(), 0x0f | Status::NEEDS_RESET);
    let before = queue_registers(&mut driver);
    scribble_on_queue(&mut driver);
    assert_eq!(queue_registers(&mut driver), before);
    driver.driver_ok();
    assert_eq!(driver.status(), 0x0f | Status::NEEDS_RESET);
}

/// ch#7917: a queue number past the last one panicked the VMM.
pub(crate) fn a_bad_queue_number_selects_nothing(subject: &Subject) {
    let mut driver = subject.driver();
    assert!(driver.negotiate(features::COMMON));
    let count = driver.u16(reg::NUM_QUEUES);
    for index in [count, count + 1, 0x7fff, 0xffff] {
        driver.put_u16(reg::QUEUE_SELECT, index);
        assert_eq!(driver.u16(reg::QUEUE_SELECT), index);
        scribble_on_queue(&mut driver);
        assert!(queue_registers(&mut driver).iter().all(|b| *b == 0));
        assert_eq!(driver.u16(reg::QUEUE_NOTIFY_OFF), 0);
    }
    driver.start_full();
    subject.serve(&mut driver);
}

fn refused_start(subject: &Subject, driver: &mut Driver, areas: &Areas) {
    let offered = driver.offered();
    assert!(driver.negotiate(offered));
    driver.put_u16(reg::CONFIG_VECTOR, 0);
    driver.set_up(subject.queue, areas);
    driver.driver_ok();
    assert_eq!(driver.status(), 0x0f | Status::NEEDS_RESET);
    driver.interrupt(0);
    driver.kick(subject.queue);
}

pub(crate) fn a_bad_queue_size_needs_a_reset(subject: &Subject) {
    let mut driver = subject.driver();
    driver.put_u16(reg::QUEUE_SELECT, subject.queue);
    let max = driver.u16(reg::QUEUE_SIZE);
    for size in [0, 3, 6, max - 1, max + 1, max.wrapping_mul(2), 0xffff] {
        let areas = Areas::of(subject.queue, 16);
        refused_start(subject, &mut driver, &Areas { size, ..areas });
    }
    driver.start_full();
    subject.serve(&mut driver);
}

pub(crate) fn only_a_one_enables_a_queue(subject: &Subject) {
    let mut driver = subject.driver();
    assert!(driver.negotiate(features::COMMON));
    driver.put_u16(reg::QUEUE_SELECT, subject.queue);
    for (value, enabled) in [(0, 0), (2, 0), (0xffff, 0), (1, 1), (0, 1)] {
        driver.put_u16(reg::QUEUE_ENABLE, value);
        assert_eq!(driver.u16(reg::QUEUE_ENABLE), enabled, "after {value:#x}");
    }
}

pub(crate) fn bad_areas_need_a_reset(subject: &Subject) {
    let mut driver = subject.driver();
    let good = Areas::of(subject.queue, 16);
    let end = u64::try_from(RAM_SIZE).unwrap();
    for bad in [0, end, end - 16, u64::MAX - 15, 1 << 40] {
        for areas in [
            Areas { desc: bad, ..good },
            Areas { avail: bad, ..good },
            Areas { used: bad, ..good },
        ] {
            refused_start(subject, &mut driver, &areas);
        }
    }
    for areas in [
        Areas {
            desc: good.desc + 8,
            ..good
        },
        Areas {
            avail: good.avail + 1,
            ..good
        },
        Areas {
            used: good.used + 2,
            ..good
        },
    ] {
        refused_start(subject, &mut driver, &areas);
    }
    driver.start_full();
    subject.serve(&mut driver);
}

pub(crate) fn features_are_agreed_or_refused(subject: &Subject) {
    let mut driver = subject.driver();
    let offered = driver.offered();
    assert!(!driver.negotiate(offered & !features::VERSION_1));
    assert!(!driver.negotiate(0));
    for bit in (0..64).filter(|bit| offered & (1 << bit) == 0) {
        assert!(!driver.negotiate(offered | (1 << bit)), "bit {bit}");
    }
    for page in [2, 3, u32::MAX] {
        driver.put_u32(reg::DEVICE_FEATURE_SELECT, page);
        assert_eq!(driver.read(reg::DEVICE_FEATURE), [0; 4]);
        driver.put_u32(reg::DRIVER_FEATURE_SELECT, page);
        driver.put_u32(reg::DRIVER_FEATURE, u32::MAX);
        assert_eq!(driver.read(reg::DRIVER_FEATURE), [0; 4]);
    }
    assert!(driver.negotiate(offered));
    driver.put_u32(reg::DRIVER_FEATURE_SELECT, 0);
    let agreed = driver.read::<4>(reg::DRIVER_FEATURE);
    driver.put_u32(reg::DRIVER_FEATURE, u32::MAX);
    assert_eq!(driver.read::<4>(reg::DRIVER_FEATURE), agreed);
}

pub(crate) fn driver_ok_out_of_order_needs_a_reset(subject: &Subject) {
    let mut driver = subject.driver();
    driver.set_status(0);
    driver.set_status(Status::DRIVER_OK);
    assert_eq!(driver.status(), Status::DRIVER_OK | Status::NEEDS_RESET);
    let offered = driver.offered();
    assert!(driver.negotiate(offered));
    driver.set_status(Status::FAILED);
    driver.set_up(subject.queue, &Areas::of(subject.queue, 16));
    driver.driver_ok();
    assert_ne!(driver.status() & Status::NEEDS_RESET, 0);
    driver.start_full();
    subject.serve(&mut driver);
}

pub(crate) fn every_offset_and_width_is_answered(subject: &Subject) {
    let mut driver = subject.driver();
    for fill in [0x00, 0x01, 0x5a, 0xff] {
        for offset in (0..VirtioPci::BAR_SIZE).filter(|o| o % 0x1000 < 0x80) {
            for width in 1..=8 {
                let at = Access { offset };
                let mut data = vec![fill; width];
                driver.function.bar_write(0, at, &data);
                driver.function.bar_read(0, at, &mut data);
                driver.function.bar_read(3, at, &mut data);
                assert!(data.iter().all(|b| *b == 0xff));
            }
        }
        for offset in 0..0x120_u16 {
            for width in 1..=8 {
                let mut data = vec![fill; width];
                driver.function.config_write(offset, &data);
                driver.function.config_read(offset, &mut data);
            }
        }
    }
    driver.start_full();
    subject.serve(&mut driver);
}

#[derive(Debug, Clone)]
enum Step {
    Bar(u64, Vec<u8>),
    Config(u16, Vec<u8>),
    Start,
    Kick,
}

fn step() -> impl Strategy<Value = Step> {
    let data = || {
        (0_usize..4, any::<u64>())
            .prop_map(|(width, value)| value.to_le_bytes()[..1 << width].to_vec())
    };
    prop_oneof![
        8 => (0_u64..0x40, data()).prop_map(|(at, data)| Step::Bar(at, data)),
        2 => (0_u64..VirtioPci::BAR_SIZE, data()).prop_map(|(at, data)| Step::Bar(at, data)),
        2 => (0_u16..0x100, data()).prop_map(|(at, data)| Step::Config(at, data)),
        1 => Just(Step::Start),
        1 => Just(Step::Kick),
    ]
}

/// Whatever comes before it, a driver that begins with a reset gets a working device.
pub(crate) fn arbitrary_accesses_are_survived(subject: &Subject) {
    let mut runner = TestRunner::new(Config {
        cases: 64,
        failure_persistence: None,
        ..Config::default()
    });
    let steps = prop::collection::vec(step(), 0..200);
    let result = runner.run(&steps, |steps| {
        let mut driver = subject.driver();
        for step in steps {
            match step {
                Step::Bar(offset, mut data) => {
                    driver.write(offset, &data);
                    driver.function.bar_read(0, Access { offset }, &mut data);
                }
                Step::Config(offset, mut data) => {
                    driver.function.config_write(offset, &data);
                    driver.function.config_read(offset, &mut data);
                }
                Step::Start => driver.start_full(),
                Step::Kick => driver.kick(subject.queue),
            }
        }
        driver.start_full();
        subject.serve(&mut driver);
        Ok(())
    });
    if let Err(e) = result {
        panic!("{e}");
    }
}

pub(crate) fn the_access_window_reaches_the_bar(subject: &Subject) {
    let mut driver = subject.driver();
    let function = &mut driver.function;
    let mut capability = 0;
    let mut at = u16::from(function.config().get_u8(0x34));
    while at != 0 {
        if function.config().get_u8(at) == 9 && function.config().get_u8(at + 3) == 5 {
            capability = at;
        }
        at = u16::from(function.config().get_u8(at + 1));
    }
    assert_ne!(capability, 0);
    let aim = |function: &mut VirtioPci, bar: u8, offset: u32, length: u32| {
        function.config_write(capability + 4, &[bar]);
        function.config_write(capability + 8, &offset.to_le_bytes());
        function.config_write(capability + 12, &length.to_le_bytes());
    };
    let data = capability + 16;
    let status = u32::try_from(reg::STATUS).unwrap();
    aim(function, 0, status, 1);
    function.config_write(data, &[Status::ACKNOWLEDGE]);
    let mut byte = [0];
    function.config_read(data, &mut byte);
    assert_eq!(byte, [Status::ACKNOWLEDGE]);
    let queues = u32::try_from(reg::NUM_QUEUES).unwrap();
    aim(function, 0, queues, 2);
    let mut word = [0; 2];
    function.config_read(data, &mut word);
    let direct = driver.read::<2>(reg::NUM_QUEUES);
    assert_eq!(word, direct);
    let function = &mut driver.function;
    for (bar, offset, length) in [
        (1, 0, 1),
        (0, status, 3),
        (0, status, 8),
        (0, status - 1, 2),
        (0, 0x7ffc, 8),
        (0, 0x8000, 1),
        (0, u32::MAX, 1),
    ] {
        aim(function, bar, offset, length);
        function.config_write(data, &[1, 2, 3, 4]);
        let mut kept = [0; 4];
        function.config_read(data, &mut kept);
        assert_eq!(kept, [1, 2, 3, 4], "{bar} {offset:#x} {length}");
    }
    assert_eq!(
        driver.status(),
        Status::ACKNOWLEDGE,
        "no illegal access reached it"
    );
}
