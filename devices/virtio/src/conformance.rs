//! The tests every model passes.
//!
//! `conformance!(name, SUBJECT)` gives a model these tests; `SUBJECT` says how to make it and what
//! an ordinary request looks like. What differs between models stays in their own tests.

mod malformed;
mod registers;

use std::sync::atomic::Ordering;

use testudo_bus::{Access, Bus, Range};
use testudo_pci::{Bdf, PciFunction, Segment};
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{
    Areas, BUFFERS, Desc, Driver, INDIRECT, NEXT, NOTIFY, TABLES, WRITE, offer, reg, write_desc,
};
use crate::{IoHandle, VirtioModel, VirtioPci, features};

pub(crate) use malformed::*;
pub(crate) use registers::*;

/// A model under test.
pub(crate) struct Subject {
    pub(crate) make: fn(&IoHandle) -> Box<dyn VirtioModel>,
    /// The queue requests go to.
    pub(crate) queue: u16,
    /// What an ordinary request gives and how many bytes it lets the device write.
    pub(crate) request: fn() -> (Vec<u8>, u32),
}

impl Subject {
    pub(crate) fn driver(&self) -> Driver {
        Driver::new(self.make)
    }

    fn descs(&self, driver: &Driver) -> Vec<Desc> {
        let (readable, writable) = (self.request)();
        let mut parts = Vec::new();
        if !readable.is_empty() {
            driver
                .ram
                .write_slice(&readable, GuestAddress(BUFFERS))
                .unwrap();
            parts.push((BUFFERS, u32::try_from(readable.len()).unwrap(), 0));
        }
        if writable != 0 {
            parts.push((BUFFERS + 0x1_0000, writable, WRITE));
        }
        let last = parts.len() - 1;
        (0_u16..)
            .zip(parts)
            .map(|(n, (addr, len, flags))| {
                let more = if usize::from(n) < last { NEXT } else { 0 };
                Desc::new(addr, len, flags | more, n + 1)
            })
            .collect()
    }

    /// One ordinary request, start to end.
    pub(crate) fn serve(&self, driver: &mut Driver) {
        let descs = self.descs(driver);
        driver.submit(self.queue, &descs);
        let (id, len) = driver.used(self.queue);
        let (_, writable) = (self.request)();
        assert_eq!(id, 0);
        assert!(len <= writable);
        assert!(writable == 0 || len > 0, "the device wrote nothing");
    }
}

pub(crate) fn requests_are_served_with_every_ring_feature(subject: &Subject) {
    let mut driver = subject.driver();
    let own = driver.offered() & !features::COMMON;
    for ring in [0, features::EVENT_IDX, features::INDIRECT, features::COMMON] {
        driver.start(own | features::VERSION_1 | ring);
        for _ in 0..40 {
            subject.serve(&mut driver);
            driver.interrupt(usize::from(subject.queue) + 1);
            // Ask to be told of the next one as well.
            let areas = Areas::of(subject.queue, 16);
            let seen = driver.seen[&subject.queue];
            let used_event = areas.avail + 4 + u64::from(areas.size) * 2;
            driver
                .ram
                .write_obj(seen, GuestAddress(used_event))
                .unwrap();
        }
    }
}

/// A driver that kicks only when asked, with one request in flight and with many: a device that
/// goes to sleep without a last look at the ring never wakes.
pub(crate) fn no_kick_is_missed_under_load(subject: &Subject) {
    let rounds = [
        (0, 1),
        (0, 8),
        (features::EVENT_IDX, 1),
        (features::EVENT_IDX, 8),
    ];
    for (ring, in_flight) in rounds {
        let mut driver = subject.driver();
        let own = driver.offered() & !features::COMMON;
        driver.start(own | features::VERSION_1 | ring);
        let areas = Areas::of(subject.queue, 16);
        let request = subject.descs(&driver);
        let stride = u16::try_from(request.len()).unwrap();
        let heads: Vec<u16> = (0..in_flight.min(16 / stride))
            .map(|n| n * stride)
            .collect();
        for head in &heads {
            for (index, desc) in (*head..).zip(&request) {
                let next = index + 1;
                write_desc(&driver.ram, areas.desc, index, Desc { next, ..*desc });
            }
        }
        let mut ready = heads.clone();
        for _ in 0..20_000 {
            let Some(head) = ready.pop() else {
                let (head, _) = driver.used(subject.queue);
                ready.push(u16::try_from(head).unwrap());
                continue;
            };
            driver.offer_one(subject.queue, head);
        }
        while ready.len() < heads.len() {
            let (head, _) = driver.used(subject.queue);
            ready.push(u16::try_from(head).unwrap());
        }
    }
}

pub(crate) fn indirect_tables_work(subject: &Subject) {
    let mut driver = subject.driver();
    driver.start_full();
    let table = subject.descs(&driver);
    for (index, desc) in (0..).zip(&table) {
        write_desc(&driver.ram, TABLES, index, *desc);
    }
    let len = u32::try_from(table.len() * 16).unwrap();
    driver.submit(subject.queue, &[Desc::new(TABLES, len, INDIRECT, 0)]);
    driver.used(subject.queue);
    let counters = driver.function.counters();
    let queue = &counters.queues[usize::from(subject.queue)];
    assert_eq!(queue.malformed.load(Ordering::Relaxed), 0);
}

