//! Stream sockets between guest and host: what the other end tells the guest to do with them.
//!
//! A served connection begins with a line:
//!
//! | line | does |
//! |---|---|
//! | `echo` | sends everything back until the end, then closes |
//! | `source BYTES SEED` | sends a pattern, then closes |
//! | `sink SEED MS` | waits, reads to the end, answers `BYTES whole` or `BYTES broken`, then closes |
//! | `hold` | keeps the connection and does nothing |
//! | `farewell BYTES SEED` | sends a pattern and powers the machine off |
//! | `quit` | ends the service |
#![expect(unsafe_code, reason = "AF_VSOCK addresses")]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::system::{RebootCommand, reboot};

use crate::console::Console;
use crate::pattern::Pattern;

const HOST: u32 = libc::VMADDR_CID_HOST;
const ANY: u32 = libc::VMADDR_CID_ANY;
const CHUNK: usize = 64 * 1024;
/// How often it is asked whether the service is over.
const LOOK_AGAIN: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};
/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: it takes integers.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    owned(fd)
}

fn owned(fd: i32) -> io::Result<OwnedFd> {
    check(fd)?;
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all zeros is an address.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = u16::try_from(libc::AF_VSOCK).unwrap_or_default();
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

/// `SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD`.
const CONNECT_TIMEOUT: i32 = 6;
const TIMEVAL_LEN: u32 = 16;
const ADDRESS_LEN: u32 = 16;
const _: () = assert!(size_of::<libc::sockaddr_vm>() == 16, "as ADDRESS_LEN says");

fn connect(port: u32) -> io::Result<File> {
    let socket = socket()?;
    // On a busy machine Linux's two seconds are soon over.
    let patience = libc::timeval {
        tv_sec: 30,
        tv_usec: 0,
    };
    // SAFETY: the option takes a timeval of that length.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::AF_VSOCK,
            CONNECT_TIMEOUT,
            (&raw const patience).cast(),
            TIMEVAL_LEN,
        )
    })?;
    let to = address(HOST, port);
    // SAFETY: `to` is an address of that length.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const to).cast(), ADDRESS_LEN) })?;
    Ok(socket.into())
}

fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let at = address(ANY, port);
    // SAFETY: as above.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const at).cast(), ADDRESS_LEN) })?;
    // SAFETY: it takes integers.
    check(unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) })?;
    Ok(socket)
}

fn accept(listener: &OwnedFd) -> io::Result<File> {
    // SAFETY: no address is asked for.
    let fd = unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            libc::SOCK_CLOEXEC,
        )
    };
    Ok(owned(fd)?.into())
}

/// Sends no more.
fn end(socket: &File) -> io::Result<()> {
    // SAFETY: it takes integers.
    check(unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_WR) })
}

/// Serves `port` until a connection says `quit`; tells how many there were.
pub(crate) fn serve(console: &mut Console, port: u32) -> io::Result<()> {
    let listener = listen(port)?;
    console.line("VSOCK ready");
    let over = Arc::new(AtomicBool::new(false));
    let mut count = 0_u64;
    while !over.load(Ordering::Acquire) {
        let mut waiting = [PollFd::new(&listener, PollFlags::IN)];
        if poll(&mut waiting, Some(&LOOK_AGAIN))? == 0 {
            continue;
        }
        let connection = accept(&listener)?;
        count = count.saturating_add(1);
        let over = Arc::clone(&over);
        thread::spawn(move || {
            if matches!(converse(connection), Ok(true)) {
                over.store(true, Ordering::Release);
            }
        });
    }
    console.fact("vsock.served", count);
    Ok(())
}

