use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::AtomicU32;
use std::thread;

use testudo_pci::PciFunction;
use vm_memory::{Bytes, GuestAddress};

use super::packet::{HOST_CID, Header, NEITHER, NO_RECEIVE, NO_SEND, Op, TYPE_STREAM};
use super::*;
use crate::conformance::{Subject, conformance};
use crate::driver::{BUFFERS, Desc, Driver, NEXT, TABLES, WRITE, wait_for, write_desc};

const CID: u32 = 7;
const GUEST: u64 = CID as u64;
/// Where the packets of a test's driver are; the device's are from [`BUFFERS`] on.
const SENT: u64 = TABLES;
const RX_LEN: u32 = 4096;

fn folder() -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("testudo-vsock-{}-{n}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn backend(dir: &std::path::Path, streams: usize, io: &IoHandle) -> VsockBackend {
    let base = dir.join("v");
    let listener = UnixListener::bind(&base).unwrap();
    listener.set_nonblocking(true).unwrap();
    let host = VsockHost {
        listener: listener.into(),
        base: Some(base),
    };
    VsockBackend::new(host, streams, io).unwrap()
}

fn make(io: &IoHandle) -> Box<dyn VirtioModel> {
    let dir = folder();
    let model = Vsock::new(CID, backend(&dir, 16, io));
    std::fs::remove_dir_all(dir).unwrap();
    Box::new(model)
}

/// A reset of a stream that nobody knows: it needs no answer.
fn request() -> (Vec<u8>, u32) {
    (packet(Op::Reset, 1, 1).to_bytes().to_vec(), 0)
}

const SUBJECT: Subject = Subject {
    make,
    queue: TX,
    request,
};

conformance!(conforms, SUBJECT);

fn packet(op: Op, guest_port: u32, host_port: u32) -> Header {
    Header {
        src_cid: GUEST,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        len: 0,
        kind: TYPE_STREAM,
        op: Some(op),
        flags: 0,
        buf_alloc: 64 * 1024,
        fwd_cnt: 0,
    }
}