pub(crate) fn reset_and_start_again(subject: &Subject) {
    let mut driver = subject.driver();
    for _ in 0..5 {
        driver.start_full();
        subject.serve(&mut driver);
        driver.set_status(0);
        assert_eq!(driver.status(), 0);
        driver.put_u16(reg::QUEUE_SELECT, subject.queue);
        assert_eq!(driver.u16(reg::QUEUE_ENABLE), 0);
        assert_eq!(driver.u64(reg::QUEUE_DESC), 0);
        assert_eq!(driver.u16(reg::QUEUE_VECTOR), 0xffff);
        assert_eq!(driver.u16(reg::CONFIG_VECTOR), 0xffff);
    }
}

pub(crate) fn reset_leaves_guest_memory_alone(subject: &Subject) {
    let mut driver = subject.driver();
    driver.start_full();
    subject.serve(&mut driver);
    let areas = Areas::of(subject.queue, 16);
    for _ in 0..8 {
        offer(&driver.ram, &areas, 0);
    }
    driver.kick(subject.queue);
    driver.set_status(0);
    let mark = [0x5a; 0x4000];
    driver
        .ram
        .write_slice(&mark, GuestAddress(areas.desc))
        .unwrap();
    driver.kick(subject.queue);
    std::thread::sleep(std::time::Duration::from_millis(20));
    let mut now = [0; 0x4000];
    driver
        .ram
        .read_slice(&mut now, GuestAddress(areas.desc))
        .unwrap();
    assert!(now == mark, "the device wrote to rings after reset");
}

pub(crate) fn kicks_before_and_after_running_do_nothing(subject: &Subject) {
    let mut driver = subject.driver();
    for queue in 0..64 {
        driver.kick(queue);
    }
    driver.start_full();
    subject.serve(&mut driver);
    for queue in 0..64 {
        driver.kick(queue);
    }
    subject.serve(&mut driver);
    driver.set_status(0);
    driver.kick(subject.queue);
    driver.start_full();
    subject.serve(&mut driver);
}

/// Pausing stops service without losing a request; the model starts where it stopped.
pub(crate) fn paused_models_serve_nothing_and_lose_nothing(subject: &Subject) {
    let mut driver = subject.driver();
    driver.start_full();
    for _ in 0..3 {
        subject.serve(&mut driver);
        driver.function.pause();
        driver.function.pause();
        let descs = subject.descs(&driver);
        driver.submit(subject.queue, &descs);
        std::thread::sleep(std::time::Duration::from_millis(5));
        let (before, _) = driver.progress(subject.queue);
        driver.function.resume();
        driver.function.resume();
        driver.used(subject.queue);
        let (after, _) = driver.progress(subject.queue);
        assert_eq!(after, before.wrapping_add(1), "served while paused");
    }
    driver.function.pause();
    driver.set_status(0);
    driver.function.resume();
    driver.start_full();
    subject.serve(&mut driver);
}

pub(crate) fn unplug_while_running(subject: &Subject) {
    let mut driver = subject.driver();
    driver.start_full();
    subject.serve(&mut driver);
    let Driver { function, io, .. } = driver;
    let mmio = Bus::new("mmio");
    let (base, window) = (0x8000_0000, Range::new(0x8000_0000, 0x10_0000).unwrap());
    let segment = Segment::new(mmio.clone(), vec![window]);
    let bdf = Bdf::new(0, 1, 0).unwrap();
    let plugged = segment.plug(bdf, Box::new(function), &[(0, base)]).unwrap();
    segment.config_write(bdf, 4, &[2, 0]);
    let mut status = [0];
    mmio.read(base + reg::STATUS, &mut status);
    assert_eq!(status, [0x0f]);
    drop(plugged);
    mmio.read(base + reg::STATUS, &mut status);
    assert_eq!(status, [0xff], "stop, then access");
    mmio.write(base + reg::STATUS, &[0]);
    mmio.write(base + NOTIFY, &[0, 0]);
    drop(io);
}

pub(crate) fn the_thread_may_end_first(subject: &Subject) {
    let mut driver = subject.driver();
    driver.start_full();
    subject.serve(&mut driver);
    let Driver {
        mut function, io, ..
    } = driver;
    drop(io);
    let at = |offset| Access { offset };
    function.bar_write(VirtioPci::BAR, at(reg::STATUS), &[0]);
    let mut status = [0xff];
    function.bar_read(VirtioPci::BAR, at(reg::STATUS), &mut status);
    assert_eq!(status, [0]);
}

/// Gives a model the conformance tests.
macro_rules! conformance {
    ($name:ident, $subject:expr) => {
        mod $name {
            use super::*;
            crate::conformance::conformance!(@ $subject;
                requests_are_served_with_every_ring_feature
                indirect_tables_work
                no_kick_is_missed_under_load
                reset_and_start_again
                reset_leaves_guest_memory_alone
                kicks_before_and_after_running_do_nothing
                paused_models_serve_nothing_and_lose_nothing
                unplug_while_running
                the_thread_may_end_first
                malformed_chains_come_back_unused
                empty_buffers_are_survived
                a_head_out_of_range_needs_a_reset
                an_available_index_out_of_range_needs_a_reset
                a_ring_of_malformed_chains_needs_a_reset
                queue_registers_are_frozen_at_driver_ok
                a_bad_queue_number_selects_nothing
                a_bad_queue_size_needs_a_reset
                only_a_one_enables_a_queue
                bad_areas_need_a_reset
                features_are_agreed_or_refused
                driver_ok_out_of_order_needs_a_reset
                every_offset_and_width_is_answered
                arbitrary_accesses_are_survived
                the_access_window_reaches_the_bar
            );
        }
    };
    (@ $subject:expr; $($test:ident)*) => {
        $(
            #[test]
            fn $test() {
                crate::conformance::$test(&$subject);
            }
        )*
    };
}
pub(crate) use conformance;
