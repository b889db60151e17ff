use std::io::{Read, pipe};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use testudo_pci::PciFunction;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::conformance::{Subject, conformance};
use crate::driver::{Areas, BUFFERS, Desc, Driver, WRITE, wait_for, write_desc};

fn make(io: &IoHandle) -> Box<dyn VirtioModel> {
    let (console, _) = Console::single(Box::new(io::sink()), (80, 25), io.clone()).unwrap();
    Box::new(console)
}

fn request() -> (Vec<u8>, u32) {
    (b"hello, console".to_vec(), 0)
}

const SUBJECT: Subject = Subject {
    make,
    queue: 1,
    request,
};

conformance!(conforms, SUBJECT);

/// Takes so many bytes, then no more until it is allowed to.
#[derive(Clone, Default)]
struct Valve {
    taken: Arc<Mutex<Vec<u8>>>,
    room: Arc<AtomicUsize>,
}

impl Valve {
    fn open(&self, room: usize) {
        self.room.store(room, Ordering::SeqCst);
    }

    fn taken(&self) -> Vec<u8> {
        self.taken.lock().unwrap().clone()
    }
}

impl Write for Valve {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(self.room.load(Ordering::SeqCst));
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.room.fetch_sub(count, Ordering::SeqCst);
        self.taken.lock().unwrap().extend(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn console(valve: &Valve) -> (Driver, PortHandle) {
    let mut kept = None;
    let mut driver = Driver::new(|io| {
        let sink = Box::new(valve.clone());
        let (console, handle) = Console::single(sink, (80, 25), io.clone()).unwrap();
        kept = Some(handle);
        Box::new(console)
    });
    driver.start_full();
    (driver, kept.unwrap())
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n % 251).to_le_bytes()[0]).collect()
}

#[test]
fn output_waits_for_the_host_and_none_is_lost() {
    let valve = Valve::default();
    let (mut driver, handle) = console(&valve);
    let all = pattern(0x4000);
    driver.ram.write_slice(&all, GuestAddress(BUFFERS)).unwrap();
    let len = u32::try_from(all.len()).unwrap();
    for slot in 0..8 {
        write_desc(
            &driver.ram,
            Areas::of(1, 16).desc,
            slot,
            Desc::new(BUFFERS, len, 0, 0),
        );
        driver.offer_one(1, slot);
    }
    // 64 KiB are kept; the rest stays with the guest.
    wait_for("four chains", || (driver.progress(1).0 == 4).then_some(()));
    thread::sleep(Duration::from_millis(20));
    assert_eq!(driver.progress(1).0, 4);
    assert!(handle.output_waiting());
    // Half a chain goes, a pause comes in between.
    valve.open(0x2000);
    handle.output_ready();
    driver.function.pause();
    driver.function.resume();
    valve.open(usize::MAX);
    wait_for("the end", || {
        thread::sleep(Duration::from_millis(1));
        handle.output_ready().then_some(())
    });
    assert_eq!(driver.progress(1).0, 8);
    let taken = valve.taken();
    assert_eq!(taken.len(), 8 * all.len());
    assert!(taken.chunks(all.len()).all(|chunk| chunk == all));
    assert_eq!(handle.lost(), 0);
}

#[test]
fn a_sink_that_fails_loses_and_counts() {
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    let mut kept = None;
    let mut driver = Driver::new(|io| {
        let (console, handle) = Console::single(Box::new(writer), (0, 0), io.clone()).unwrap();
        kept = Some(handle);
        Box::new(console)
    });
    driver.start_full();
    driver.submit(1, &[Desc::new(BUFFERS, 10, 0, 0)]);
    driver.used(1);
    assert_eq!(kept.unwrap().lost(), 10);
}

#[test]
fn input_is_bounded_and_comes_in_order() {
    let (mut driver, handle) = console(&Valve::default());
    let all = pattern(100_000);
    let taken = handle.offer(&all);
    assert_eq!(taken, 64 * 1024);
    assert_eq!(handle.offer(b"x"), 0);
    assert!(handle.room().read().is_err());
    let mut heard = Vec::new();
    while heard.len() < taken {
        driver.submit(0, &[Desc::new(BUFFERS, 3000, WRITE, 0)]);
        let (_, len) = driver.used(0);
        let mut data = vec![0; usize::try_from(len).unwrap()];
        driver
            .ram
            .read_slice(&mut data, GuestAddress(BUFFERS))
            .unwrap();
        heard.extend(data);
    }
    assert!(heard == all[..taken]);
    wait_for("room", || handle.room().read().ok());
}