/// A guest with 8 receive buffers.
struct Guest {
    driver: Driver,
    dir: PathBuf,
    backend: VsockBackend,
    received: u32,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Guest {
    fn new(streams: usize) -> Self {
        let dir = folder();
        let mut kept = None;
        let driver = Driver::new(|io| {
            let backend = backend(&dir, streams, io);
            kept = Some(backend.clone());
            Box::new(Vsock::new(CID, backend))
        });
        let mut guest = Self {
            driver,
            dir,
            backend: kept.unwrap(),
            received: 0,
        };
        guest.start();
        guest
    }

    fn start(&mut self) {
        self.driver.start_full();
        for slot in 0..8 {
            self.offer(slot);
        }
    }

    /// Header and data are two buffers, as Linux 6.1 has them.
    fn offer(&mut self, slot: u16) {
        let areas = crate::driver::Areas::of(RX, 16);
        let at = BUFFERS + u64::from(slot) * 0x2000;
        let head = slot * 2;
        let ram = &self.driver.ram;
        write_desc(
            ram,
            areas.desc,
            head,
            Desc::new(at, 44, WRITE | NEXT, head + 1),
        );
        write_desc(
            ram,
            areas.desc,
            head + 1,
            Desc::new(at + 0x100, RX_LEN, WRITE, 0),
        );
        self.driver.offer_one(RX, head);
    }

    fn send_with(&mut self, header: Header, there: &[u8]) {
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend(there);
        self.driver
            .ram
            .write_slice(&bytes, GuestAddress(SENT))
            .unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        self.driver.submit(TX, &[Desc::new(SENT, len, 0, 0)]);
        self.driver.used(TX);
    }

    fn send(&mut self, header: Header) {
        self.send_with(header, &[]);
    }

    fn data(&mut self, guest_port: u32, host_port: u32, bytes: &[u8]) {
        let header = Header {
            len: u32::try_from(bytes.len()).unwrap(),
            ..packet(Op::Data, guest_port, host_port)
        };
        self.send_with(header, bytes);
    }

    /// The next packet, its buffer given back.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let (head, len) = self.driver.used(RX);
        let slot = u16::try_from(head / 2).unwrap();
        let at = BUFFERS + u64::from(slot) * 0x2000;
        let mut wire = [0; Header::LEN];
        self.driver
            .ram
            .read_slice(&mut wire, GuestAddress(at))
            .unwrap();
        let header = Header::from_bytes(&wire);
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST));
        assert_eq!(len, 44 + header.len);
        let mut data = vec![0; usize::try_from(header.len).unwrap()];
        self.driver
            .ram
            .read_slice(&mut data, GuestAddress(at + 0x100))
            .unwrap();
        self.received += header.len;
        self.offer(slot);
        (header, data)
    }

    fn expect(&mut self, op: Op) -> Header {
        let (header, data) = self.receive();
        assert_eq!((header.op, data.len()), (Some(op), 0));
        header
    }

    fn nothing_comes(&mut self) {
        thread::sleep(Duration::from_millis(20));
        let (used, seen) = self.driver.progress(RX);
        assert_eq!(used, seen, "a packet came");
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.join(format!("v_{port}"))).unwrap()
    }

    /// The guest's port 1000 is connected to the host's port 80.
    fn connected(&mut self) -> UnixStream {
        let listener = self.listen(80);
        self.send(packet(Op::Request, 1000, 80));
        let response = self.expect(Op::Response);
        assert_eq!((response.src_port, response.dst_port), (80, 1000));
        listener.accept().unwrap().0
    }

    /// A host process that has asked for the guest's `port`; the ports of the request.
    fn dialled(&mut self, port: u32) -> (UnixStream, Header) {
        let mut client = UnixStream::connect(self.dir.join("v")).unwrap();
        client
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .unwrap();
        (client, self.expect(Op::Request))
    }

    fn malformed(&self) -> u64 {
        let counters = self.driver.function.counters();
        counters.queues[usize::from(TX)]
            .errors
            .load(Ordering::Relaxed)
    }

    fn streams(&self) -> u64 {
        self.backend.gauges.streams.load(Ordering::Relaxed)
    }

    fn wait_streams(&self, count: u64) {
        wait_for("the number of streams", || {
            (self.streams() == count).then_some(())
        });
    }
}

fn read_all(stream: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    all
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n % 251).to_le_bytes()[0]).collect()
}

#[test]
fn the_guest_connects_and_both_talk() {
    let mut guest = Guest::new(4);
    let mut host = guest.connected();
    guest.data(1000, 80, b"hello host");
    let mut heard = [0; 10];
    host.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"hello host");
    host.write_all(b"hello guest").unwrap();
    let (header, data) = guest.receive();
    assert_eq!((header.op, data), (Some(Op::Data), b"hello guest".to_vec()));
    assert_eq!(header.fwd_cnt, 10);
}

#[test]
fn the_host_connects_and_both_talk() {
    let mut guest = Guest::new(4);
    let (mut client, request) = guest.dialled(1024);
    assert_eq!(request.dst_port, 1024);
    let host_port = request.src_port;
    // Early data waits for the guest's answer.
    client.write_all(b"early").unwrap();
    guest.nothing_comes();
    guest.send(packet(Op::Response, 1024, host_port));
    let (header, data) = guest.receive();
    assert_eq!((header.op, data), (Some(Op::Data), b"early".to_vec()));
    guest.data(1024, host_port, b"reply");
    guest.send(Header {
        flags: NEITHER,
        ..packet(Op::Shutdown, 1024, host_port)
    });
    guest.expect(Op::Reset);
    let heard = String::from_utf8(read_all(&mut client)).unwrap();
    assert_eq!(heard, format!("OK {host_port}\nreply"));
    guest.wait_streams(0);
}

