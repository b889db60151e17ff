use std::collections::VecDeque;

use proptest::prelude::*;

use super::super::packet::{HOST_CID, TYPE_STREAM};
use super::*;

const GUEST: u64 = 3;

fn header(op: Op) -> Header {
    Header {
        src_cid: GUEST,
        dst_cid: HOST_CID,
        src_port: 1000,
        dst_port: 80,
        len: 0,
        kind: TYPE_STREAM,
        op: Some(op),
        flags: 0,
        buf_alloc: 64 * 1024,
        fwd_cnt: 0,
    }
}

fn data(len: u32) -> Header {
    Header {
        len,
        ..header(Op::Data)
    }
}

fn shutdown(flags: u32) -> Header {
    Header {
        flags,
        ..header(Op::Shutdown)
    }
}

fn tell(stream: &mut Stream) -> Option<Due> {
    let due = stream.due()?;
    stream.told(due);
    Some(due)
}

fn open() -> Stream {
    let mut stream = Stream::asked(&header(Op::Request));
    assert_eq!(stream.due(), None);
    stream.connected();
    assert_eq!(stream.room(), 0, "the answer first");
    assert_eq!(tell(&mut stream), Some(Due::Response));
    assert_eq!(stream.room(), 64 * 1024);
    stream
}

#[test]
fn the_host_asks() {
    let mut stream = Stream::requested();
    assert_eq!(tell(&mut stream), Some(Due::Request));
    assert_eq!(stream.due(), None);
    assert_eq!(stream.packet(&header(Op::Response)), Ok(Taken::Opened));
    assert_eq!(stream.room(), 64 * 1024);
    assert_eq!(stream.packet(&header(Op::Response)), Err(Violation));
}

#[test]
fn the_guest_refuses() {
    let mut stream = Stream::requested();
    tell(&mut stream);
    assert_eq!(stream.packet(&header(Op::Reset)), Ok(Taken::Noted));
    assert_eq!((stream.phase(), stream.due()), (Phase::Gone, None));
}

#[test]
fn more_than_the_credit_is_a_violation() {
    let mut stream = open();
    assert_eq!(stream.packet(&data(BUFFER)), Ok(Taken::Data(BUFFER)));
    assert_eq!(stream.packet(&data(1)), Err(Violation));
    let mut stream = open();
    assert_eq!(stream.packet(&data(u32::MAX)), Err(Violation));
    let mut stream = Stream::requested();
    assert_eq!(stream.packet(&data(1)), Err(Violation), "before it is open");
}

#[test]
fn room_is_told_when_half_of_the_buffer_is_news() {
    let mut stream = open();
    assert_eq!(stream.packet(&data(BUFFER)), Ok(Taken::Data(BUFFER)));
    stream.delivered(NEWS - 1);
    assert_eq!(stream.due(), None);
    stream.delivered(1);
    assert_eq!(tell(&mut stream), Some(Due::CreditUpdate));
    assert_eq!(stream.credit(), (BUFFER, NEWS));
    assert_eq!(stream.due(), None);
    stream.packet(&header(Op::CreditRequest)).unwrap();
    assert_eq!(tell(&mut stream), Some(Due::CreditUpdate));
}

#[test]
fn credit_is_asked_for_once() {
    let mut stream = open();
    stream.sent(64 * 1024);
    assert_eq!(stream.room(), 0);
    assert_eq!(stream.due(), None, "there is nothing to send");
    stream.blocked(true);
    assert_eq!(tell(&mut stream), Some(Due::CreditRequest));
    stream.blocked(true);
    assert_eq!(stream.due(), None);
    // A guest that has no buffer at all is not asked for ever.
    let none = Header {
        buf_alloc: 0,
        ..header(Op::CreditUpdate)
    };
    stream.packet(&none).unwrap();
    stream.blocked(true);
    assert_eq!(stream.due(), None);
}

#[test]
fn the_guest_closes_and_hears_when_everything_is_delivered() {
    let mut stream = open();
    stream.packet(&data(10)).unwrap();
    stream.packet(&shutdown(NEITHER)).unwrap();
    assert_eq!(stream.due(), None);
    assert!(stream.guest_takes_no_more() && !stream.guest_is_done());
    stream.delivered(10);
    assert!(stream.guest_is_done());
    assert_eq!(tell(&mut stream), Some(Due::Reset));
    assert_eq!(stream.phase(), Phase::Gone);
}

