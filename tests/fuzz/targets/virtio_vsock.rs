//! Any packets of a guest's against the vsock device, with a host that answers on one port.
//!
//! Input: a byte of choices, then packets of 16 bytes each: operation, flags, ports, the length that
//! the header says, the bytes that are there, credit. The first packets may be an ordinary opening.
#![no_main]

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use testudo_bus::Access;
use testudo_fuzz::Host;
use testudo_memory::{RamHandle, RamView};
use testudo_pci::PciFunction;
use virtio_devices::{IoThread, VirtioPci, Vsock, VsockBackend, VsockHost, Wiring};
use vm_memory::{Bytes, GuestAddress};

const RAM: usize = 1 << 20;
const CID: u32 = 3;
const PACKET: usize = 16;
const MOST: usize = 64;
/// Where the rings of each queue are, the packets, and the receive buffers.
const RINGS: u64 = 0x1_0000;
const PACKETS: u64 = 0x4_0000;
const BUFFERS: u64 = 0x8_0000;

/// One back end for all inputs: a reset ends what an input has left.
fn backend() -> &'static (VsockBackend, IoThread) {
    static BACKEND: OnceLock<(VsockBackend, IoThread)> = OnceLock::new();
    BACKEND.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("fuzz-vsock-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a folder");
        let listen = |name: &str| UnixListener::bind(dir.join(name)).expect("a socket");
        let (listener, echo) = (listen("v"), listen("v_80"));
        listener.set_nonblocking(true).expect("a socket");
        std::thread::spawn(move || {
            for stream in echo.incoming().flatten() {
                std::thread::spawn(move || {
                    let mut from = stream.try_clone()?;
                    let mut to = stream;
                    io::copy(&mut from, &mut to)
                });
            }
        });
        let io = IoThread::spawn("io", || Ok(())).expect("a thread");
        let host = VsockHost {
            listener: listener.into(),
            base: Some(dir.join("v")),
        };
        let backend = VsockBackend::new(host, 16, &io.handle()).expect("a back end");
        (backend, io)
    })
}

fn put_desc(ram: &RamView, queue: u64, index: u16, desc: (u64, u32, u16)) {
    let at = RINGS + queue * 0x4000 + u64::from(index) * 16;
    let (addr, len, flags) = desc;
    let mut bytes = addr.to_le_bytes().to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend([0, 0]);
    ram.write_slice(&bytes, GuestAddress(at)).expect("it fits");
}

fn offer(ram: &RamView, queue: u64, heads: u16) {
    let avail = RINGS + queue * 0x4000 + 0x1000;
    for head in 0..heads {
        let at = avail + 4 + u64::from(head) * 2;
        ram.write_obj(head, GuestAddress(at)).expect("it fits");
    }
    ram.write_obj(heads, GuestAddress(avail + 2))
        .expect("it fits");
}

fn packet(step: &[u8; PACKET]) -> (Vec<u8>, u32) {
    let [
        op,
        flags,
        guest,
        host,
        len0,
        len1,
        there0,
        there1,
        cid,
        kind,
        alloc @ ..,
    ] = *step;
    let mut bytes = u64::from(if cid & 15 == 15 { 9 } else { CID })
        .to_le_bytes()
        .to_vec();
    bytes.extend(u64::from(if cid & 0xf0 == 0xf0 { 9u32 } else { 2 }).to_le_bytes());
    bytes.extend(u32::from(guest & 3).to_le_bytes());
    bytes.extend(if host & 7 == 7 { 81u32 } else { 80 }.to_le_bytes());
    let len = u32::from(u16::from_le_bytes([len0, len1]));
    let len = if kind & 0x40 != 0 {
        u32::MAX - len
    } else {
        len
    };
    bytes.extend(len.to_le_bytes());
    bytes.extend(u16::from(if kind & 7 == 7 { 2u8 } else { 1 }).to_le_bytes());
    bytes.extend(u16::from(op & 15).to_le_bytes());
    bytes.extend(u32::from(flags & 3).to_le_bytes());
    let [a0, a1, a2, f0, f1, f2] = alloc;
    bytes.extend([a0, a1, a2, 0, f0, f1, f2, 0]);
    (bytes, u32::from(u16::from_le_bytes([there0, there1])))
}

fuzz_target!(|data: &[u8]| {
    let [how, rest @ ..] = data else {
        return;
    };
    let ram = RamView::from_ranges(&[(GuestAddress(0), RAM)]).expect("memory");
    let packets = rest.as_chunks::<PACKET>().0;
    let count = packets.len().min(MOST) as u16;
    for (index, step) in (0..).zip(&packets[..usize::from(count)]) {
        let at = PACKETS + u64::from(index) * 0x1000;
        let (bytes, there) = packet(step);
        ram.write_slice(&bytes, GuestAddress(at)).expect("it fits");
        put_desc(&ram, 1, index, (at, there, 0));
    }
    offer(&ram, 1, count);
    let buffers = u16::from(how >> 2);
    for index in 0..buffers {
        let at = BUFFERS + u64::from(index) * 0x1000;
        let len = if how & 1 != 0 { 0x1000 } else { 50 };
        put_desc(&ram, 0, index, (at, len, 2));
    }
    offer(&ram, 0, buffers);
    let (backend, _) = backend();
    let wiring = Wiring {
        ram: RamHandle::new(ram),
        msi: &Host,
        doorbells: Arc::new(Host),
        windows: Arc::new(Host),
    };
    let model = Box::new(Vsock::new(CID, backend.clone()));
    let mut function = VirtioPci::new(model, wiring).expect("a device");
    let mut put =
        |offset: u64, data: &[u8]| function.bar_write(VirtioPci::BAR, Access { offset }, data);
    for status in [0, 1, 3] {
        put(20, &[status]);
    }
    put(8, &1u32.to_le_bytes());
    put(12, &1u32.to_le_bytes());
    put(20, &[0xb]);
    for queue in 0..3u16 {
        let base = RINGS + u64::from(queue) * 0x4000;
        put(22, &queue.to_le_bytes());
        put(24, &64u16.to_le_bytes());
        put(32, &base.to_le_bytes());
        put(40, &(base + 0x1000).to_le_bytes());
        put(48, &(base + 0x2000).to_le_bytes());
        put(28, &1u16.to_le_bytes());
    }
    put(20, &[0xf]);
    // The worker has had a look when this comes back.
    backend.drain(Duration::ZERO);
    if how & 2 != 0 {
        function.pause();
        function.resume();
        backend.drain(Duration::ZERO);
    }
});