/// A read ends behind bytes that a descriptor came with: that it was short does not say that no more is there.
#[test]
fn bytes_behind_a_descriptor_arrive() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut guest = Guest::new(4);
    let (client, request) = guest.dialled(1024);
    let descriptors = [std::os::fd::AsFd::as_fd(&client)];
    let mut space = [std::mem::MaybeUninit::uninit(); 64];
    for bytes in [b"one ", b"two ", b"end."] {
        let mut with = SendAncillaryBuffer::new(&mut space);
        assert!(with.push(SendAncillaryMessage::ScmRights(&descriptors)));
        let bytes = [std::io::IoSlice::new(bytes)];
        sendmsg(&client, &bytes, &mut with, SendFlags::empty()).unwrap();
    }
    guest.send(packet(Op::Response, 1024, request.src_port));
    let mut all = Vec::new();
    while all.len() < 12 {
        let (header, data) = guest.receive();
        assert_eq!(header.op, Some(Op::Data));
        all.extend(data);
    }
    assert_eq!(all, b"one two end.");
    drop(client);
    guest.expect(Op::Shutdown);
}

#[test]
fn refusals_reach_both_sides() {
    let mut guest = Guest::new(4);
    guest.send(packet(Op::Request, 1000, 81));
    let reset = guest.expect(Op::Reset);
    assert_eq!((reset.src_port, reset.dst_port), (81, 1000));
    let (mut client, request) = guest.dialled(9);
    guest.send(packet(Op::Reset, 9, request.src_port));
    assert!(read_all(&mut client).is_empty());
    let mut rude = UnixStream::connect(guest.dir.join("v")).unwrap();
    rude.write_all(b"GET / HTTP/1.0\r\n").unwrap();
    let _ = rude.read(&mut [0; 8]);
    guest.nothing_comes();
    guest.wait_streams(0);
}

/// CVE-2019-18960: the header's length is more than the descriptors have.
#[test]
fn a_length_beyond_the_descriptors_is_dropped() {
    let mut guest = Guest::new(4);
    let mut host = guest.connected();
    for len in [5, 4096, u32::MAX, u32::MAX - 43] {
        let before = guest.malformed();
        let header = Header {
            len,
            ..packet(Op::Data, 1000, 80)
        };
        guest.send_with(header, b"four");
        assert_eq!(guest.malformed(), before + 1, "{len}");
    }
    // Less than there is: what the header says counts.
    let header = Header {
        len: 2,
        ..packet(Op::Data, 1000, 80)
    };
    guest.send_with(header, b"four");
    let mut heard = [0; 2];
    host.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"fo");
    guest.data(1000, 80, b"!");
    host.read_exact(&mut heard[..1]).unwrap();
    assert_eq!(heard[0], b'!');
}

#[test]
fn short_packets_and_other_addresses_are_dropped_or_reset() {
    let mut guest = Guest::new(4);
    let _host = guest.connected();
    let before = guest.malformed();
    let header = packet(Op::Data, 1000, 80).to_bytes();
    guest
        .driver
        .ram
        .write_slice(&header, GuestAddress(SENT))
        .unwrap();
    guest.driver.submit(TX, &[Desc::new(SENT, 43, 0, 0)]);
    guest.driver.used(TX);
    guest.send(Header {
        src_cid: 8,
        ..packet(Op::Request, 1, 80)
    });
    assert_eq!(guest.malformed(), before + 2);
    guest.nothing_comes();
    // Somebody else's address, another kind of socket, no known operation: reset.
    guest.send(Header {
        kind: 2,
        ..packet(Op::Request, 1, 80)
    });
    assert_eq!(guest.expect(Op::Reset).kind, 2);
    guest.send(Header {
        op: None,
        ..packet(Op::Data, 1, 80)
    });
    guest.expect(Op::Reset);
    // For no stream: reset, except a reset.
    guest.send(packet(Op::Data, 1, 80));
    guest.expect(Op::Reset);
    guest.send(packet(Op::Reset, 1, 80));
    guest.nothing_comes();
}

#[test]
fn another_hosts_address_is_reset_as_that_host_would() {
    let mut guest = Guest::new(4);
    guest.send(Header {
        dst_cid: 99,
        ..packet(Op::Request, 1, 80)
    });
    let (head, _) = guest.driver.used(RX);
    let mut wire = [0; Header::LEN];
    let at = BUFFERS + u64::from(head / 2) * 0x2000;
    guest
        .driver
        .ram
        .read_slice(&mut wire, GuestAddress(at))
        .unwrap();
    let reset = Header::from_bytes(&wire);
    assert_eq!((reset.src_cid, reset.op), (99, Some(Op::Reset)));
}