/// `true` if the service shall end.
fn converse(mut connection: File) -> io::Result<bool> {
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        connection.read_exact(&mut byte)?;
        if byte == *b"\n" {
            break;
        }
        line.extend(byte);
    }
    let line = String::from_utf8(line).map_err(io::Error::other)?;
    let mut words = line.split(' ');
    let verb = words.next().unwrap_or_default();
    let mut number = || {
        words
            .next()
            .and_then(|w| w.parse::<u64>().ok())
            .unwrap_or(0)
    };
    match verb {
        "echo" => {
            let mut chunk = vec![0; CHUNK];
            loop {
                let got = connection.read(&mut chunk)?;
                if got == 0 {
                    return Ok(false);
                }
                connection.write_all(chunk.get(..got).unwrap_or_default())?;
            }
        }
        "source" => {
            let (bytes, seed) = (number(), number());
            send(&mut connection, bytes, seed)?;
        }
        "sink" => {
            let (seed, wait) = (number(), number());
            thread::sleep(Duration::from_millis(wait));
            let (bytes, whole) = receive(&mut connection, seed)?;
            let word = if whole { "whole" } else { "broken" };
            connection.write_all(format!("{bytes} {word}\n").as_bytes())?;
        }
        "hold" => loop {
            thread::park();
        },
        "farewell" => {
            let (bytes, seed) = (number(), number());
            send(&mut connection, bytes, seed)?;
            drop(connection);
            // The kernel hands packets to the device from a worker of its own.
            thread::sleep(Duration::from_millis(200));
            reboot(RebootCommand::PowerOff)?;
        }
        "quit" => return Ok(true),
        _ => connection.write_all(b"what?\n")?,
    }
    Ok(false)
}

fn send(to: &mut impl Write, bytes: u64, seed: u64) -> io::Result<()> {
    let mut pattern = Pattern::new(seed);
    while pattern.position() < bytes {
        let left = bytes.saturating_sub(pattern.position());
        let len = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        to.write_all(&pattern.next(len))?;
    }
    Ok(())
}

/// Reads to the end; how many bytes there were, and whether they were the pattern's.
fn receive(from: &mut impl Read, seed: u64) -> io::Result<(u64, bool)> {
    let mut pattern = Pattern::new(seed);
    let mut whole = true;
    let mut chunk = vec![0; CHUNK];
    loop {
        let got = from.read(&mut chunk)?;
        if got == 0 {
            return Ok((pattern.position(), whole));
        }
        whole &= pattern.next(got) == chunk.get(..got).unwrap_or_default();
    }
}

/// Connects so many times at once to `port` of the host, where everything is sent back, sends so many
/// KiB each way and tells how many streams came back whole.
pub(crate) fn dial(console: &mut Console, port: u32, streams: u64, kib: u64) -> io::Result<()> {
    let threads: Vec<_> = (0..streams)
        .map(|seed| thread::spawn(move || echoed(port, seed, kib.saturating_mul(1024))))
        .collect();
    let mut whole = 0_u64;
    for thread in threads {
        match thread.join() {
            Ok(Ok(true)) => whole = whole.saturating_add(1),
            Ok(Ok(false)) => console.line("a stream came back broken"),
            Ok(Err(e)) => console.line(format_args!("a stream failed: {e}")),
            Err(_) => console.line("a thread panicked"),
        }
    }
    console.fact("vsock.echoed", whole);
    Ok(())
}

fn echoed(port: u32, seed: u64, bytes: u64) -> io::Result<bool> {
    let mut connection = connect(port)?;
    let mut sending = connection.try_clone()?;
    let sender = thread::spawn(move || {
        send(&mut sending, bytes, seed)?;
        end(&sending)
    });
    let (came, whole) = receive(&mut connection, seed)?;
    let sent = sender
        .join()
        .map_err(|_| io::Error::other("the sender panicked"))?;
    sent?;
    Ok(whole && came == bytes)
}

/// Connects where nobody listens and tells what comes of it.
pub(crate) fn refused(console: &mut Console, port: u32) {
    let word = match connect(port) {
        Ok(_) => "connected".to_owned(),
        Err(e) => format!("{:?}", e.kind()),
    };
    console.fact("vsock.refused", word);
}
