use std::io::{Seek, SeekFrom, Write};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::conformance::{Subject, conformance};
use crate::driver::{Areas, BUFFERS, Desc, Driver, NEXT, WRITE, offer, write_desc};

fn make(io: &IoHandle) -> Box<dyn VirtioModel> {
    Box::new(Rng::new(Entropy::Host, None, io.clone()).unwrap())
}

fn limited(io: &IoHandle) -> Box<dyn VirtioModel> {
    let limit = RateLimit::new(100_000_000, 1 << 20).unwrap();
    Box::new(Rng::new(Entropy::Host, Some(limit), io.clone()).unwrap())
}

fn request() -> (Vec<u8>, u32) {
    (Vec::new(), 64)
}

const SUBJECT: Subject = Subject {
    make,
    queue: 0,
    request,
};

const LIMITED: Subject = Subject {
    make: limited,
    queue: 0,
    request,
};

conformance!(conforms, SUBJECT);
conformance!(conforms_with_a_limit, LIMITED);

/// A source whose bytes count up.
fn counting(bytes: u32) -> Entropy {
    let path = std::env::temp_dir().join(format!("testudo-rng-{}-{bytes}", std::process::id()));
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .unwrap();
    std::fs::remove_file(path).unwrap();
    let data: Vec<u8> = (0..bytes).map(|n| n.to_le_bytes()[0]).collect();
    file.write_all(&data).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    Entropy::File(file)
}

#[test]
fn bytes_land_in_order_across_buffers() {
    let mut driver = Driver::new(|io| Box::new(Rng::new(counting(100), None, io.clone()).unwrap()));
    driver.start_full();
    let descs = [
        Desc::new(BUFFERS, 10, NEXT, 1),
        Desc::new(BUFFERS + 100, 30, WRITE | NEXT, 2),
        Desc::new(BUFFERS + 200, 0, WRITE | NEXT, 3),
        Desc::new(BUFFERS + 300, 40, WRITE, 0),
    ];
    driver.submit(0, &descs);
    assert_eq!(driver.used(0), (0, 70));
    let mut seen = [0; 70];
    driver
        .ram
        .read_slice(&mut seen[..30], GuestAddress(BUFFERS + 100))
        .unwrap();
    driver
        .ram
        .read_slice(&mut seen[30..], GuestAddress(BUFFERS + 300))
        .unwrap();
    assert_eq!(seen.to_vec(), (0..70).collect::<Vec<u8>>());
    driver.submit(0, &descs);
    assert_eq!(driver.used(0), (0, 30), "the source ended");
    driver.submit(0, &descs);
    assert_eq!(driver.used(0), (0, 0));
}

#[test]
fn the_host_source_is_random() {
    let mut driver = Driver::new(make);
    driver.start_full();
    let mut seen = Vec::new();
    for _ in 0..4 {
        driver.submit(0, &[Desc::new(BUFFERS, 32, WRITE, 0)]);
        assert_eq!(driver.used(0), (0, 32));
        let mut bytes = [0; 32];
        driver
            .ram
            .read_slice(&mut bytes, GuestAddress(BUFFERS))
            .unwrap();
        assert!(!seen.contains(&bytes));
        seen.push(bytes);
    }
}

#[test]
fn a_large_request_is_served_in_part() {
    let mut driver = Driver::new(make);
    driver.start_full();
    let len = REQUEST_LIMIT + 4096;
    driver.submit(0, &[Desc::new(BUFFERS, len, WRITE, 0)]);
    assert_eq!(driver.used(0), (0, REQUEST_LIMIT));
}

#[test]
fn a_full_queue_of_large_requests_is_served_in_several_turns() {
    let mut driver = Driver::new(make);
    driver.start_full();
    let areas = Areas::of(0, 16);
    for head in 0..16 {
        let desc = Desc::new(BUFFERS, REQUEST_LIMIT, WRITE, 0);
        write_desc(&driver.ram, areas.desc, head, desc);
        offer(&driver.ram, &areas, head);
    }
    driver.kick(0);
    for head in 0..16 {
        assert_eq!(driver.used(0), (head, REQUEST_LIMIT));
    }
}

#[test]
fn the_limit_holds_and_a_waiting_request_is_served_by_the_timer() {
    let limit = RateLimit::new(10_000, 1000).unwrap();
    let mut driver =
        Driver::new(|io| Box::new(Rng::new(Entropy::Host, Some(limit), io.clone()).unwrap()));
    driver.start_full();
    let start = Instant::now();
    let mut total = 0;
    while total < 3000 {
        driver.submit(0, &[Desc::new(BUFFERS, 1000, WRITE, 0)]);
        let (_, len) = driver.used(0);
        assert!(len > 0);
        total += len;
    }
    assert!(
        start.elapsed() >= Duration::from_millis(199),
        "{:?}",
        start.elapsed()
    );
    let counters = driver.function.counters();
    let stalls = &counters.queues[0].stalls;
    assert!(stalls.load(std::sync::atomic::Ordering::Relaxed) > 0);
}

#[test]
fn a_reset_while_throttled_is_prompt() {
    let limit = RateLimit::new(1, 64).unwrap();
    let mut driver =
        Driver::new(|io| Box::new(Rng::new(Entropy::Host, Some(limit), io.clone()).unwrap()));
    driver.start_full();
    driver.submit(0, &[Desc::new(BUFFERS, 64, WRITE, 0)]);
    assert_eq!(driver.used(0), (0, 64));
    driver.submit(0, &[Desc::new(BUFFERS, 64, WRITE, 0)]);
    let start = Instant::now();
    driver.set_status(0);
    assert_eq!(driver.status(), 0);
    assert!(start.elapsed() < Duration::from_secs(5));
}
