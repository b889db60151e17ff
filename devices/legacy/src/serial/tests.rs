use std::sync::mpsc;
use std::time::Duration;

use super::*;
use crate::testing::{Edges, read, write};

const LINE_CONTROL: u64 = 3;
const IIR: u64 = 2;
const MODEM_CONTROL: u64 = 4;
const IER_RX: u8 = 1;
const IER_THR_EMPTY: u8 = 2;

/// A sink with room for so many bytes.
#[derive(Clone, Default)]
struct Pipe(Arc<Mutex<(Vec<u8>, usize)>>);

impl Pipe {
    fn allow(&self, bytes: usize) {
        self.0.lock().unwrap().1 += bytes;
    }

    fn seen(&self) -> Vec<u8> {
        self.0.lock().unwrap().0.clone()
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (seen, room) = &mut *self.0.lock().unwrap();
        let count = bytes.len().min(*room);
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        seen.extend(&bytes[..count]);
        *room -= count;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn port() -> (Serial, SerialHandle, Pipe, Arc<Edges>) {
    let (pipe, edges) = (Pipe::default(), Edges::new());
    let (serial, handle) = Serial::new(edges.clone(), Box::new(pipe.clone())).unwrap();
    (serial, handle, pipe, edges)
}

#[test]
fn a_byte_is_out_when_its_access_returns() {
    let (mut serial, _, pipe, _) = port();
    pipe.allow(usize::MAX / 2);
    for byte in b"ok\n" {
        write(&mut serial, 0, *byte);
    }
    assert_eq!(pipe.seen(), b"ok\n");
}

#[test]
fn a_full_sink_makes_the_transmitter_busy_and_loses_nothing() {
    let (mut serial, handle, pipe, edges) = port();
    write(&mut serial, 1, IER_THR_EMPTY);
    pipe.allow(2);
    for byte in b"abcd" {
        write(&mut serial, 0, *byte);
    }
    assert_eq!(pipe.seen(), b"ab");
    assert_eq!(read(&mut serial, 5) & LSR_TRANSMITTER_IDLE, 0);
    assert!(handle.output_waiting());
    assert!(!handle.output_ready());

    read(&mut serial, IIR);
    let before = edges.count();
    pipe.allow(10);
    assert!(handle.output_ready());
    assert_eq!(pipe.seen(), b"abcd");
    assert_eq!(edges.count(), before + 1, "the driver hears of it");
    assert_eq!(read(&mut serial, IIR) & 0x0f, 2, "as THR empty");
    assert_eq!(
        read(&mut serial, 5) & LSR_TRANSMITTER_IDLE,
        LSR_TRANSMITTER_IDLE
    );
    assert_eq!(handle.lost(), 0);
}

#[test]
fn any_access_retries_the_sink() {
    let (mut serial, _, pipe, _) = port();
    write(&mut serial, 0, b'x');
    assert!(pipe.seen().is_empty());
    pipe.allow(1);
    assert_eq!(
        read(&mut serial, 5) & LSR_TRANSMITTER_IDLE,
        LSR_TRANSMITTER_IDLE
    );
    assert_eq!(pipe.seen(), b"x");
}

#[test]
fn the_backlog_is_bounded_and_the_loss_is_counted() {
    let (mut serial, handle, pipe, _) = port();
    for _ in 0..BACKLOG + 10 {
        write(&mut serial, 0, b'y');
    }
    assert_eq!(handle.lost(), 10);
    pipe.allow(usize::MAX / 2);
    assert!(handle.output_ready());
    assert_eq!(pipe.seen().len(), BACKLOG);
}

#[test]
fn a_blocking_sink_is_the_back_pressure() {
    struct Blocking(mpsc::SyncSender<u8>);
    impl Write for Blocking {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            for byte in bytes {
                self.0.send(*byte).map_err(io::Error::other)?;
            }
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let (tx, rx) = mpsc::sync_channel(1);
    let (mut serial, handle) = Serial::new(Edges::new(), Box::new(Blocking(tx))).unwrap();
    let guest = std::thread::spawn(move || {
        for n in 0..200_u8 {
            write(&mut serial, 0, n);
        }
    });
    let mut seen = Vec::new();
    while let Ok(byte) = rx.recv() {
        if seen.len() % 50 == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        seen.push(byte);
        if seen.len() == 200 {
            break;
        }
    }
    guest.join().unwrap();
    assert_eq!(seen, (0..200).collect::<Vec<u8>>());
    assert_eq!(handle.lost(), 0);
}

#[test]
fn input_is_bounded_and_room_is_told_once() {
    let (mut serial, handle, _, edges) = port();
    write(&mut serial, 1, IER_RX);
    assert_eq!(handle.offer(&[7; 100]), RX_FIFO);
    assert_eq!(edges.count(), 1);
    assert_eq!(handle.offer(&[8; 36]), 0);
    assert!(handle.room().read().is_err(), "no room yet");
    for _ in 0..RX_FIFO {
        assert_eq!(read(&mut serial, 0), 7);
    }
    assert_eq!(handle.room().read().unwrap(), 1);
    assert_eq!(handle.offer(&[8; 36]), 36);
    for _ in 0..36 {
        assert_eq!(read(&mut serial, 0), 8);
    }
    assert!(handle.room().read().is_err(), "nobody was refused");
}

#[test]
fn loopback_holds_input_back() {
    let (mut serial, handle, _, _) = port();
    write(&mut serial, MODEM_CONTROL, 0x10);
    assert_eq!(handle.offer(b"a"), 0);
    read(&mut serial, 5);
    assert!(handle.room().read().is_err());
    write(&mut serial, MODEM_CONTROL, 0);
    assert_eq!(handle.room().read().unwrap(), 1);
    assert_eq!(handle.offer(b"a"), 1);
}

#[test]
fn every_register_and_width_answers() {
    let (mut serial, _, _, _) = port();
    for dlab in [0, 0x80] {
        write(&mut serial, LINE_CONTROL, dlab);
        for offset in 0..Serial::LEN {
            for width in [1, 2, 4] {
                let mut data = vec![0; width];
                serial.read(Access { offset }, &mut data);
                serial.write(Access { offset }, &data);
            }
        }
    }
}

#[test]
fn ready_output_under_dlab_keeps_the_divisor() {
    let (mut serial, handle, pipe, _) = port();
    write(&mut serial, 1, IER_THR_EMPTY);
    write(&mut serial, 0, b'z');
    write(&mut serial, LINE_CONTROL, 0x80);
    write(&mut serial, 1, 0x55);
    pipe.allow(1);
    assert!(handle.output_ready());
    assert_eq!(read(&mut serial, 1), 0x55, "the divisor's high byte");
    write(&mut serial, LINE_CONTROL, 0);
    assert_eq!(read(&mut serial, 1), IER_THR_EMPTY);
}
