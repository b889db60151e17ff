//! Any rings, descriptors, control messages and output in guest RAM, and any register accesses around
//! them, against a console and against named ports, whose host takes and gives as it likes.
//!
//! Input: a byte of choices, the number of accesses, the accesses (16 bytes each; some are the host's),
//! and what is in guest RAM from its beginning at 4 KiB on.
#![no_main]

use std::io::{self, Write};
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use testudo_bus::Access;
use testudo_fuzz::Host;
use testudo_memory::{RamHandle, RamView};
use testudo_pci::PciFunction;
use virtio_devices::{Console, IoThread, PortHandle, VirtioPci, Wiring};
use vm_memory::{Bytes, GuestAddress};

const RAM: usize = 64 << 10;
const RAM_START: u64 = 0x1000;
const STEP: usize = 16;
const NOTIFY: u64 = 0x3000;
const CONFIG: u64 = 0x2000;
/// Of three ports and control.
const QUEUES: u16 = 8;
const SIZE: u32 = 1 << 0;
const MULTIPORT: u32 = 1 << 1;
const INDIRECT: u32 = 1 << 28;
const EVENT_IDX: u32 = 1 << 29;

/// One for all runs: starting it is what costs.
static IO: LazyLock<IoThread> =
    LazyLock::new(|| IoThread::spawn("console", || Ok(())).expect("a thread"));

/// The host's end of a port: it takes all, a little, nothing, or fails.
#[derive(Clone, Default)]
struct Sink {
    mood: Arc<AtomicU8>,
    taken: Arc<AtomicUsize>,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = match self.mood.load(Ordering::Relaxed) & 3 {
            0 => bytes.len(),
            1 => bytes.len().min(7),
            2 => return Err(io::ErrorKind::WouldBlock.into()),
            _ => return Err(io::ErrorKind::BrokenPipe.into()),
        };
        self.taken.fetch_add(count, Ordering::Relaxed);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A console, or two ports with names.
fn console(how: u8, sink: &Sink) -> (Console, Vec<PortHandle>) {
    let io = IO.handle();
    if how & 1 == 0 {
        let made = Console::single(Box::new(sink.clone()), (80, 25), io);
        let (console, handle) = made.expect("eventfds");
        return (console, vec![handle]);
    }
    let port = |name: &str| -> (String, virtio_devices::PortSink) {
        (name.to_owned(), Box::new(sink.clone()))
    };
    Console::ports(vec![port("one"), port("org.example.two")], io).expect("eventfds")
}

fn access(function: &mut VirtioPci, step: &[u8; STEP]) {
    let [kind, width, low, high, value @ ..] = *step;
    let at = Access {
        offset: u64::from(u16::from_le_bytes([low, high])) & (VirtioPci::BAR_SIZE - 1),
    };
    let width = 1usize << (width & 3);
    let mut data: [u8; 8] = value[..8].try_into().expect("eight bytes");
    if at.offset + width as u64 > VirtioPci::BAR_SIZE {
        return;
    }
    match kind & 7 {
        0..4 => function.bar_write(VirtioPci::BAR, at, &data[..width]),
        4 => function.bar_read(VirtioPci::BAR, at, &mut data[..width]),
        5 => {
            function.pause();
            function.resume();
        }
        _ => kick(function, u16::from(kind >> 3) % QUEUES),
    }
}

fn kick(function: &mut VirtioPci, queue: u16) {
    let offset = NOTIFY + u64::from(queue) * 4;
    function.bar_write(VirtioPci::BAR, Access { offset }, &queue.to_le_bytes());
}

/// What the host does meanwhile.
fn host(handles: &[PortHandle], sink: &Sink, step: &[u8; STEP]) {
    let [what, which, count, mood, ..] = *step;
    let Some(handle) = handles.get(usize::from(which) % handles.len().max(1)) else {
        return;
    };
    sink.mood.store(mood, Ordering::Relaxed);
    match what >> 3 & 7 {
        0 => {
            let input = vec![which; usize::from(count) << 9];
            assert!(handle.offer(&input) <= input.len());
        }
        1 => handle.set_connected(count & 1 != 0),
        2 => handle.resize(count.into(), mood.into()),
        3 => {
            handle.output_ready();
        }
        4 => {
            let _ = handle.room().read();
        }
        _ => {
            handle.output_waiting();
        }
    }
}

/// What a driver does, with the rings of each queue at a place of its own.
fn set_up(function: &mut VirtioPci, how: u8) {
    let mut put =
        |offset: u64, data: &[u8]| function.bar_write(VirtioPci::BAR, Access { offset }, data);
    for status in [0, 1, 3] {
        put(20, &[status]);
    }
    let own = if how & 1 == 0 { SIZE } else { MULTIPORT };
    let choices = [own, EVENT_IDX, INDIRECT];
    let features = (1..)
        .zip(choices)
        .filter(|(n, _)| how & 1 << n != 0)
        .fold(0, |all, (_, bit)| all | bit);
    put(8, &0u32.to_le_bytes());
    put(12, &features.to_le_bytes());
    put(8, &1u32.to_le_bytes());
    put(12, &1u32.to_le_bytes());
    put(20, &[0xb]);
    for queue in 0..QUEUES {
        let base = RAM_START + u64::from(queue) * 0x800;
        put(22, &queue.to_le_bytes());
        put(24, &(2u16 << (how >> 4 & 3)).to_le_bytes());
        put(32, &base.to_le_bytes());
        put(40, &(base + 0x400).to_le_bytes());
        put(48, &(base + 0x600).to_le_bytes());
        put(28, &1u16.to_le_bytes());
    }
    put(20, &[0xf]);
}

fuzz_target!(|data: &[u8]| {
    let [how, steps, rest @ ..] = data else {
        return;
    };
    let (steps, rest) = rest.split_at((usize::from(*steps) * STEP).min(rest.len()));
    let ram = RamView::from_ranges(&[(GuestAddress(RAM_START), RAM)]).expect("64 KiB of memory");
    let contents = &rest[..rest.len().min(RAM)];
    ram.write_slice(contents, GuestAddress(RAM_START))
        .expect("it fits");
    let sink = Sink::default();
    let (model, handles) = console(*how, &sink);
    let wiring = Wiring {
        ram: RamHandle::new(ram),
        msi: &Host,
        doorbells: Arc::new(Host),
        windows: Arc::new(Host),
    };
    let mut function = VirtioPci::new(Box::new(model), wiring).expect("a device");
    function.config_write(4, &[6, 0]);
    set_up(&mut function, *how);
    (0..QUEUES).for_each(|queue| kick(&mut function, queue));
    for step in steps.as_chunks::<STEP>().0 {
        if step[0] & 0x40 == 0 {
            access(&mut function, step);
        } else {
            host(&handles, &sink, step);
        }
    }
    // Whatever was asked for, the device stops and can start again, and its configuration is there.
    let reset = Access { offset: 20 };
    function.bar_write(VirtioPci::BAR, reset, &[0]);
    set_up(&mut function, *how);
    let mut ports = [0; 4];
    let at = Access { offset: CONFIG + 4 };
    function.bar_read(VirtioPci::BAR, at, &mut ports);
    assert_eq!(u32::from_le_bytes(ports), if *how & 1 == 0 { 1 } else { 3 });
});
