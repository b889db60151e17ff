//! Chains and rings no driver should make.

use std::sync::atomic::Ordering;

use super::Subject;
use crate::driver::{
    Areas, BUFFERS, Desc, Driver, INDIRECT, NEXT, RAM_SIZE, TABLES, WRITE, offer, put_u16,
    write_desc,
};

const OUTSIDE: u64 = RAM_SIZE as u64;

/// Chains from descriptor 0 on, and the indirect table at [`TABLES`] they may use.
fn malformed() -> Vec<(&'static str, Vec<Desc>, Vec<Desc>)> {
    let d = Desc::new;
    let whole = u32::try_from(RAM_SIZE).unwrap();
    vec![
        (
            "loop to itself",
            vec![d(BUFFERS, 16, WRITE | NEXT, 0)],
            vec![],
        ),
        (
            "loop of two",
            vec![
                d(BUFFERS, 16, WRITE | NEXT, 1),
                d(BUFFERS, 16, WRITE | NEXT, 0),
            ],
            vec![],
        ),
        (
            "next out of range",
            vec![d(BUFFERS, 16, WRITE | NEXT, 16)],
            vec![],
        ),
        (
            "next far out of range",
            vec![d(BUFFERS, 16, NEXT, 0xffff)],
            vec![],
        ),
        ("outside RAM", vec![d(OUTSIDE, 16, WRITE, 0)], vec![]),
        (
            "across the end of RAM",
            vec![d(OUTSIDE - 8, 16, WRITE, 0)],
            vec![],
        ),
        ("address wraps", vec![d(u64::MAX - 8, 16, WRITE, 0)], vec![]),
        ("longer than RAM", vec![d(0, u32::MAX, WRITE, 0)], vec![]),
        (
            "readable outside RAM",
            vec![d(OUTSIDE, 16, NEXT, 1), d(BUFFERS, 16, WRITE, 0)],
            vec![],
        ),
        (
            "readable after writable",
            vec![d(BUFFERS, 16, WRITE | NEXT, 1), d(BUFFERS, 16, 0, 0)],
            vec![],
        ),
        (
            "indirect of odd length",
            vec![d(TABLES, 17, INDIRECT, 0)],
            vec![d(BUFFERS, 16, WRITE, 0)],
        ),
        (
            "indirect of nothing",
            vec![d(TABLES, 0, INDIRECT, 0)],
            vec![],
        ),
        (
            "indirect outside RAM",
            vec![d(OUTSIDE, 16, INDIRECT, 0)],
            vec![],
        ),
        (
            "indirect in indirect",
            vec![d(TABLES, 32, INDIRECT, 0)],
            vec![d(TABLES + 16, 16, INDIRECT, 0), d(BUFFERS, 16, WRITE, 0)],
        ),
        (
            "indirect to itself",
            vec![d(TABLES, 16, INDIRECT, 0)],
            vec![d(TABLES, 16, INDIRECT, 0)],
        ),
        (
            "indirect loop",
            vec![d(TABLES, 32, INDIRECT, 0)],
            vec![
                d(BUFFERS, 16, WRITE | NEXT, 1),
                d(BUFFERS, 16, WRITE | NEXT, 0),
            ],
        ),
        (
            "indirect next out of range",
            vec![d(TABLES, 16, INDIRECT, 0)],
            vec![d(BUFFERS, 16, WRITE | NEXT, 1)],
        ),
        (
            "indirect too large",
            vec![d(0, 0x10_0000 * 16, INDIRECT, 0)],
            vec![],
        ),
        (
            "longer than 4 GiB in all",
            vec![d(TABLES, 0x1000 * 16, INDIRECT, 0)],
            (0..0x1000_u16)
                .map(|n| d(0, whole, WRITE | NEXT, n + 1))
                .collect(),
        ),
        (
            "more buffers than a call takes",
            vec![d(TABLES, 1025 * 16, INDIRECT, 0)],
            (0..1025_u16)
                .map(|n| {
                    d(
                        BUFFERS,
                        1,
                        if n < 1024 { WRITE | NEXT } else { WRITE },
                        n + 1,
                    )
                })
                .collect(),
        ),
    ]
}

fn malformed_count(driver: &Driver, subject: &Subject) -> u64 {
    let counters = driver.function.counters();
    let queue = &counters.queues[usize::from(subject.queue)];
    queue.malformed.load(Ordering::Relaxed)
}

pub(crate) fn malformed_chains_come_back_unused(subject: &Subject) {
    let mut driver = subject.driver();
    driver.start_full();
    for (count, (name, descs, table)) in (1..).zip(malformed()) {
        for (index, desc) in (0..).zip(&table) {
            write_desc(&driver.ram, TABLES, index, *desc);
        }
        driver.submit(subject.queue, &descs);
        assert_eq!(driver.used(subject.queue), (0, 0), "{name}");
        assert_eq!(malformed_count(&driver, subject), count, "{name}");
        subject.serve(&mut driver);
        assert_eq!(driver.status(), 0x0f, "{name}");
    }
}

pub(crate) fn empty_buffers_are_survived(subject: &Subject) {
    let mut driver = subject.driver();
    driver.start_full();
    for descs in [
        vec![Desc::new(BUFFERS, 0, 0, 0)],
        vec![Desc::new(BUFFERS, 0, WRITE, 0)],
        vec![Desc::new(u64::MAX, 0, WRITE, 0)],
        vec![
            Desc::new(BUFFERS, 0, NEXT, 1),
            Desc::new(BUFFERS, 0, WRITE, 0),
        ],
        vec![Desc::new(BUFFERS, 64, 0, 0)],
    ] {
        driver.submit(subject.queue, &descs);
        let (id, len) = driver.used(subject.queue);
        assert_eq!((id, len), (0, 0));
    }
    subject.serve(&mut driver);
}

pub(crate) fn a_head_out_of_range_needs_a_reset(subject: &Subject) {
    let mut driver = subject.driver();
    for head in [16, 17, 0xffff] {
        driver.start_full();
        subject.serve(&mut driver);
        offer(&driver.ram, &Areas::of(subject.queue, 16), head);
        driver.kick(subject.queue);
        driver.wait_needs_reset();
        driver.interrupt(0);
        driver.kick(subject.queue);
    }
    driver.start_full();
    subject.serve(&mut driver);
}

pub(crate) fn an_available_index_out_of_range_needs_a_reset(subject: &Subject) {
    let mut driver = subject.driver();
    for index in [17, 0x7fff, 0xffff] {
        driver.start_full();
        let areas = Areas::of(subject.queue, 16);
        put_u16(&driver.ram, areas.avail + 2, index);
        driver.kick(subject.queue);
        driver.wait_needs_reset();
    }
    driver.start_full();
    subject.serve(&mut driver);
}

pub(crate) fn a_ring_of_malformed_chains_needs_a_reset(subject: &Subject) {
    let mut driver = subject.driver();
    driver.start_full();
    let areas = Areas::of(subject.queue, 16);
    write_desc(&driver.ram, areas.desc, 0, Desc::new(0, 1, NEXT, 0));
    for _ in 0..16 {
        offer(&driver.ram, &areas, 0);
    }
    driver.kick(subject.queue);
    driver.wait_needs_reset();
    driver.start_full();
    subject.serve(&mut driver);
}
