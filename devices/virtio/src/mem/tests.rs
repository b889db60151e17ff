use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use testudo_pci::PciFunction;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::conformance::{Subject, conformance};
use crate::driver::{BUFFERS, Desc, Driver, NEXT, WRITE, wait_for};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 2 * MIB;
const REGION: MemRegion = MemRegion {
    start: 0x1_4000_0000,
    size: 1024 * MIB,
    block: BLOCK,
    slack: 64 * MIB,
};

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

/// A link whose calls arrive at the receiver.
fn link(requested: u64) -> (MemLink, Receiver<()>) {
    let (calls, called) = mpsc::channel();
    let calls = Mutex::new(calls);
    let call = move || {
        let _ = calls.lock().unwrap().send(());
    };
    let link = MemLink::new(REGION, requested, Box::new(call)).unwrap();
    (link, called)
}

/// A link whose every change is made by a thread of its own, which notes it.
fn attended(requested: u64) -> (MemLink, Arc<Mutex<Vec<MemChange>>>) {
    let (link, called) = link(requested);
    let made = Arc::new(Mutex::new(Vec::new()));
    let (attends, notes) = (link.clone(), Arc::clone(&made));
    std::thread::spawn(move || {
        loop {
            match called.recv_timeout(Duration::from_secs(20)) {
                Ok(()) => attends.attend(|change| {
                    notes.lock().unwrap().push(change);
                    true
                }),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return,
            }
        }
    });
    (link, made)
}

fn make(io: &IoHandle) -> Box<dyn VirtioModel> {
    Box::new(Mem::new(attended(0).0, io.clone()))
}

fn bytes_of(kind: u16, address: u64, count: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(kind.to_le_bytes());
    bytes.extend([0; 6]);
    bytes.extend(address.to_le_bytes());
    bytes.extend(count.to_le_bytes());
    bytes.extend([0; 6]);
    bytes
}

const SUBJECT: Subject = Subject {
    make,
    queue: 0,
    request: || (bytes_of(STATE, REGION.start, 1), 10),
};

/// Each request is a question to the owner of guest RAM.
const ASKING: Subject = Subject {
    make,
    queue: 0,
    request: || (bytes_of(UNPLUG_ALL, 0, 0), 10),
};

conformance!(conforms, SUBJECT);
conformance!(conforms_when_it_has_to_ask, ASKING);

fn driver(link: &MemLink) -> Driver {
    let link = link.clone();
    let mut driver = Driver::new(move |io| Box::new(Mem::new(link, io.clone())));
    driver.start_full();
    driver
}

fn offer(driver: &mut Driver, request: &[u8]) {
    let answer = BUFFERS + 0x1000;
    driver
        .ram
        .write_slice(request, GuestAddress(BUFFERS))
        .unwrap();
    driver
        .ram
        .write_slice(&[0xff; 10], GuestAddress(answer))
        .unwrap();
    let len = u32::try_from(request.len()).unwrap();
    let descs = [
        Desc::new(BUFFERS, len, NEXT, 1),
        Desc::new(answer, 10, WRITE, 0),
    ];
    driver.submit(0, &descs);
}

/// What is said, and the state.
fn said(driver: &mut Driver) -> (u16, u16) {
    assert_eq!(driver.used(0), (0, 10));
    let at = GuestAddress(BUFFERS + 0x1000);
    let said = driver.ram.read_obj::<u16>(at).unwrap();
    let state = GuestAddress(BUFFERS + 0x1008);
    (said, driver.ram.read_obj::<u16>(state).unwrap())
}

fn ask(driver: &mut Driver, kind: u16, block: u64, count: u16) -> u16 {
    let address = REGION.start.wrapping_add(block.wrapping_mul(BLOCK));
    offer(driver, &bytes_of(kind, address, count));
    said(driver).0
}

fn state(driver: &mut Driver, block: u64, count: u16) -> (u16, u16) {
    let address = REGION.start + block * BLOCK;
    offer(driver, &bytes_of(STATE, address, count));
    said(driver)
}