#[test]
fn the_size_is_configuration_and_its_change_an_interrupt() {
    let (mut driver, handle) = console(&Valve::default());
    let config = 0x2000;
    assert_eq!((driver.u16(config), driver.u16(config + 2)), (80, 25));
    let [before] = driver.read(0x15);
    handle.resize(132, 50);
    driver.interrupt(0);
    let [after] = driver.read(0x15);
    assert_ne!(before, after);
    assert_eq!((driver.u16(config), driver.u16(config + 2)), (132, 50));
}

/// Port 1 is "one", port 2 is "two".
struct Ports {
    driver: Driver,
    handles: Vec<PortHandle>,
    valve: Valve,
}

impl Ports {
    fn new() -> Self {
        let valve = Valve::default();
        valve.open(usize::MAX);
        let mut handles = Vec::new();
        let mut driver = Driver::new(|io| {
            let port = |name: &str| (name.to_owned(), Box::new(valve.clone()) as PortSink);
            let (model, made) = Console::ports(vec![port("one"), port("two")], io.clone()).unwrap();
            handles = made;
            Box::new(model)
        });
        driver.start_full();
        Self {
            driver,
            handles,
            valve,
        }
    }

    fn say(&mut self, port: u32, event: u16, value: u16) {
        let mut bytes = port.to_le_bytes().to_vec();
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        let ram = &self.driver.ram;
        ram.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
        self.driver.submit(3, &[Desc::new(BUFFERS, 8, 0, 0)]);
        self.driver.used(3);
    }

    fn hear(&mut self) -> (u32, u16, u16, String) {
        let at = BUFFERS + 0x1000;
        self.driver.submit(2, &[Desc::new(at, 64, WRITE, 0)]);
        let (_, len) = self.driver.used(2);
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        self.driver
            .ram
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        let name = String::from_utf8(bytes.split_off(8)).unwrap();
        let port = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        let event = u16::from_le_bytes(bytes[4..6].try_into().unwrap());
        let value = u16::from_le_bytes(bytes[6..].try_into().unwrap());
        (port, event, value, name)
    }
}

#[test]
fn ports_are_announced_named_and_opened() {
    let mut ports = Ports::new();
    ports.handles[1].set_connected(false);
    ports.say(u32::MAX, 0, 1);
    let plain = String::new;
    assert_eq!(ports.hear(), (1, 1, 1, plain()));
    assert_eq!(ports.hear(), (2, 1, 1, plain()));
    ports.say(1, 3, 1);
    assert_eq!(ports.hear(), (1, 7, 1, "one".into()));
    assert_eq!(ports.hear(), (1, 6, 1, plain()));
    ports.say(2, 3, 1);
    assert_eq!(ports.hear(), (2, 7, 1, "two".into()));
    ports.handles[1].set_connected(true);
    assert_eq!(ports.hear(), (2, 6, 1, plain()));
    ports.handles[1].set_connected(false);
    assert_eq!(ports.hear(), (2, 6, 0, plain()));
    // Nonsense.
    for (port, event) in [(99, 3), (0, 3), (1, 99), (u32::MAX, u16::MAX)] {
        ports.say(port, event, 1);
    }
    // Output is where the port's queues are; input waits until the guest has opened the port.
    let ram = &ports.driver.ram;
    ram.write_slice(b"out", GuestAddress(BUFFERS)).unwrap();
    ports.driver.submit(5, &[Desc::new(BUFFERS, 3, 0, 0)]);
    ports.driver.used(5);
    assert_eq!(ports.valve.taken(), b"out");
    ports.handles[1].offer(b"in");
    ports.driver.submit(6, &[Desc::new(BUFFERS, 64, WRITE, 0)]);
    thread::sleep(Duration::from_millis(20));
    assert_eq!(ports.driver.progress(6).0, 0);
    ports.say(2, 6, 1);
    assert_eq!(ports.driver.used(6), (0, 2));
}

#[test]
fn a_pipe_carries_a_flood() {
    let (mut reader, writer) = pipe().unwrap();
    let mut driver = Driver::new(|io| {
        let (console, _) = Console::single(Box::new(writer), (0, 0), io.clone()).unwrap();
        Box::new(console)
    });
    driver.start_full();
    let flood = thread::spawn(move || {
        for _ in 0..500 {
            driver.submit(1, &[Desc::new(BUFFERS, 4000, 0, 0)]);
            driver.used(1);
        }
    });
    let mut heard = Vec::new();
    reader.read_to_end(&mut heard).unwrap();
    flood.join().unwrap();
    assert_eq!(heard.len(), 500 * 4000);
}
