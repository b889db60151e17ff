//! A device whose wire is a stream.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::*;

fn port() -> (NetPort, UnixStream) {
    let (here, there) = UnixStream::pair().unwrap();
    let (port, _) = port_with(1, |settings| {
        settings.wires = vec![Wire::stream(here.into()).unwrap()];
    });
    (port, there)
}

/// A frame as it is on the stream.
fn framed(first: u8, len: usize) -> Vec<u8> {
    let mut bytes = u32::try_from(len).unwrap().to_be_bytes().to_vec();
    bytes.extend_from_slice(&frame(first, len)[HEADER..]);
    bytes
}

fn taken(io: &IoHandle) -> Box<dyn VirtioModel> {
    let (port, mut end) = port();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while end.read(&mut buffer).is_ok_and(|n| n != 0) {}
    });
    Box::new(Net::new(&port, vec![io.clone()]))
}

fn given(io: &IoHandle) -> Box<dyn VirtioModel> {
    let (port, mut end) = port();
    let model = Net::new(&port, vec![io.clone()]);
    thread::spawn(move || while end.write_all(&framed(0, 50)).is_ok() {});
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

conformance!(transmit_conforms, TRANSMIT);
conformance!(receive_conforms, RECEIVE);

#[test]
fn frames_go_both_ways_without_a_header() {
    let (port, mut end) = port();
    let mut driver = driver_of(&port);
    driver.start_full();
    assert_eq!(driver.offered() & bit(bits::VIRTIO_NET_F_CSUM), 0);
    let places = offer_buffers(&mut driver, &[100, 50, 200, 3000]);
    // In pieces, two at once, one too short to be a frame, one that spans buffers.
    let mut bytes = framed(1, 60);
    bytes.extend(framed(2, 13));
    bytes.extend(framed(3, 188));
    let (head, tail) = bytes.split_at(30);
    end.write_all(head).unwrap();
    thread::sleep(Duration::from_millis(5));
    assert_eq!(driver.progress(0), (0, 0));
    end.write_all(tail).unwrap();
    assert_eq!(driver.used(0), (0, 72));
    assert_eq!([driver.used(0), driver.used(0)], [(1, 50), (2, 150)]);
    let mut expected = frame(1, 60);
    expected[10] = 1;
    assert_eq!(bytes_at(&driver, places[0], 72), expected);
    let mut got = bytes_at(&driver, places[1], 200);
    assert_eq!(got[10..12], [2, 0], "num_buffers");
    got[10] = 0;
    assert_eq!(got, frame(3, 188));
    assert_eq!(port.0.dropped.load(Ordering::Relaxed), 1);
    send_frame(&mut driver, &frame(7, 1400));
    driver.used(1);
    let mut sent = vec![0; 1404];
    end.read_exact(&mut sent).unwrap();
    assert_eq!(sent, framed(7, 1400));
    for len in [0, 13] {
        send_frame(&mut driver, &frame(0, len));
        driver.used(1);
    }
    let counters = driver.function.counters();
    assert_eq!(counters.queues[1].errors.load(Ordering::Relaxed), 2);
}

/// A frame waits in the stream, and across a pause, until the guest has room for it.
#[test]
fn a_frame_waits_for_buffers_and_across_a_pause() {
    let (port, mut end) = port();
    let mut driver = driver_of(&port);
    driver.start_full();
    offer_buffers(&mut driver, &[64]);
    end.write_all(&[framed(9, 400), framed(1, 20)].concat())
        .unwrap();
    let spilled = &port.0.spilled;
    wait_for("a frame that waits", || {
        (spilled.load(Ordering::Relaxed) == 1).then_some(())
    });
    driver.function.pause();
    driver.function.resume();
    let areas = Areas::of(0, 16);
    for (head, size) in [(1, 400), (2, 64)] {
        let at = BUFFERS + 0x1000 * u64::from(head);
        write_desc(&driver.ram, areas.desc, head, Desc::new(at, size, WRITE, 0));
        driver.offer_one(0, head);
    }
    let used: Vec<_> = (0..3).map(|_| driver.used(0)).collect();
    assert_eq!(used, [(0, 64), (1, 348), (2, 32)]);
    let mut got = bytes_at(&driver, BUFFERS, 64);
    got.extend(bytes_at(&driver, BUFFERS + 0x1000, 348));
    got[10] = 0;
    assert!(got == frame(9, 400));
    assert_eq!(port.0.dropped.load(Ordering::Relaxed), 0);
}

/// A peer that takes nothing makes frames wait in their queue, and one in part in the wire; a reset in
/// the middle of it leaves the peer with whole frames.
#[test]
fn a_peer_that_takes_nothing_loses_no_frame() {
    let (port, mut end) = port();
    let mut driver = driver_of(&port);
    driver.start_full();
    let mut sent = 0_u32;
    let stalled = |driver: &Driver| {
        let counters = driver.function.counters();
        counters.queues[1].stalls.load(Ordering::Relaxed) != 0
    };
    while !stalled(&driver) {
        send_frame(&mut driver, &frame(0, 3500));
        sent += 1;
        let all = u16::try_from(sent).unwrap();
        wait_for("an answer or a stall", || {
            (driver.progress(1).0 == all || stalled(&driver)).then_some(())
        });
    }
    let answered = u32::from(driver.progress(1).0);
    assert!(sent - answered <= 1, "{sent} {answered}");
    driver.set_status(0);
    driver.start_full();
    // What nobody answered is the old driver's; frames of the new one follow whole ones.
    end.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    for _ in 0..answered {
        let mut bytes = vec![0; 3504];
        end.read_exact(&mut bytes).unwrap();
        assert!(bytes == framed(0, 3500));
    }
    send_frame(&mut driver, &frame(5, 100));
    driver.used(1);
    let mut bytes = vec![0; 104];
    end.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, framed(5, 100));
}