#[test]
fn the_guest_is_told_of_the_region_and_the_sizes() {
    let (link, _called) = link(0);
    let mut driver = driver(&link);
    let mut field = |n: u64| driver.u64(0x2000 + n * 8);
    assert_eq!(field(0), BLOCK);
    assert_eq!(field(2), REGION.start);
    assert_eq!(field(3), REGION.size);
    assert_eq!([field(4), field(5), field(6)], [0, 0, 0]);
    link.request(128 * MIB);
    assert_eq!([field(4), field(5), field(6)], [192 * MIB, 0, 128 * MIB]);
    driver.interrupt(0);
    link.request(0);
    let mut field = |n: u64| driver.u64(0x2000 + n * 8);
    let levels = [field(4), field(5), field(6)];
    assert_eq!(levels, [192 * MIB, 0, 0], "the usable part does not shrink");
    driver.interrupt(0);
    link.request(u64::MAX);
    assert_eq!(driver.u64(0x2000 + 32), REGION.size);
}

#[test]
fn a_driver_that_comes_later_is_told_as_well() {
    let (link, _called) = link(0);
    link.request(BLOCK);
    let driver = driver(&link);
    driver.interrupt(0);
}

#[test]
fn blocks_are_plugged_and_unplugged() {
    let (link, made) = attended(8 * BLOCK);
    let mut driver = driver(&link);
    assert_eq!(ask(&mut driver, PLUG, 2, 4), ACK);
    assert_eq!(link.levels().plugged, 4 * BLOCK);
    assert_eq!(state(&mut driver, 2, 4), (ACK, 0));
    assert_eq!(state(&mut driver, 0, 2), (ACK, 1));
    assert_eq!(state(&mut driver, 0, 8), (ACK, 2));
    assert_eq!(ask(&mut driver, PLUG, 5, 2), ERROR, "one is plugged");
    assert_eq!(ask(&mut driver, UNPLUG, 5, 2), ERROR, "one is not");
    assert_eq!(ask(&mut driver, UNPLUG, 3, 1), ACK);
    assert_eq!(ask(&mut driver, UNPLUG, 3, 1), ERROR);
    assert_eq!(ask(&mut driver, PLUG, 3, 1), ACK);
    assert_eq!(ask(&mut driver, PLUG, 8, 5), NACK, "more than asked for");
    assert_eq!(ask(&mut driver, PLUG, 8, 4), ACK);
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(link.levels().plugged, 0);
    let (gpa, size) = (REGION.start + 3 * BLOCK, BLOCK);
    assert_eq!(
        *made.lock().unwrap(),
        [
            MemChange::Plug {
                gpa: REGION.start + 2 * BLOCK,
                size: 4 * BLOCK
            },
            MemChange::Unplug { gpa, size },
            MemChange::Plug { gpa, size },
            MemChange::Plug {
                gpa: REGION.start + 8 * BLOCK,
                size: 4 * BLOCK
            },
            MemChange::UnplugAll,
        ]
    );
}

#[test]
fn what_lies_outside_is_an_error() {
    let (link, made) = attended(16 * BLOCK);
    let mut driver = driver(&link);
    let usable = link.levels().usable / BLOCK;
    for kind in [PLUG, UNPLUG, STATE] {
        for (block, count) in [
            (0, 0),
            (usable, 1),
            (usable - 1, 2),
            (u64::MAX, 1),
            (u64::MAX / BLOCK, u16::MAX),
            (0, u16::MAX),
        ] {
            assert_eq!(ask(&mut driver, kind, block, count), ERROR, "{block:#x}");
        }
        let between = bytes_of(kind, REGION.start + 4096, 1);
        offer(&mut driver, &between);
        assert_eq!(said(&mut driver).0, ERROR);
        let before = bytes_of(kind, REGION.start - BLOCK, 1);
        offer(&mut driver, &before);
        assert_eq!(said(&mut driver).0, ERROR);
    }
    for bad in [
        bytes_of(4, REGION.start, 1),
        bytes_of(u16::MAX, 0, 0),
        bytes_of(PLUG, REGION.start, 1)[..23].to_vec(),
    ] {
        offer(&mut driver, &bad);
        assert_eq!(said(&mut driver).0, ERROR);
    }
    assert!(made.lock().unwrap().is_empty());
}