#[test]
fn a_violation_resets_the_stream_and_only_it() {
    let mut guest = Guest::new(4);
    let mut host = guest.connected();
    let (_client, request) = guest.dialled(5);
    guest.send(packet(Op::Request, 1000, 80));
    guest.expect(Op::Reset);
    assert!(read_all(&mut host).is_empty());
    guest.send(packet(Op::Response, 5, request.src_port));
    guest.wait_streams(1);
}

#[test]
fn the_host_closes_and_every_byte_arrives_before_the_end() {
    let mut guest = Guest::new(4);
    let mut host = guest.connected();
    let all = pattern(60_000);
    host.write_all(&all).unwrap();
    drop(host);
    let mut heard = Vec::new();
    let mut flags = 0;
    while flags & NO_SEND == 0 {
        let (header, data) = guest.receive();
        match header.op {
            Some(Op::Data) => heard.extend(data),
            Some(Op::Shutdown) => flags |= header.flags,
            other => panic!("{other:?}"),
        }
    }
    assert!(heard == all);
    guest.send(packet(Op::Reset, 1000, 80));
    guest.wait_streams(0);
}

#[test]
fn half_close_goes_both_ways() {
    let mut guest = Guest::new(4);
    let mut host = guest.connected();
    guest.data(1000, 80, b"question");
    guest.send(Header {
        flags: NO_SEND,
        ..packet(Op::Shutdown, 1000, 80)
    });
    assert_eq!(read_all(&mut host), b"question");
    host.write_all(b"answer").unwrap();
    let (_, data) = guest.receive();
    assert_eq!(data, b"answer");
    host.shutdown(std::net::Shutdown::Write).unwrap();
    let end = guest.expect(Op::Shutdown);
    assert_eq!(end.flags & NO_SEND, NO_SEND);
    drop(host);
    while guest.streams() > 0 {
        // The rest of the farewell.
        guest.send(packet(Op::Reset, 1000, 80));
    }
}

#[test]
fn a_guest_that_takes_no_more_is_passed_on() {
    let mut guest = Guest::new(4);
    let mut host = guest.connected();
    guest.send(Header {
        flags: NO_RECEIVE,
        ..packet(Op::Shutdown, 1000, 80)
    });
    wait_for("a broken pipe", || {
        host.write_all(b"x").is_err().then_some(())
    });
    guest.data(1000, 80, b"still");
    let mut heard = [0; 5];
    host.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"still");
}

/// A reader that does not read: the device keeps what it granted and no more, and loses nothing.
#[test]
fn a_slow_reader_holds_the_guest_by_credit() {
    let mut guest = Guest::new(4);
    let mut host = guest.connected();
    let piece = pattern(16 * 1024);
    let mut forwarded = 0_u32;
    let mut sent = 0_u32;
    let len = u32::try_from(piece.len()).unwrap();
    while sent - forwarded + len <= stream::BUFFER {
        guest.data(1000, 80, &piece);
        sent += len;
        while guest.driver.progress(RX).0 != guest.driver.progress(RX).1 {
            forwarded = guest.expect(Op::CreditUpdate).fwd_cnt;
        }
    }
    assert!(sent >= stream::BUFFER);
    guest.send(Header {
        flags: NEITHER,
        ..packet(Op::Shutdown, 1000, 80)
    });
    let heard = read_all(&mut host);
    assert_eq!(heard.len(), usize::try_from(sent).unwrap());
    assert!(heard.chunks(piece.len()).all(|chunk| chunk == piece));
    guest.expect(Op::Reset);
    guest.wait_streams(0);
}

#[test]
fn more_than_the_credit_ends_the_stream() {
    let mut guest = Guest::new(4);
    let host = guest.connected();
    let piece = pattern(32 * 1024);
    let reset = loop {
        // Without regard to credit.
        guest.data(1000, 80, &piece);
        if guest.driver.progress(RX).0 != guest.driver.progress(RX).1 {
            let (header, _) = guest.receive();
            if header.op == Some(Op::Reset) {
                break header;
            }
        }
    };
    assert_eq!(reset.dst_port, 1000);
    drop(host);
    guest.wait_streams(0);
}