#[test]
fn each_direction_ends_by_itself() {
    let mut stream = open();
    stream.packet(&shutdown(NO_SEND)).unwrap();
    assert!(stream.guest_is_done() && stream.phase() == Phase::Open);
    assert!(stream.room() > 0, "the host may go on");
    assert_eq!(stream.packet(&data(1)), Err(Violation));
    let mut stream = open();
    stream.host_sends_no_more();
    assert_eq!(tell(&mut stream), Some(Due::Shutdown(NO_SEND)));
    assert_eq!((stream.room(), stream.phase()), (0, Phase::Open));
    assert_eq!(stream.packet(&data(1)), Ok(Taken::Data(1)));
    stream.delivered(1);
    stream.packet(&shutdown(NO_SEND)).unwrap();
    assert_eq!(stream.phase(), Phase::Closing);
    assert_eq!(tell(&mut stream), Some(Due::Shutdown(NEITHER)));
    assert_eq!(stream.due(), None);
    stream.packet(&header(Op::Reset)).unwrap();
    assert_eq!(stream.phase(), Phase::Gone);
}

#[test]
fn a_host_that_takes_no_more_does_not_stop_the_guests_reading() {
    let mut stream = open();
    stream.packet(&data(5)).unwrap();
    stream.host_takes_no_more();
    assert_eq!(tell(&mut stream), Some(Due::Shutdown(NO_RECEIVE)));
    assert!(stream.room() > 0 && stream.is_delivered());
    assert_eq!(stream.packet(&data(5)), Ok(Taken::Dropped));
    stream.host_sends_no_more();
    assert_eq!(tell(&mut stream), Some(Due::Shutdown(NEITHER)));
    // Both sides close at the same time.
    stream.packet(&shutdown(NEITHER)).unwrap();
    assert_eq!(tell(&mut stream), Some(Due::Reset));
}

#[derive(Debug, Clone, Copy)]
enum Step {
    GuestWrites(u32),
    GuestReads(u32),
    GuestEnds,
    HostWrites(u32),
    HostReads(u32),
    HostEnds,
    PacketArrives,
    DeviceSends(u32),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1_u32..200_000).prop_map(Step::GuestWrites),
        4 => (1_u32..100_000).prop_map(Step::GuestReads),
        1 => Just(Step::GuestEnds),
        4 => (1_u32..200_000).prop_map(Step::HostWrites),
        4 => (1_u32..100_000).prop_map(Step::HostReads),
        1 => Just(Step::HostEnds),
        8 => Just(Step::PacketArrives),
        8 => (1_u32..100_000).prop_map(Step::DeviceSends),
    ]
}

/// A guest, a host, and the device between them as the worker is: bytes are counted, the n-th byte
/// of each direction has the value of its number, so that what arrives must count up.
struct World {
    stream: Stream,
    packets: VecDeque<Header>,
    alloc: u32,
    /// Guest to host: written by the guest, kept by the device, in the socket, read by the host.
    written: u32,
    backlog: u32,
    socket: u32,
    heard_by_host: u32,
    guest_ended: bool,
    /// The device's credit as the guest knows it.
    device_alloc: u32,
    device_forwarded: u32,
    /// Host to guest: in the socket, under way or with the guest, read by the guest.
    host_written: u32,
    host_unread: u32,
    guest_buffer: u32,
    guest_read: u32,
    host_ended: bool,
    guest_heard_end: bool,
}

/// What the socket to the host holds.
const SOCKET: u32 = 50_000;

impl World {
    fn new(alloc: u32) -> Self {
        let mut stream = Stream::asked(&Header {
            buf_alloc: alloc,
            ..header(Op::Request)
        });
        stream.connected();
        assert_eq!(tell(&mut stream), Some(Due::Response));
        Self {
            stream,
            packets: VecDeque::new(),
            alloc,
            written: 0,
            backlog: 0,
            socket: 0,
            heard_by_host: 0,
            guest_ended: false,
            device_alloc: BUFFER,
            device_forwarded: 0,
            host_written: 0,
            host_unread: 0,
            guest_buffer: 0,
            guest_read: 0,
            host_ended: false,
            guest_heard_end: false,
        }
    }

    fn guest_sends(&mut self, packet: Header) {
        self.packets.push_back(Header {
            buf_alloc: self.alloc,
            fwd_cnt: self.guest_read,
            ..packet
        });
    }

    fn device_said(&mut self) {
        (self.device_alloc, self.device_forwarded) = self.stream.credit();
    }

