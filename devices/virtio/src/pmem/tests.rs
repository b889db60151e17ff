use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use testudo_memory::{GuestWindows, HostWindow};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::conformance::{Subject, conformance};
use crate::driver::{Areas, BUFFERS, Desc, Driver, FakeWindows, NEXT, WRITE, offer, write_desc};

const START: u64 = 0x1_4000_0000;
const SIZE: u64 = 0x20_0000;

fn region(windows: &FakeWindows) -> PmemRegion {
    let window = Arc::new(HostWindow::reserve(SIZE).unwrap());
    PmemRegion {
        start: START,
        size: SIZE,
        shown: windows.show(START, &window, true).unwrap(),
    }
}

fn file() -> File {
    let name = format!("testudo-pmem-{}", std::process::id());
    let path = std::path::Path::new("/dev/shm").join(name);
    let file = File::create(&path).unwrap();
    let _ = std::fs::remove_file(path);
    file
}

fn make(io: &IoHandle) -> Box<dyn VirtioModel> {
    let region = region(&FakeWindows::default());
    Box::new(Pmem::new(region, Some(file()), io.clone()))
}

fn readonly(io: &IoHandle) -> Box<dyn VirtioModel> {
    Box::new(Pmem::new(region(&FakeWindows::default()), None, io.clone()))
}

fn request() -> (Vec<u8>, u32) {
    (vec![0; 4], 4)
}

const SUBJECT: Subject = Subject {
    make,
    queue: 0,
    request,
};

const READONLY: Subject = Subject {
    make: readonly,
    queue: 0,
    request,
};

conformance!(conforms, SUBJECT);
conformance!(conforms_read_only, READONLY);

fn ask(driver: &mut Driver, request: &[u8], room: u32) -> (u32, i32) {
    let answer = BUFFERS + 0x1000;
    driver
        .ram
        .write_slice(request, GuestAddress(BUFFERS))
        .unwrap();
    driver
        .ram
        .write_obj(0x5a5a_5a5a_u32, GuestAddress(answer))
        .unwrap();
    let len = u32::try_from(request.len()).unwrap();
    let descs = [
        Desc::new(BUFFERS, len, NEXT, 1),
        Desc::new(answer, room, WRITE, 0),
    ];
    driver.submit(0, &descs);
    let (_, written) = driver.used(0);
    let said = driver.ram.read_obj::<i32>(GuestAddress(answer)).unwrap();
    (written, said)
}

#[test]
fn the_guest_is_told_where_the_memory_is() {
    let mut driver = Driver::new(make);
    let config = 0x2000;
    assert_eq!(driver.u64(config), START);
    assert_eq!(driver.u64(config + 8), SIZE);
    driver.put_u64(config, 0);
    assert_eq!(driver.u64(config), START);
}

#[test]
fn the_memory_is_there_while_the_model_is() {
    let windows = FakeWindows::default();
    let seen = windows.clone();
    let driver = Driver::new(move |io| Box::new(Pmem::new(region(&windows), None, io.clone())));
    assert_eq!(seen.shown(), [(START, SIZE)]);
    drop(driver);
    assert_eq!(seen.shown(), []);
}

#[test]
fn a_flush_that_fails_is_told_and_counted() {
    let (reader, _writer) = io::pipe().unwrap();
    let pipe = File::from(std::os::fd::OwnedFd::from(reader));
    let windows = FakeWindows::default();
    let mut driver =
        Driver::new(|io| Box::new(Pmem::new(region(&windows), Some(pipe), io.clone())));
    driver.start_full();
    assert_eq!(ask(&mut driver, &[0; 4], 4), (4, -1));
    let errors = &driver.function.counters().queues[0].errors;
    assert_eq!(errors.load(Ordering::Relaxed), 1);
}

#[test]
fn what_is_no_flush_is_refused() {
    let mut driver = Driver::new(make);
    driver.start_full();
    assert_eq!(ask(&mut driver, &[0; 4], 4), (4, 0));
    assert_eq!(ask(&mut driver, &[0; 4], 64), (4, 0));
    assert_eq!(ask(&mut driver, &[1, 0, 0, 0], 4), (4, -1));
    assert_eq!(ask(&mut driver, &[0; 2], 4), (4, -1), "too short");
    assert_eq!(ask(&mut driver, &[0; 4], 2).0, 0, "no room for an answer");
}

#[test]
fn requests_that_come_together_are_all_answered() {
    let mut driver = Driver::new(make);
    driver.start_full();
    let areas = Areas::of(0, 16);
    for head in [0_u16, 2, 4, 6, 8, 10, 12, 14] {
        let answer = BUFFERS + 0x1000 + u64::from(head) * 8;
        write_desc(
            &driver.ram,
            areas.desc,
            head,
            Desc::new(BUFFERS, 4, NEXT, head + 1),
        );
        write_desc(
            &driver.ram,
            areas.desc,
            head + 1,
            Desc::new(answer, 4, WRITE, 0),
        );
        offer(&driver.ram, &areas, head);
    }
    driver.kick(0);
    for head in [0_u32, 2, 4, 6, 8, 10, 12, 14] {
        assert_eq!(driver.used(0), (head, 4));
    }
}