#[test]
fn a_host_that_cannot_is_busy_and_nothing_has_changed() {
    let (link, called) = link(8 * BLOCK);
    let mut driver = driver(&link);
    offer(&mut driver, &bytes_of(PLUG, REGION.start, 4));
    called.recv().unwrap();
    link.attend(|_| false);
    assert_eq!(said(&mut driver).0, BUSY);
    assert_eq!(state(&mut driver, 0, 4), (ACK, 1));
    assert_eq!(link.levels().plugged, 0);
}

#[test]
fn requests_wait_behind_the_one_in_hand() {
    let (link, called) = link(8 * BLOCK);
    let mut driver = driver(&link);
    offer(&mut driver, &bytes_of(PLUG, REGION.start, 4));
    called.recv().unwrap();
    for _ in 0..3 {
        driver.kick(0);
    }
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(driver.progress(0), (0, 0));
    assert!(called.try_recv().is_err(), "asked twice");
    link.attend(|_| true);
    assert_eq!(said(&mut driver).0, ACK);
}

/// The owner of guest RAM pauses the device without having seen its question: nobody waits for
/// anybody, and the question is asked again.
#[test]
fn a_pause_takes_back_what_nobody_has_begun() {
    let (link, called) = link(8 * BLOCK);
    let mut driver = driver(&link);
    offer(&mut driver, &bytes_of(PLUG, REGION.start, 4));
    called.recv().unwrap();
    driver.function.pause();
    link.attend(|_| panic!("it was taken back"));
    assert_eq!(driver.progress(0), (0, 0));
    driver.function.resume();
    called.recv().unwrap();
    link.attend(|_| true);
    assert_eq!(said(&mut driver).0, ACK);
    assert_eq!(link.levels().plugged, 4 * BLOCK);
}

#[test]
fn a_stop_waits_for_the_change_in_hand_and_tells_of_it() {
    let (link, called) = link(8 * BLOCK);
    let mut driver = driver(&link);
    offer(&mut driver, &bytes_of(PLUG, REGION.start, 4));
    called.recv().unwrap();
    let (begun_tx, begun) = mpsc::channel();
    let attends = link.clone();
    let owner = std::thread::spawn(move || {
        attends.attend(|_| {
            begun_tx.send(()).unwrap();
            std::thread::sleep(Duration::from_millis(50));
            true
        });
    });
    begun.recv().unwrap();
    driver.function.pause();
    assert_eq!(said(&mut driver).0, ACK);
    assert_eq!(link.levels().plugged, 4 * BLOCK);
    owner.join().unwrap();
    driver.function.resume();
    assert_eq!(state(&mut driver, 0, 4), (ACK, 0));
}

#[test]
fn a_reset_keeps_what_is_plugged() {
    let (link, _made) = attended(8 * BLOCK);
    let mut driver = driver(&link);
    assert_eq!(ask(&mut driver, PLUG, 1, 2), ACK);
    driver.start_full();
    assert_eq!(state(&mut driver, 1, 2), (ACK, 0));
    assert_eq!(link.levels().plugged, 2 * BLOCK);
}

#[test]
fn a_reset_with_a_question_open_forgets_it() {
    let (link, called) = link(8 * BLOCK);
    let mut driver = driver(&link);
    for _ in 0..5 {
        offer(&mut driver, &bytes_of(PLUG, REGION.start, 4));
        called.recv().unwrap();
        driver.start_full();
    }
    link.attend(|_| panic!("it was forgotten"));
    assert_eq!(state(&mut driver, 0, 4), (ACK, 1));
}

#[test]
fn unplugging_everything_lets_the_usable_part_shrink() {
    let (link, _made) = attended(512 * MIB);
    let mut driver = driver(&link);
    assert_eq!(ask(&mut driver, PLUG, 0, 16), ACK);
    link.request(BLOCK);
    assert_eq!(link.levels().usable, 576 * MIB);
    assert_eq!(ask(&mut driver, PLUG, 100, 1), NACK);
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), ACK);
    wait_for("the usable part", || {
        (link.levels().usable == BLOCK + REGION.slack).then_some(())
    });
    assert_eq!(ask(&mut driver, PLUG, 100, 1), ERROR);
}
