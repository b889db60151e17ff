//! Any rings, descriptors, frames and commands in guest RAM, and any register accesses around them,
//! against a network device whose wire is a datagram socket.
//!
//! Input: a byte of choices, the number of accesses, the accesses (16 bytes each), the number of frames
//! that come from the host, the frames (a length in units of 64 bytes each), and what is in guest RAM
//! from its beginning at 4 KiB on.
#![no_main]

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use testudo_bus::Access;
use testudo_fuzz::Host;
use testudo_memory::{RamHandle, RamView};
use testudo_pci::PciFunction;
use virtio_devices::{
    IoThread, Limits, Net, NetPort, PortSettings, RateLimit, VirtioPci, Way, Wire, Wiring,
};
use vm_memory::{Bytes, GuestAddress};

const RAM: usize = 64 << 10;
const RAM_START: u64 = 0x1000;
const STEP: usize = 16;
const NOTIFY: u64 = 0x3000;
const MRG_RXBUF: u32 = 1 << 15;
const STATUS: u32 = 1 << 16;
const CTRL_VQ: u32 = 1 << 17;
const CTRL_RX: u32 = 1 << 18;
const MQ: u32 = 1 << 22;
const INDIRECT: u32 = 1 << 28;
const EVENT_IDX: u32 = 1 << 29;

/// One for all runs: starting it is what costs.
static IO: LazyLock<IoThread> =
    LazyLock::new(|| IoThread::spawn("net", || Ok(())).expect("a thread"));

/// A port with two queue pairs, and the other ends of its wires.
fn port(how: u8) -> (NetPort, Vec<UnixDatagram>) {
    let pairs = 0..2;
    let (wires, ends) = pairs
        .map(|_| {
            let (here, there) = UnixDatagram::pair().expect("sockets");
            there.set_nonblocking(true).expect("a socket");
            let wire = Wire::datagrams(OwnedFd::from(here)).expect("a wire");
            (wire, there)
        })
        .unzip();
    let limits = Limits {
        bytes: RateLimit::new(1 << 30, 1000).filter(|_| how & 0x40 != 0),
        ops: None,
    };
    let port = NetPort::new(PortSettings {
        id: "net0".to_owned(),
        wires,
        vhost: Vec::new(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: Some(1500),
        offloads: true,
        rx: limits,
        tx: limits,
    });
    (port.expect("eventfds"), ends)
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
        _ => kick(function, u16::from(kind >> 3) % 5),
    }
}

fn kick(function: &mut VirtioPci, queue: u16) {
    let offset = NOTIFY + u64::from(queue) * 4;
    function.bar_write(VirtioPci::BAR, Access { offset }, &queue.to_le_bytes());
}

/// What a driver does, with the rings of each queue at a place of its own.
fn set_up(function: &mut VirtioPci, how: u8) {
    let mut put =
        |offset: u64, data: &[u8]| function.bar_write(VirtioPci::BAR, Access { offset }, data);
    put(20, &[0]);
    put(20, &[1]);
    put(20, &[3]);
    let choices = [MRG_RXBUF, EVENT_IDX, INDIRECT, MQ];
    let features = (0..)
        .zip(choices)
        .filter(|(n, _)| how & 1 << n != 0)
        .fold(STATUS | CTRL_VQ | CTRL_RX, |all, (_, bit)| all | bit);
    put(8, &0u32.to_le_bytes());
    put(12, &features.to_le_bytes());
    put(8, &1u32.to_le_bytes());
    put(12, &1u32.to_le_bytes());
    put(20, &[0xb]);
    for queue in 0..5u16 {
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
    let Some((frames, rest)) = rest.split_first() else {
        return;
    };
    let (frames, rest) = rest.split_at(usize::from(*frames & 15).min(rest.len()));
    let ram = RamView::from_ranges(&[(GuestAddress(RAM_START), RAM)]).expect("64 KiB of memory");
    let contents = &rest[..rest.len().min(RAM)];
    ram.write_slice(contents, GuestAddress(RAM_START))
        .expect("it fits");
    let (port, ends) = port(*how);
    let wiring = Wiring {
        ram: RamHandle::new(ram),
        msi: &Host,
        doorbells: Arc::new(Host),
        windows: Arc::new(Host),
    };
    let model = Box::new(Net::new(&port, vec![IO.handle()]));
    let mut function = VirtioPci::new(model, wiring).expect("a device");
    function.config_write(4, &[6, 0]);
    set_up(&mut function, *how);
    for (number, frame) in frames.iter().enumerate() {
        let _ = ends[number % 2].send(&vec![*frame; usize::from(*frame) * 64]);
    }
    (0..5).for_each(|queue| kick(&mut function, queue));
    for (number, step) in steps.as_chunks::<STEP>().0.iter().enumerate() {
        access(&mut function, step);
        match number % 8 {
            3 => drop(port.set_link(step[0] & 1 != 0)),
            5 => port.set_limits(Way::Rx, Limits::default()),
            _ => {}
        }
    }
    // Whatever was asked for, the device stops and can start again.
    function.bar_write(VirtioPci::BAR, Access { offset: 20 }, &[0]);
    set_up(&mut function, *how);
});
