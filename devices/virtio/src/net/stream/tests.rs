use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::queue::Buffer;

fn framed(frames: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for frame in frames {
        bytes.extend(u32::try_from(frame.len()).unwrap().to_be_bytes());
        bytes.extend(frame);
    }
    bytes
}

fn frames() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let len = prop_oneof![0..100_usize, 1400..1600_usize, Just(LONGEST)];
    let frame = (len, any::<u8>()).prop_map(|(len, first)| {
        (0..len)
            .map(|n| first.wrapping_add(u8::try_from(n % 253).unwrap()))
            .collect()
    });
    prop::collection::vec(frame, 0..12)
}

proptest! {
    /// However the bytes are cut, the frames are those that were sent, and no more memory is used.
    #[test]
    fn frames_come_out_as_they_went_in(
        frames in frames(),
        cuts in prop::collection::vec(1..40_000_usize, 1..20),
    ) {
        let bytes = framed(&frames);
        let mut rest = bytes.as_slice();
        let mut inbox = Inbox::new();
        let mut got = Vec::new();
        let mut cuts = cuts.iter().cycle();
        while !rest.is_empty() {
            let room = inbox.room();
            prop_assert!(!room.is_empty());
            let count = cuts.next().unwrap().min(&rest.len()).min(&room.len()).to_owned();
            room[..count].copy_from_slice(&rest[..count]);
            inbox.filled(count);
            rest = &rest[count..];
            while let Some(frame) = inbox.front().unwrap() {
                got.push(frame.to_vec());
                inbox.consume();
            }
            prop_assert_eq!(inbox.bytes.len(), INBOX);
        }
        prop_assert!(got == frames);
        prop_assert!(inbox.unread().is_empty());
    }

    /// Any bytes: frames within bounds, or the one error, for good.
    #[test]
    fn no_bytes_break_the_inbox(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut inbox = Inbox::new();
        inbox.room()[..bytes.len()].copy_from_slice(&bytes);
        inbox.filled(bytes.len());
        for _ in 0..=bytes.len() {
            match inbox.front() {
                Ok(Some(frame)) => prop_assert!(frame.len() <= bytes.len()),
                Ok(None) => return Ok(()),
                Err(BadLength(len)) => {
                    prop_assert!(len > LONGEST);
                    inbox.consume();
                    prop_assert_eq!(inbox.front(), Err(BadLength(len)));
                    return Ok(());
                }
            }
            inbox.consume();
        }
        prop_assert!(false, "more frames than bytes");
    }
}

#[test]
fn a_stream_ends_in_the_middle_or_with_nonsense() {
    let pair = || {
        let (here, there) = UnixStream::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        (here, there)
    };
    let (here, mut there) = pair();
    let mut stream = Stream::new();
    let kind = |stream: &mut Stream, here: &UnixStream| {
        let error = stream.front(here.as_fd()).unwrap_err();
        (error.kind(), error.to_string())
    };
    assert_eq!(kind(&mut stream, &here).0, ErrorKind::WouldBlock);
    there.write_all(&[0, 0, 0, 3, b'a', b'b']).unwrap();
    assert_eq!(kind(&mut stream, &here).0, ErrorKind::WouldBlock);
    there.write_all(b"c\0\0").unwrap();
    assert_eq!(stream.front(here.as_fd()).unwrap(), 3);
    assert_eq!(stream.frame(), b"abc");
    stream.consume();
    drop(there);
    assert_eq!(kind(&mut stream, &here).0, ErrorKind::UnexpectedEof);
    let (here, mut there) = pair();
    there.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    let (what, why) = kind(&mut Stream::new(), &here);
    assert_eq!(what, ErrorKind::InvalidData);
    assert!(why.contains("a frame of 1195725856 bytes"), "{why}");
}

/// A peer that takes a few bytes at a time gets every frame whole, and no frame is begun before the
/// one before it has gone.
#[test]
fn a_slow_peer_gets_every_frame_whole() {
    let ram = RamView::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let (here, mut there) = UnixStream::pair().unwrap();
    here.set_nonblocking(true).unwrap();
    there.set_nonblocking(true).unwrap();
    let (mut stream, mut vectors) = (Stream::new(), Vectors::default());
    let mut sent = Vec::new();
    let mut got = Vec::new();
    let mut partly = 0;
    for number in 0..400_u32 {
        let len = 1 + number * 7919 % 60_000;
        let frame: Vec<u8> = (0..len)
            .map(|n| n.wrapping_mul(number).to_le_bytes()[1])
            .collect();
        ram.write_slice(&frame, GuestAddress(0x1000 + HEADER as u64))
            .unwrap();
        // Header and frame in pieces of odd sizes.
        let buffer = |address, len| Buffer {
            address: GuestAddress(address),
            len,
        };
        let whole = len + u32::try_from(HEADER).unwrap();
        let first = whole.min(5 + number % 30);
        let chain = Chain::of_buffers(
            &[
                buffer(0x1000, first),
                buffer(0x1000 + u64::from(first), whole - first),
            ],
            &[],
        );
        loop {
            let pushed = stream
                .push(here.as_fd(), &mut vectors, &ram, &chain)
                .unwrap();
            match pushed {
                Pushed::Yes => break,
                Pushed::Never => panic!("frame {number}"),
                Pushed::Later => {
                    let mut bytes = [0; 30_011];
                    match there.read(&mut bytes) {
                        Ok(count) => got.extend(&bytes[..count]),
                        Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
                    }
                }
            }
        }
        partly += u32::from(stream.is_sending());
        assert!(stream.unsent.len() <= PREFIX + LONGEST);
        sent.push(frame);
    }
    assert!(partly > 3, "{partly} frames went in part");
    there.set_nonblocking(false).unwrap();
    let reader = std::thread::spawn(move || {
        let mut rest = Vec::new();
        there.read_to_end(&mut rest).unwrap();
        rest
    });
    while !stream.flush(here.as_fd()).unwrap() {
        std::thread::yield_now();
    }
    drop(here);
    got.extend(reader.join().unwrap());
    assert!(got == framed(&sent));
    assert!(!stream.is_sending());
}

#[test]
fn frames_no_stream_carries_are_refused_and_a_peer_that_went_is_an_error() {
    let ram = RamView::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let (here, there) = UnixStream::pair().unwrap();
    here.set_nonblocking(true).unwrap();
    let (mut stream, mut vectors) = (Stream::new(), Vectors::default());
    let mut push = |address, len| {
        let buffer = Buffer {
            address: GuestAddress(address),
            len,
        };
        let chain = Chain::of_buffers(&[buffer], &[]);
        stream.push(here.as_fd(), &mut vectors, &ram, &chain)
    };
    let most = u32::try_from(HEADER + LONGEST).unwrap();
    assert_eq!(push(0, most + 1).unwrap(), Pushed::Never);
    assert_eq!(push(2 << 20, 100).unwrap(), Pushed::Never);
    assert_eq!(push(0, most).unwrap(), Pushed::Yes);
    drop(there);
    assert_eq!(push(0, 100).unwrap_err().kind(), ErrorKind::BrokenPipe);
}