    fn flush(&mut self) {
        let moved = self.backlog.min(SOCKET - self.socket);
        self.backlog -= moved;
        self.socket += moved;
        self.stream.delivered(moved);
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::GuestWrites(most) if !self.guest_ended => {
                let room = self.device_alloc - (self.written - self.device_forwarded);
                let len = room.min(most);
                if len > 0 {
                    self.written += len;
                    self.guest_sends(data(len));
                }
            }
            Step::GuestReads(most) => {
                let read = self.guest_buffer.min(most);
                self.guest_buffer -= read;
                self.guest_read += read;
                if read > 0 {
                    self.guest_sends(header(Op::CreditUpdate));
                }
            }
            Step::GuestEnds if !self.guest_ended => {
                self.guest_ended = true;
                self.guest_sends(shutdown(NO_SEND));
            }
            Step::HostWrites(bytes) if !self.host_ended => {
                self.host_written += bytes;
                self.host_unread += bytes;
            }
            Step::HostReads(most) => {
                let read = self.socket.min(most);
                self.socket -= read;
                self.heard_by_host += read;
                self.flush();
            }
            Step::HostEnds => self.host_ended = true,
            Step::PacketArrives => {
                let Some(packet) = self.packets.pop_front() else {
                    return;
                };
                if let Taken::Data(len) = self.stream.packet(&packet).unwrap() {
                    self.backlog += len;
                    assert!(self.backlog <= BUFFER, "more is kept than was granted");
                    self.flush();
                }
            }
            Step::DeviceSends(most) => self.device_sends(most),
            _ => {}
        }
    }

    fn device_sends(&mut self, most: u32) {
        self.stream
            .blocked(self.host_unread > 0 && self.stream.room() == 0);
        for _ in 0..8 {
            let Some(due) = tell(&mut self.stream) else {
                break;
            };
            self.device_said();
            match due {
                Due::CreditRequest => self.guest_sends(header(Op::CreditUpdate)),
                Due::Shutdown(flags) => self.guest_heard_end |= flags & NO_SEND != 0,
                _ => {}
            }
        }
        assert_eq!(self.stream.due(), None, "it has no end");
        let len = self.stream.room().min(most).min(self.host_unread);
        if len > 0 {
            assert!(!self.guest_heard_end, "data after the end");
            self.host_unread -= len;
            self.stream.sent(len);
            self.device_said();
            self.guest_buffer += len;
            assert!(self.guest_buffer <= self.alloc, "credit is exceeded");
        }
        if self.host_unread == 0 && self.host_ended {
            self.stream.host_sends_no_more();
        }
    }

    /// Everybody reads on, nobody writes any more.
    fn settle(&mut self) {
        for last in [Step::GuestEnds, Step::HostEnds] {
            self.step(last);
        }
        for _ in 0..20_000 {
            for step in [
                Step::PacketArrives,
                Step::HostReads(u32::MAX),
                Step::DeviceSends(u32::MAX),
                Step::GuestReads(u32::MAX),
            ] {
                self.step(step);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever happens in whatever order, all that was written arrives, and no buffer is ever asked
    /// to hold more than it can.
    #[test]
    fn nothing_is_lost_and_credit_is_kept(
        alloc in prop_oneof![1_u32..100, 1_u32..300_000],
        steps in prop::collection::vec(step(), 1..300),
    ) {
        let mut world = World::new(alloc);
        for step in steps {
            // A tiny buffer would take for ever to drain.
            let step = match step {
                Step::HostWrites(bytes) if alloc < 100 => Step::HostWrites(bytes % 100),
                step => step,
            };
            world.step(step);
        }
        world.settle();
        prop_assert_eq!(world.heard_by_host, world.written);
        prop_assert_eq!(world.guest_read, world.host_written);
        prop_assert!(world.guest_heard_end);
        prop_assert_eq!(world.stream.phase(), Phase::Closing);
    }

    /// A guest may send anything.
    #[test]
    fn any_packets_are_survived(
        packets in prop::collection::vec(
            (0_u16..9, 0_u32..4, any::<u32>(), any::<u32>(), 0_u32..400_000), 1..200),
    ) {
        let mut stream = Stream::asked(&header(Op::Request));
        stream.connected();
        let mut kept = 0;
        for (op, flags, buf_alloc, fwd_cnt, len) in packets {
            let mut bytes = header(Op::Data).to_bytes();
            bytes[30..32].copy_from_slice(&op.to_le_bytes());
            let packet = Header { flags, buf_alloc, fwd_cnt, len, ..Header::from_bytes(&bytes) };
            match stream.packet(&packet) {
                Ok(Taken::Data(len)) => kept += len,
                Ok(_) => {}
                Err(Violation) => stream.refuse(),
            }
            prop_assert!(kept <= BUFFER);
            let now = kept / 2;
            stream.delivered(now);
            kept -= now;
            let mut due = 0;
            while tell(&mut stream).is_some() {
                stream.blocked(true);
                due += 1;
                prop_assert!(due < 8);
            }
            let room = stream.room().min(1000);
            stream.sent(room);
        }
    }
}
