use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::conformance::{Subject, conformance};
use crate::driver::{BUFFERS, Desc, Driver, NEXT, TABLES, WRITE, wait_for};
use crate::features;

const ALL: BalloonOptions = BalloonOptions {
    deflate_on_oom: true,
    stats: Some(Duration::from_millis(20)),
    reporting: true,
    page: 4096,
};

const PLAIN: BalloonOptions = BalloonOptions { stats: None, ..ALL };

fn make(io: &IoHandle) -> Box<dyn VirtioModel> {
    Box::new(Balloon::new(ALL, BalloonLink::new(0).unwrap(), io.clone()).unwrap())
}

fn of(options: BalloonOptions) -> (Driver, BalloonLink) {
    let link = BalloonLink::new(0).unwrap();
    let theirs = link.clone();
    let make = move |io: &IoHandle| -> Box<dyn VirtioModel> {
        Box::new(Balloon::new(options, theirs, io.clone()).unwrap())
    };
    (Driver::new(make), link)
}

const INFLATING: Subject = Subject {
    make,
    queue: 0,
    request: || (0x300_u32.to_le_bytes().to_vec(), 0),
};

conformance!(conforms, INFLATING);

fn gauge(driver: &Driver, name: &str) -> u64 {
    let counters = driver.function.counters();
    let gauge = counters.gauges.iter().find(|(n, _)| *n == name);
    gauge.unwrap().1.load(Ordering::Relaxed)
}

fn give(driver: &mut Driver, queue: u16, pages: &[u32]) {
    let bytes: Vec<u8> = pages.iter().flat_map(|p| p.to_le_bytes()).collect();
    driver
        .ram
        .write_slice(&bytes, GuestAddress(TABLES))
        .unwrap();
    let len = u32::try_from(bytes.len()).unwrap();
    driver.submit(queue, &[Desc::new(TABLES, len, 0, 0)]);
    assert_eq!(driver.used(queue), (0, 0));
}

fn fill(driver: &Driver, page: u32) {
    let at = GuestAddress(u64::from(page) * 4096);
    driver.ram.write_slice(&[7; 4096], at).unwrap();
}

fn first_byte(driver: &Driver, page: u32) -> u8 {
    let at = GuestAddress(u64::from(page) * 4096);
    driver.ram.read_obj::<u8>(at).unwrap()
}

#[test]
fn inflated_pages_go_back_to_the_host() {
    let (mut driver, _) = of(PLAIN);
    driver.start_full();
    for page in 0x90..0xa0 {
        fill(&driver, page);
    }
    // RAM has 0x100 pages: the last two numbers are not of it.
    give(&mut driver, 0, &[0x95, 0x92, 0x93, 0x92, 0x100, u32::MAX]);
    for page in 0x90..0xa0 {
        let gone = [0x92, 0x93, 0x95].contains(&page);
        assert_eq!(first_byte(&driver, page), if gone { 0 } else { 7 });
    }
    assert_eq!(gauge(&driver, "inflated_bytes"), 3 * 4096);
    assert_eq!(gauge(&driver, "kept_bytes"), 2 * 4096);
    fill(&driver, 0x92);
    give(&mut driver, 1, &[0x92]);
    assert_eq!(first_byte(&driver, 0x92), 7, "deflating takes nothing");
}

#[test]
fn parts_of_the_hosts_pages_are_kept() {
    let options = BalloonOptions {
        page: 0x1_0000,
        ..PLAIN
    };
    let (mut driver, _) = of(options);
    driver.start_full();
    for page in 0x80..0xc0 {
        fill(&driver, page);
    }
    let pages: Vec<u32> = (0x8f..0xa1).collect();
    give(&mut driver, 0, &pages);
    assert_eq!(first_byte(&driver, 0x8f), 7);
    assert_eq!(first_byte(&driver, 0x90), 0);
    assert_eq!(first_byte(&driver, 0x9f), 0);
    assert_eq!(first_byte(&driver, 0xa0), 7);
    assert_eq!(gauge(&driver, "kept_bytes"), 2 * 4096);
}

#[test]
fn too_many_pages_at_once_are_an_error_and_bounded() {
    let (mut driver, _) = of(PLAIN);
    driver.start_full();
    driver.submit(0, &[Desc::new(TABLES, 0x1_0004, 0, 0)]);
    assert_eq!(driver.used(0), (0, 0));
    let counters = driver.function.counters();
    assert_eq!(counters.queues[0].errors.load(Ordering::Relaxed), 1);
}

