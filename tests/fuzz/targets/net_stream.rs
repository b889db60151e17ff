//! Any bytes over the stream of a network device, cut anywhere: the guest gets the frames that are in
//! them and nothing else, and finds its link down at the end.
//!
//! Input: a byte of choices, a byte that says how the stream is cut, and the stream.
#![no_main]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use testudo_bus::Access;
use testudo_fuzz::Host;
use testudo_memory::{RamHandle, RamView};
use testudo_pci::PciFunction;
use virtio_devices::{IoThread, Limits, Net, NetPort, PortSettings, VirtioPci, Wire, Wiring};
use vm_memory::{Bytes, GuestAddress};

const QUEUE: u16 = 256;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Of the transmit queue, which is empty.
const TRANSMIT: u64 = 0x5000;
const BUFFERS: u64 = 0x1_0000;
/// Room for a header and the longest frame there can be in an input.
const LARGE: u32 = 4608;
/// Many frames span several of these.
const SMALL: u32 = 512;
const MOST_INPUT: usize = 4096;
const HEADER: usize = 12;
const LONGEST: usize = 65536 + 18;
const MRG_RXBUF: u32 = 1 << 15;
const STATUS: u32 = 1 << 16;
const WRITE: u16 = 2;

/// One for all runs: starting it is what costs.
static IO: LazyLock<IoThread> =
    LazyLock::new(|| IoThread::spawn("net", || Ok(())).expect("a thread"));

/// Both queues, with every descriptor of the first one a buffer of its own.
fn set_up(function: &mut VirtioPci, ram: &RamView, features: u32, size: u32) {
    for head in 0..QUEUE {
        let at = GuestAddress(DESC + u64::from(head) * 16);
        let buffer = BUFFERS + u64::from(head) * u64::from(size);
        let mut desc = [0; 16];
        desc[..8].copy_from_slice(&buffer.to_le_bytes());
        desc[8..12].copy_from_slice(&size.to_le_bytes());
        desc[12..14].copy_from_slice(&WRITE.to_le_bytes());
        ram.write_slice(&desc, at).expect("it fits");
        let slot = GuestAddress(AVAIL + 4 + u64::from(head) * 2);
        ram.write_obj(head, slot).expect("it fits");
    }
    ram.write_obj(QUEUE, GuestAddress(AVAIL + 2))
        .expect("it fits");
    let mut put =
        |offset: u64, data: &[u8]| function.bar_write(VirtioPci::BAR, Access { offset }, data);
    for status in [0, 1, 3] {
        put(20, &[status]);
    }
    put(8, &0u32.to_le_bytes());
    put(12, &(features | STATUS).to_le_bytes());
    put(8, &1u32.to_le_bytes());
    put(12, &1u32.to_le_bytes());
    put(20, &[0xb]);
    let areas = [
        (DESC, AVAIL, USED),
        (TRANSMIT, TRANSMIT + 0x1000, TRANSMIT + 0x2000),
    ];
    for (queue, (desc, avail, used)) in (0u16..).zip(areas) {
        put(22, &queue.to_le_bytes());
        put(24, &QUEUE.to_le_bytes());
        put(32, &desc.to_le_bytes());
        put(40, &avail.to_le_bytes());
        put(48, &used.to_le_bytes());
        put(28, &1u16.to_le_bytes());
    }
    put(20, &[0xf]);
}

/// What a guest has to get of this stream.
fn frames(mut stream: &[u8]) -> Vec<&[u8]> {
    let mut frames = Vec::new();
    while let Some((prefix, rest)) = stream.split_first_chunk::<4>() {
        let len = u32::from_be_bytes(*prefix) as usize;
        if len > LONGEST || len > rest.len() {
            break;
        }
        let (frame, rest) = rest.split_at(len);
        // What has no link header is no frame.
        if len >= 14 {
            frames.push(frame);
        }
        stream = rest;
    }
    frames
}

/// The frame that begins at used element `at`, and the element behind it.
fn used_frame(ram: &RamView, at: u16, size: u32) -> (Vec<u8>, u16) {
    let mut bytes = Vec::new();
    let (mut next, mut buffers) = (at, 1);
    while next - at < buffers {
        let element = GuestAddress(USED + 4 + u64::from(next) * 8);
        let head: u32 = ram.read_obj(element).expect("it is there");
        let len: u32 = ram
            .read_obj(element.0.checked_add(4).map(GuestAddress).expect("it fits"))
            .expect("it is there");
        assert!(head < u32::from(QUEUE) && len <= size);
        let start = bytes.len();
        bytes.resize(start + len as usize, 0);
        let buffer = GuestAddress(BUFFERS + u64::from(head) * u64::from(size));
        ram.read_slice(&mut bytes[start..], buffer)
            .expect("it is there");
        if next == at {
            assert_eq!(bytes[..10], [0; 10]);
            buffers = u16::from_le_bytes([bytes[10], bytes[11]]);
        }
        next += 1;
    }
    (bytes.split_off(HEADER), next)
}

fuzz_target!(|data: &[u8]| {
    let [how, cut, stream @ ..] = data else {
        return;
    };
    let stream = &stream[..stream.len().min(MOST_INPUT)];
    let (features, size) = match how & 3 {
        0 => (0, LARGE),
        1 => (MRG_RXBUF, LARGE),
        _ => (MRG_RXBUF, SMALL),
    };
    let ram = RamView::from_ranges(&[(GuestAddress(0), 2 << 20)]).expect("memory");
    let (here, mut there) = UnixStream::pair().expect("sockets");
    let port = NetPort::new(PortSettings {
        id: "net0".to_owned(),
        wires: vec![Wire::stream(here.into()).expect("a wire")],
        vhost: Vec::new(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: (how & 4 != 0).then_some(65520),
        offloads: true,
        rx: Limits::default(),
        tx: Limits::default(),
    })
    .expect("eventfds");
    let wiring = Wiring {
        ram: RamHandle::new(ram.clone()),
        msi: &Host,
        doorbells: Arc::new(Host),
        windows: Arc::new(Host),
    };
    let model = Box::new(Net::new(&port, vec![IO.handle()]));
    let mut function = VirtioPci::new(model, wiring).expect("a device");
    function.config_write(4, &[6, 0]);
    set_up(&mut function, &ram, features, size);
    // Few pieces: a socket that nobody reads any more has room for some hundred.
    let cut = usize::from(*cut).max(8) * 8;
    for (number, piece) in stream.chunks(cut).enumerate() {
        // A device that has found nonsense listens no more.
        if there.write_all(piece).is_err() {
            break;
        }
        if how & 8 != 0 && number % 4 == 1 {
            function.pause();
            function.resume();
        }
    }
    drop(there);
    let mut status = [1];
    while status != [0] {
        std::thread::yield_now();
        function.bar_read(VirtioPci::BAR, Access { offset: 0x2006 }, &mut status);
    }
    function.pause();
    let used: u16 = ram.read_obj(GuestAddress(USED + 2)).expect("it is there");
    let mut at = 0;
    for frame in frames(stream) {
        assert!(at < used, "a frame is missing");
        let (got, next) = used_frame(&ram, at, size);
        assert!(got == frame, "a frame has changed");
        at = next;
    }
    assert_eq!(at, used, "more than was sent");
});
