use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use event_manager::{EventOps, Events, MutEventSubscriber};
use testudo_bus::Access;
use testudo_pci::PciFunction;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::Limits;
use crate::conformance::{Subject, conformance};
use crate::driver::{Areas, BUFFERS, Desc, Driver, NEXT, WRITE, offer, wait_for, write_desc};
use crate::limit::RateLimit;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const HEADER: usize = wire::HEADER;

/// A port of so many pairs and the other ends of its wires.
fn port_with(pairs: usize, change: impl FnOnce(&mut PortSettings)) -> (NetPort, Vec<UnixDatagram>) {
    let (wires, ends) = (0..pairs)
        .map(|_| {
            let (here, there) = UnixDatagram::pair().unwrap();
            (Wire::datagrams(OwnedFd::from(here)).unwrap(), there)
        })
        .unzip();
    let mut settings = PortSettings {
        id: "net0".to_owned(),
        wires,
        vhost: Vec::new(),
        mac: MAC,
        mtu: None,
        offloads: true,
        rx: Limits::default(),
        tx: Limits::default(),
    };
    change(&mut settings);
    (NetPort::new(settings).unwrap(), ends)
}

fn port(pairs: usize) -> (NetPort, Vec<UnixDatagram>) {
    port_with(pairs, |_| {})
}

fn driver_of(port: &NetPort) -> Driver {
    Driver::new(|io| Box::new(Net::new(port, vec![io.clone()])))
}

/// A header and a frame of `len` bytes that count from `first`.
fn frame(first: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; HEADER];
    bytes.extend((0..len).map(|n| first.wrapping_add(u8::try_from(n % 251).unwrap())));
    bytes
}

/// A model whose wire takes everything.
fn taken(io: &IoHandle) -> Box<dyn VirtioModel> {
    let (port, mut ends) = port(1);
    let end = ends.remove(0);
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while end.recv(&mut buffer).is_ok_and(|n| n != 0) {}
    });
    Box::new(Net::new(&port, vec![io.clone()]))
}

/// A model whose wire always has a frame.
fn given(io: &IoHandle) -> Box<dyn VirtioModel> {
    let (port, mut ends) = port(1);
    let end = ends.remove(0);
    let model = Net::new(&port, vec![io.clone()]);
    thread::spawn(move || while end.send(&frame(0, 50)).is_ok() {});
    Box::new(model)
}

const TRANSMIT: Subject = Subject {
    make: taken,
    queue: 1,
    request: || (frame(0, 52), 0),
};
const RECEIVE: Subject = Subject {
    make: given,
    queue: 0,
    request: || (Vec::new(), 64),
};
const COMMAND: Subject = Subject {
    make: taken,
    queue: 2,
    request: || (vec![0, 0, 1], 1),
};

conformance!(transmit_conforms, TRANSMIT);
conformance!(receive_conforms, RECEIVE);
conformance!(command_conforms, COMMAND);

/// Buffers of these sizes, each a chain of its own, in the receive queue.
fn offer_buffers(driver: &mut Driver, sizes: &[u32]) -> Vec<u64> {
    let areas = Areas::of(0, 16);
    let mut at = BUFFERS;
    let mut places = Vec::new();
    for (head, size) in (0..).zip(sizes) {
        write_desc(
            &driver.ram,
            areas.desc,
            head,
            Desc::new(at, *size, WRITE, 0),
        );
        offer(&driver.ram, &areas, head);
        places.push(at);
        at += u64::from(*size);
    }
    driver.kick(0);
    places
}