#[test]
fn credit_of_the_guests_is_kept() {
    let mut guest = Guest::new(4);
    let mut host = guest.connected();
    let all = pattern(100 * 1024);
    let sending = all.clone();
    let sender = thread::spawn(move || {
        host.write_all(&sending).unwrap();
        host
    });
    let mut heard = Vec::new();
    while heard.len() < 64 * 1024 {
        heard.extend(guest.receive().1);
    }
    assert_eq!(heard.len(), 64 * 1024);
    guest.expect(Op::CreditRequest);
    guest.nothing_comes();
    while heard.len() < all.len() {
        guest.send(Header {
            fwd_cnt: u32::try_from(heard.len()).unwrap(),
            ..packet(Op::CreditUpdate, 1000, 80)
        });
        let (_, data) = guest.receive();
        heard.extend(data);
    }
    assert!(heard == all);
    drop(sender.join().unwrap());
}

#[test]
fn beyond_the_maximum_the_guest_is_refused_and_the_host_waits() {
    let mut guest = Guest::new(2);
    let listener = guest.listen(80);
    for port in [1, 2] {
        guest.send(packet(Op::Request, port, 80));
        guest.expect(Op::Response);
    }
    guest.send(packet(Op::Request, 3, 80));
    guest.expect(Op::Reset);
    let mut client = UnixStream::connect(guest.dir.join("v")).unwrap();
    client.write_all(b"CONNECT 5\n").unwrap();
    guest.nothing_comes();
    guest.send(packet(Op::Reset, 1, 80));
    guest.expect(Op::Request);
    drop(listener);
}

#[test]
fn a_pause_leaves_streams_and_a_reset_ends_them() {
    let mut guest = Guest::new(4);
    let mut host = guest.connected();
    guest.driver.function.pause();
    host.write_all(b"while paused").unwrap();
    guest.nothing_comes();
    guest.driver.function.resume();
    let (_, data) = guest.receive();
    assert_eq!(data, b"while paused");
    guest.data(1000, 80, b"last words");
    guest.driver.set_status(0);
    assert_eq!(read_all(&mut host), b"last words");
    guest.wait_streams(0);
    guest.start();
    guest.data(1000, 80, b"who?");
    guest.expect(Op::Reset);
}

#[test]
fn what_a_guest_sent_is_delivered_after_its_reset() {
    let mut guest = Guest::new(4);
    let mut host = guest.connected();
    let piece = pattern(64 * 1024);
    for _ in 0..4 {
        guest.data(1000, 80, &piece);
        if guest.driver.progress(RX).0 != guest.driver.progress(RX).1 {
            guest.expect(Op::CreditUpdate);
        }
    }
    guest.driver.set_status(0);
    let reader = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        read_all(&mut host).len()
    });
    assert_eq!(guest.backend.drain(Duration::from_secs(5)), 0);
    assert_eq!(reader.join().unwrap(), 4 * piece.len());
}

#[test]
fn many_answers_wait_for_room_and_are_bounded() {
    let dir = folder();
    let mut driver = Driver::new(|io| Box::new(Vsock::new(CID, backend(&dir, 4, io))));
    driver.start_full();
    let areas = crate::driver::Areas::of(TX, 16);
    let wire = packet(Op::Data, 1, 2).to_bytes();
    driver.ram.write_slice(&wire, GuestAddress(SENT)).unwrap();
    write_desc(&driver.ram, areas.desc, 0, Desc::new(SENT, 44, 0, 0));
    for _ in 0..256 {
        driver.offer_one(TX, 0);
        driver.used(TX);
    }
    driver.offer_one(TX, 0);
    thread::sleep(Duration::from_millis(20));
    assert_eq!(driver.progress(TX).0, 256, "answers pile up");
    let rx = crate::driver::Areas::of(RX, 16);
    for _ in 0..300_u16 {
        write_desc(&driver.ram, rx.desc, 0, Desc::new(BUFFERS, 64, WRITE, 0));
        if driver.progress(RX).1 == 257 {
            break;
        }
        driver.offer_one(RX, 0);
        driver.used(RX);
    }
    driver.used(TX);
    std::fs::remove_dir_all(dir).unwrap();
}