#[test]
fn reported_pages_go_back_unless_they_are_filled() {
    // Without statistics the reporting queue is the third.
    let (mut driver, _) = of(PLAIN);
    driver.start_full();
    let report = |driver: &mut Driver| {
        for page in 0x80..0x90 {
            fill(driver, page);
        }
        let descs = [
            Desc::new(0x8_0000, 0x2000, WRITE | NEXT, 1),
            Desc::new(0x8_8000, 0x1800, WRITE, 0),
        ];
        driver.submit(2, &descs);
        assert_eq!(driver.used(2), (0, 0));
        (0x80..0x90)
            .filter(|page| first_byte(driver, *page) == 0)
            .collect::<Vec<u32>>()
    };
    assert_eq!(report(&mut driver), [0x80, 0x81, 0x88]);
    assert_eq!(gauge(&driver, "reported_bytes"), 3 * 4096);
    driver.put_u32(0x2000 + 12, 0xaaaa_aaaa);
    assert!(report(&mut driver).is_empty());
    driver.start_full();
    assert_eq!(report(&mut driver), [0x80, 0x81, 0x88], "a reset forgets");
}

#[test]
fn queues_are_numbered_by_what_was_agreed_on() {
    let (mut driver, _) = of(ALL);
    let offered = driver.offered();
    driver.start(offered & !bits::STATS_VQ);
    fill(&driver, 0x80);
    driver.submit(2, &[Desc::new(0x8_0000, 0x1000, WRITE, 0)]);
    assert_eq!(driver.used(2), (0, 0));
    assert_eq!(first_byte(&driver, 0x80), 0, "the third is for reports");
}

fn stats(driver: &mut Driver, values: &[(u16, u64)]) {
    let mut bytes = Vec::new();
    for (tag, value) in values {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(value.to_le_bytes());
    }
    driver
        .ram
        .write_slice(&bytes, GuestAddress(BUFFERS))
        .unwrap();
    let len = u32::try_from(bytes.len()).unwrap();
    driver.submit(2, &[Desc::new(BUFFERS, len, 0, 0)]);
}

#[test]
fn statistics_are_asked_for_again_and_again() {
    let (mut driver, _) = of(ALL);
    driver.start_full();
    for round in 1..4_u64 {
        stats(&mut driver, &[(4, round * 1000), (6, 7), (99, 1), (9, 3)]);
        assert_eq!(driver.used(2), (0, 0), "the buffer comes back in time");
        assert_eq!(gauge(&driver, "guest_free_bytes"), round * 1000);
        assert_eq!(gauge(&driver, "guest_available_bytes"), 7);
        assert_eq!(gauge(&driver, "guest_hugetlb_failures"), 3);
    }
}

#[test]
fn a_paused_balloon_keeps_the_statistics_buffer() {
    use testudo_pci::PciFunction;
    let (mut driver, _) = of(ALL);
    driver.start_full();
    for _ in 0..3 {
        stats(&mut driver, &[(4, 5)]);
        driver.function.pause();
        let (before, _) = driver.progress(2);
        std::thread::sleep(Duration::from_millis(40));
        assert_eq!(driver.progress(2).0, before);
        driver.function.resume();
        driver.used(2);
    }
}

#[test]
fn host_and_guest_tell_each_other_of_the_size() {
    let (mut driver, link) = of(PLAIN);
    driver.start(features::VERSION_1);
    link.request(5 << 20);
    driver.interrupt(0);
    assert_eq!(driver.u64(0x2000), (5 << 20) / 4096);
    driver.put_u32(0x2000 + 4, 77);
    assert_eq!(gauge(&driver, "actual_bytes"), 77 * 4096);
    driver.put_u32(0x2000, 1);
    assert_eq!(driver.u64(0x2000) & 0xffff_ffff, (5 << 20) / 4096);
    wait_for("the target", || {
        (gauge(&driver, "target_bytes") == 5 << 20).then_some(())
    });
    link.request(u64::MAX);
    assert_eq!(driver.u64(0x2000) & 0xffff_ffff, u64::from(u32::MAX));
}