fn bytes_at(driver: &Driver, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    driver.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

fn send_frame(driver: &mut Driver, bytes: &[u8]) {
    let head = driver.progress(1).0 % 16;
    let at = BUFFERS + 0x4_0000 + u64::from(head) * 0x1000;
    driver.ram.write_slice(bytes, GuestAddress(at)).unwrap();
    let len = u32::try_from(bytes.len()).unwrap();
    let areas = Areas::of(1, 16);
    write_desc(&driver.ram, areas.desc, head, Desc::new(at, len, 0, 0));
    offer(&driver.ram, &areas, head);
    driver.kick(1);
}

fn without(driver: &mut Driver, feature: u32) -> u64 {
    driver.offered() & !bit(feature)
}

#[test]
fn a_frame_spans_mergeable_buffers() {
    let (port, ends) = port(1);
    let mut driver = driver_of(&port);
    driver.start_full();
    let places = offer_buffers(&mut driver, &[100, 50, 200, 3000]);
    let sent = frame(3, 188);
    ends[0].send(&sent).unwrap();
    let used: Vec<_> = (0..3).map(|_| driver.used(0)).collect();
    assert_eq!(used, [(0, 100), (1, 50), (2, 50)]);
    let mut got = bytes_at(&driver, places[0], 200);
    assert_eq!(got[10..12], [3, 0], "num_buffers");
    got[10] = 0;
    assert_eq!(got, sent);
    driver.interrupt(1);
}

/// A frame larger than what is ready waits for buffers, and the ones behind it with it.
#[test]
fn a_frame_waits_for_buffers() {
    let (port, ends) = port(1);
    let mut driver = driver_of(&port);
    driver.start_full();
    offer_buffers(&mut driver, &[64]);
    let (long, short) = (frame(9, 400), frame(1, 20));
    ends[0].send(&long).unwrap();
    ends[0].send(&short).unwrap();
    let spilled = &port.0.spilled;
    wait_for("a spill", || {
        (spilled.load(Ordering::Relaxed) == 1).then_some(())
    });
    assert_eq!(driver.progress(0), (0, 0));
    let areas = Areas::of(0, 16);
    for (head, size) in [(1, 300), (2, 80), (3, 64)] {
        let at = BUFFERS + 0x1000 * u64::from(head);
        write_desc(&driver.ram, areas.desc, head, Desc::new(at, size, WRITE, 0));
        driver.offer_one(0, head);
    }
    let used: Vec<_> = (0..4).map(|_| driver.used(0)).collect();
    assert_eq!(used, [(0, 64), (1, 300), (2, 48), (3, 32)]);
    let mut got = bytes_at(&driver, BUFFERS, 64);
    got.extend(bytes_at(&driver, BUFFERS + 0x1000, 300));
    got.extend(bytes_at(&driver, BUFFERS + 0x2000, 48));
    got[10] = 0;
    assert!(got == long);
    assert_eq!(port.0.dropped.load(Ordering::Relaxed), 0);
}

/// CVE-2020-16843: Firecracker's receive path froze for good once the driver's queue had been full.
/// Here the queue is full of buffers too small for a frame, then empty, again and again.
#[test]
fn cve_2020_16843_receiving_goes_on_after_a_full_queue() {
    let (port, ends) = port(1);
    let mut driver = driver_of(&port);
    for round in 0..3 {
        driver.start_full();
        // All descriptors there are, and no frame of this size fits: it is dropped.
        offer_buffers(&mut driver, &[16; 16]);
        ends[0].send(&frame(1, 1000)).unwrap();
        let dropped = &port.0.dropped;
        wait_for("a drop", || {
            (dropped.load(Ordering::Relaxed) == round + 1).then_some(())
        });
        ends[0].send(&frame(2, 100)).unwrap();
        for n in 0..7 {
            assert_eq!(driver.used(0), (n, 16));
        }
        // More frames than buffers: those that find none wait in the wire.
        for n in 0..8 {
            ends[0].send(&frame(n, 4)).unwrap();
        }
        for n in 7..15 {
            assert_eq!(driver.used(0), (n, 16));
        }
        for n in 0..3 {
            ends[0].send(&frame(n, 4)).unwrap();
        }
        assert_eq!(driver.used(0), (15, 16));
        for head in [0, 1] {
            driver.offer_one(0, head);
            assert_eq!(driver.used(0), (u32::from(head), 16));
        }
        driver.set_status(0);
    }
}

/// CVE-2021-3748 and CVE-2022-26353: QEMU kept elements that it had given back, and lost some when a
/// frame failed half way. Chains of a frame that meets malformed ones come back once each.
#[test]
fn cve_2021_3748_chains_come_back_once_whatever_the_frame_meets() {
    let (port, ends) = port(1);
    let mut driver = driver_of(&port);
    driver.start_full();
    let areas = Areas::of(0, 16);
    for (head, desc) in [
        (0, Desc::new(BUFFERS, 20, WRITE, 0)),
        // No room for a header, out of memory, a loop, nothing to write.
        (1, Desc::new(BUFFERS + 0x100, 11, WRITE, 0)),
        (2, Desc::new(u64::MAX - 5, 100, WRITE, 0)),
        (3, Desc::new(BUFFERS + 0x200, 100, WRITE | NEXT, 3)),
        (4, Desc::new(BUFFERS + 0x300, 100, 0, 0)),
        (5, Desc::new(BUFFERS + 0x400, 20, WRITE, 0)),
        (6, Desc::new(BUFFERS + 0x500, 100, WRITE, 0)),
    ] {
        write_desc(&driver.ram, areas.desc, head, desc);
        offer(&driver.ram, &areas, head);
    }
    ends[0].send(&frame(5, 60)).unwrap();
    driver.kick(0);
    let mut used: Vec<_> = (0..7).map(|_| driver.used(0)).collect();
    used.sort_unstable();
    let expected = [(0, 20), (1, 0), (2, 0), (3, 0), (4, 0), (5, 20), (6, 32)];
    assert_eq!(used, expected);
    thread::sleep(Duration::from_millis(5));
    assert_eq!(driver.progress(0), (7, 7), "nothing comes back twice");
    assert_eq!(driver.status(), 0x0f);
}

#[test]
fn without_mergeable_buffers_a_frame_has_one_chain_or_is_dropped() {
    let (port, ends) = port(1);
    let mut driver = driver_of(&port);
    let accepted = without(&mut driver, bits::VIRTIO_NET_F_MRG_RXBUF);
    driver.start(accepted);
    let places = offer_buffers(&mut driver, &[60, 2000]);
    ends[0].send(&frame(1, 1000)).unwrap();
    let dropped = &port.0.dropped;
    wait_for("a drop", || {
        (dropped.load(Ordering::Relaxed) == 1).then_some(())
    });
    ends[0].send(&frame(2, 48)).unwrap();
    ends[0].send(&frame(3, 1000)).unwrap();
    assert_eq!(driver.used(0), (0, 60));
    assert_eq!(driver.used(0), (1, 1012));
    let header = bytes_at(&driver, places[1], HEADER);
    assert_eq!(header[10..], [1, 0], "num_buffers");
}

#[test]
fn frames_of_several_pieces_go_out_whole_and_bad_ones_do_not() {
    let (port, ends) = port(1);
    let mut driver = driver_of(&port);
    driver.start_full();
    let sent = frame(7, 100);
    driver
        .ram
        .write_slice(&sent, GuestAddress(BUFFERS))
        .unwrap();
    let descs = [
        Desc::new(BUFFERS, 5, NEXT, 1),
        Desc::new(BUFFERS + 5, 17, NEXT, 2),
        Desc::new(BUFFERS + 22, 90, 0, 0),
    ];
    driver.submit(1, &descs);
    assert_eq!(driver.used(1), (0, 0));
    let mut got = [0; 300];
    assert_eq!(ends[0].recv(&mut got).unwrap(), 112);
    assert!(got[..112] == sent);
    // Shorter than header and link header: answered, counted, not sent.
    for len in [1, 11, 12, 25] {
        driver.submit(1, &[Desc::new(BUFFERS, len, 0, 0)]);
        assert_eq!(driver.used(1), (0, 0));
    }
    driver.submit(1, &[Desc::new(BUFFERS, 26, 0, 0)]);
    assert_eq!(ends[0].recv(&mut got).unwrap(), 26);
    let counters = driver.function.counters();
    assert_eq!(counters.queues[1].errors.load(Ordering::Relaxed), 4);
}

/// A wire that takes nothing more makes frames wait in their queue; none is lost, none comes twice,
/// and a pause in between changes nothing.
#[test]
fn a_full_wire_loses_nothing() {
    let (port, ends) = port(1);
    let mut driver = driver_of(&port);
    driver.start_full();
    let areas = Areas::of(1, 16);
    let stalls = driver.function.counters();
    let stalls = || stalls.queues[1].stalls.load(Ordering::Relaxed);
    let (mut sent, mut answered, mut got) = (0_u16, 0_u16, 0_u16);
    let mut buffer = [0; 4096];
    while got < 2000 {
        while sent < 2000 && sent - answered < 16 {
            let head = sent % 16;
            let at = BUFFERS + u64::from(head) * 0x800;
            let mut bytes = frame(0, 1500);
            bytes[HEADER..HEADER + 2].copy_from_slice(&sent.to_le_bytes());
            driver.ram.write_slice(&bytes, GuestAddress(at)).unwrap();
            write_desc(&driver.ram, areas.desc, head, Desc::new(at, 1512, 0, 0));
            driver.offer_one(1, head);
            sent += 1;
        }
        if stalls() == 0 {
            // Until the wire is full nobody takes anything.
            answered = driver.progress(1).0;
            assert!(sent < 2000, "the wire never fills");
            continue;
        }
        if got == 3 {
            driver.function.pause();
            driver.function.resume();
        }
        assert_eq!(ends[0].recv(&mut buffer).unwrap(), 1512);
        assert_eq!(buffer[HEADER..HEADER + 2], got.to_le_bytes());
        got += 1;
        answered = driver.progress(1).0;
    }
    wait_for("the last answer", || {
        (driver.progress(1).0 == 2000).then_some(())
    });
}

#[test]
fn limits_hold_and_are_lifted() {
    let limits = |per_second| Limits {
        bytes: None,
        ops: RateLimit::new(per_second, 2),
    };
    let (port, ends) = port_with(1, |settings| settings.tx = limits(40));
    let mut driver = driver_of(&port);
    driver.start_full();
    let start = Instant::now();
    for n in 0..6 {
        send_frame(&mut driver, &frame(n, 60));
        driver.used(1);
    }
    let took = start.elapsed();
    assert!(took > Duration::from_millis(90), "{took:?}");
    // One that waits for an hour goes at once when the limit is lifted.
    port.set_limits(
        Way::Tx,
        Limits {
            bytes: RateLimit::new(1, 60),
            ops: None,
        },
    );
    send_frame(&mut driver, &frame(0, 3600));
    driver.used(1);
    send_frame(&mut driver, &frame(0, 60));
    thread::sleep(Duration::from_millis(10));
    assert_eq!(driver.progress(1), (7, 7));
    port.set_limits(Way::Tx, Limits::default());
    driver.used(1);
    // The other way.
    port.set_limits(Way::Rx, limits(1));
    offer_buffers(&mut driver, &[100; 8]);
    for n in 0..3 {
        ends[0].send(&frame(n, 60)).unwrap();
    }
    driver.used(0);
    driver.used(0);
    thread::sleep(Duration::from_millis(10));
    assert_eq!(driver.progress(0), (2, 2));
    port.set_limits(Way::Rx, Limits::default());
    driver.used(0);
}

fn status(driver: &mut Driver) -> u8 {
    let mut status = [0];
    let at = Access { offset: 0x2006 };
    driver
        .function
        .bar_read(crate::VirtioPci::BAR, at, &mut status);
    status[0]
}

#[test]
fn a_pulled_cable_drops_frames_and_the_driver_is_told() {
    let (port, ends) = port(1);
    let mut driver = driver_of(&port);
    driver.start_full();
    assert_eq!(status(&mut driver), 1);
    let _ = port.set_link(false);
    let _ = port.set_link(false);
    driver.interrupt(0);
    assert_eq!(status(&mut driver), 0);
    offer_buffers(&mut driver, &[100; 2]);
    ends[0].send(&frame(1, 60)).unwrap();
    let dropped = &port.0.dropped;
    wait_for("a drop", || {
        (dropped.load(Ordering::Relaxed) == 1).then_some(())
    });
    send_frame(&mut driver, &frame(1, 60));
    driver.used(1);
    ends[0].set_nonblocking(true).unwrap();
    assert!(ends[0].recv(&mut [0; 100]).is_err());
    let _ = port.set_link(true);
    driver.interrupt(0);
    assert_eq!(status(&mut driver), 1);
    ends[0].send(&frame(2, 60)).unwrap();
    assert_eq!(driver.used(0), (0, 72));
}

/// Runs a command; returns its answer.
fn command(driver: &mut Driver, queue: u16, bytes: &[u8]) -> u8 {
    let at = BUFFERS + 0x3_0000;
    driver.ram.write_slice(bytes, GuestAddress(at)).unwrap();
    driver
        .ram
        .write_obj(9_u8, GuestAddress(at + 0x800))
        .unwrap();
    let len = u32::try_from(bytes.len()).unwrap();
    driver.submit(
        queue,
        &[
            Desc::new(at, len, NEXT, 1),
            Desc::new(at + 0x800, 1, WRITE, 0),
        ],
    );
    assert_eq!(driver.used(queue), (0, 1));
    driver.ram.read_obj(GuestAddress(at + 0x800)).unwrap()
}

#[test]
fn commands_are_done_or_refused() {
    // The features of a tap; a datagram socket has none of its own.
    let (port, _ends) = port(2);
    let mut driver = driver_of(&port);
    driver.start_full();
    let offloads = |bits: u64| [&[5, 0], &bits.to_le_bytes()[..]].concat();
    for (bytes, done) in [
        (&[0, 0, 1][..], true),
        (&[0, 1, 0], true),
        (&[0, 5, 0], true),
        (&[0, 6, 0], false),
        (&[0, 0], false),
        (&[0, 0, 1, 1], false),
        (&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0], true),
        (&[1, 0, 0, 0, 0, 0], false),
        (&[1, 1, 2, 0, 0, 0, 0, 9], true),
        (&[1, 1, 2, 0, 0, 0, 0], false),
        (&[1, 1, 2, 0, 0, 0, 0, 9, 9], false),
        (&[2, 0, 1, 0], false),
        (&[3, 0], false),
        (&[4, 0, 2, 0], true),
        (&[4, 0, 1, 0], true),
        (&[4, 0, 0, 0], false),
        (&[4, 0, 3, 0], false),
        (&[4, 0, 0, 128], false),
        (&[4, 0, 1], false),
        (&offloads(0), false),
        (&[77, 77], false),
        (&[0], false),
    ] {
        let ack = command(&mut driver, 4, bytes);
        assert_eq!(ack, u8::from(!done), "{bytes:?}");
    }
    assert_eq!(port.0.mac(), [2, 0, 0, 0, 0, 9]);
    // Nobody is told of a command without room for an answer.
    driver.submit(4, &[Desc::new(BUFFERS, 3, 0, 0)]);
    assert_eq!(driver.used(4), (0, 0));
    driver.start_full();
    assert_eq!(port.0.mac(), MAC, "a new driver finds the old address");
}