#[test]
fn a_peer_that_dies_takes_the_link_down_for_good() {
    // It goes, or it talks nonsense; the guest sends, or only listens.
    for (nonsense, sends) in [(false, false), (true, false), (false, true)] {
        let (port, mut end) = port();
        let mut driver = driver_of(&port);
        driver.start_full();
        offer_buffers(&mut driver, &[100; 4]);
        end.write_all(&framed(1, 60)).unwrap();
        assert_eq!(driver.used(0), (0, 72));
        end.write_all(&framed(1, 60)).unwrap();
        if nonsense {
            end.write_all(b"HTTP/1.1 400 Bad Request").unwrap();
        }
        let kept = nonsense.then_some(end);
        assert_eq!(driver.used(0), (1, 72), "what it said before counts");
        if sends {
            send_frame(&mut driver, &frame(1, 60));
            driver.used(1);
        }
        wait_for("the link to go down", || {
            (status(&mut driver) == 0).then_some(())
        });
        driver.interrupt(0);
        assert_eq!(port.0.peers_lost.load(Ordering::Relaxed), 1);
        assert!(!port.set_link(true));
        assert!(port.set_link(false));
        send_frame(&mut driver, &frame(1, 60));
        driver.used(1);
        // The next driver finds it so.
        driver.set_status(0);
        driver.start_full();
        assert_eq!(status(&mut driver), 0);
        let probe = driver.io.handle().attach(Probe).unwrap();
        let before = probe.with(|_| cpu_time()).unwrap();
        thread::sleep(Duration::from_millis(30));
        let spent = probe.with(|_| cpu_time()).unwrap() - before;
        assert!(spent < Duration::from_millis(5), "{spent:?}");
        assert_eq!(port.0.peers_lost.load(Ordering::Relaxed), 1);
        drop(kept);
    }
}

#[test]
fn a_pulled_cable_drops_whole_frames() {
    let (port, mut end) = port();
    let mut driver = driver_of(&port);
    driver.start_full();
    offer_buffers(&mut driver, &[100; 2]);
    assert!(port.set_link(false));
    end.write_all(&framed(1, 60)).unwrap();
    end.write_all(&framed(2, 70)[..40]).unwrap();
    let dropped = &port.0.dropped;
    wait_for("a drop", || {
        (dropped.load(Ordering::Relaxed) == 1).then_some(())
    });
    assert!(port.set_link(true));
    end.write_all(&framed(2, 70)[40..]).unwrap();
    assert_eq!(driver.used(0), (0, 82));
}