#[test]
fn the_host_delivers_to_the_pairs_in_use() {
    let (port, ends) = port(2);
    let mut driver = driver_of(&port);
    driver.start_full();
    let areas = Areas::of(2, 16);
    write_desc(
        &driver.ram,
        areas.desc,
        0,
        Desc::new(BUFFERS, 100, WRITE, 0),
    );
    ends[1].send(&frame(1, 60)).unwrap();
    driver.offer_one(2, 0);
    thread::sleep(Duration::from_millis(10));
    assert_eq!(driver.progress(2), (0, 0));
    assert_eq!(command(&mut driver, 4, &[4, 0, 2, 0]), 0);
    assert_eq!(driver.used(2), (0, 72));
    driver.offer_one(2, 0);
    ends[1].send(&frame(1, 50)).unwrap();
    assert_eq!(driver.used(2), (0, 62));
    assert_eq!(command(&mut driver, 4, &[4, 0, 1, 0]), 0);
    driver.offer_one(2, 0);
    ends[1].send(&frame(1, 50)).unwrap();
    thread::sleep(Duration::from_millis(10));
    assert_eq!(driver.progress(2), (2, 2));
}

/// Without MQ the control queue is queue 2 whatever else the device has (§5.1.2).
#[test]
fn a_driver_of_one_pair_finds_its_control_queue() {
    let (port, ends) = port(2);
    let mut driver = driver_of(&port);
    let accepted = without(&mut driver, bits::VIRTIO_NET_F_MQ);
    driver.start(accepted);
    assert_eq!(command(&mut driver, 2, &[0, 0, 1]), 0);
    assert_eq!(command(&mut driver, 2, &[4, 0, 2, 0]), 1);
    let accepted = without(&mut driver, bits::VIRTIO_NET_F_CTRL_VQ);
    driver.start(accepted);
    send_frame(&mut driver, &frame(0, 60));
    driver.used(1);
    assert_eq!(ends[0].recv(&mut [0; 100]).unwrap(), 72);
}

/// Buffers in stock go back at a pause, in order, and frames go on afterwards.
#[test]
fn a_pause_keeps_the_stock_in_order() {
    let (port, ends) = port(1);
    let mut driver = driver_of(&port);
    driver.start_full();
    offer_buffers(&mut driver, &[100; 16]);
    for n in 0_u16..12 {
        ends[0].send(&frame(0, usize::from(n) + 20)).unwrap();
        if n % 3 == 0 {
            driver.function.pause();
            driver.function.resume();
        }
        assert_eq!(driver.used(0), (u32::from(n), u32::from(n) + 32));
    }
}

#[test]
fn a_peer_that_is_gone_does_not_make_the_thread_spin() {
    let (port, ends) = port(1);
    let mut driver = driver_of(&port);
    driver.start_full();
    offer_buffers(&mut driver, &[100; 4]);
    ends[0].send(&frame(1, 60)).unwrap();
    assert_eq!(driver.used(0), (0, 72));
    drop(ends);
    thread::sleep(Duration::from_millis(10));
    let probe = driver.io.handle().attach(Probe).unwrap();
    let before = probe.with(|_| cpu_time()).unwrap();
    thread::sleep(Duration::from_millis(50));
    let spent = probe.with(|_| cpu_time()).unwrap() - before;
    assert!(spent < Duration::from_millis(5), "{spent:?}");
    send_frame(&mut driver, &frame(1, 60));
    driver.used(1);
}

/// Asks the thread it is attached to.
struct Probe;

impl MutEventSubscriber for Probe {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {}
    fn init(&mut self, _ops: &mut EventOps<'_>) {}
}

/// What this thread has used.
fn cpu_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(
        u64::try_from(now.tv_sec).unwrap(),
        u32::try_from(now.tv_nsec).unwrap(),
    )
}

#[test]
fn features_follow_the_settings() {
    let offered = |port: &NetPort| Net::new(port, Vec::new()).shape().features;
    let (plain, _ends) = port(1);
    let features = offered(&plain);
    assert_eq!(features & bit(bits::VIRTIO_NET_F_MQ), 0);
    assert_eq!(features & bit(bits::VIRTIO_NET_F_MTU), 0);
    assert_eq!(features & bit(bits::VIRTIO_NET_F_CSUM), 0);
    let (more, _ends) = port_with(3, |settings| settings.mtu = Some(9000));
    let features = offered(&more);
    assert_ne!(features & bit(bits::VIRTIO_NET_F_MQ), 0);
    assert_ne!(features & bit(bits::VIRTIO_NET_F_MTU), 0);
    let mut config = [0; 12];
    Net::new(&more, Vec::new()).read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 7, 1, 0, 3, 0, 0x28, 0x23]);
}

mod over_stream;
