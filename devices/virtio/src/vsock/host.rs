//! The host's side: unix stream sockets. Nothing here waits.
//!
//! A host process connects to the listening socket and writes `CONNECT port\n`; it reads
//! `OK port\n` when the guest has answered. A guest that connects to the host's port P reaches
//! whoever listens at the path with `_P` appended.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, connect, recv,
    socket_with,
};

/// The longest greeting: `CONNECT 4294967295\r\n` and some blanks.
const GREETING: usize = 32;

/// Where connections come from and go to.
#[derive(Debug)]
pub struct VsockHost {
    /// Host processes connect here; it is listening and non-blocking.
    pub listener: OwnedFd,
    /// The guest's connections go to this path with `_PORT` appended; `None` refuses them.
    pub base: Option<PathBuf>,
}

/// What has come of a client's greeting.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// The line is not there yet.
    Partial,
    /// It wants this port of the guest.
    Port(u32),
    /// It said something else, or went away.
    Nonsense,
}

/// Why the guest's connection does not reach anybody.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unreached {
    /// The listener's queue is full: try again.
    Busy,
    Refused,
}

impl VsockHost {
    /// The next client that waits.
    pub(super) fn accept(&self) -> io::Result<OwnedFd> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        Ok(accept_with(&self.listener, flags)?)
    }

    pub(super) fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Connects to whoever serves `port` for the guest.
    pub(super) fn dial(&self, port: u32) -> Result<OwnedFd, Unreached> {
        let base = self.base.as_deref().ok_or(Unreached::Refused)?;
        try_dial(base, port).map_err(|errno| match errno {
            Errno::AGAIN | Errno::INTR => Unreached::Busy,
            errno => {
                log::debug!("vsock: nobody at {}_{port}: {errno}", base.display());
                Unreached::Refused
            }
        })
    }
}

fn try_dial(base: &Path, port: u32) -> Result<OwnedFd, Errno> {
    let mut path = OsString::from(base);
    path.push(format!("_{port}"));
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path.as_os_str())?)?;
    Ok(socket)
}

/// Reads a client's greeting, and not a byte of what follows it.
pub(super) fn greeting(socket: BorrowedFd<'_>) -> Greeting {
    let mut peeked = [0; GREETING];
    let seen = match recv(socket, &mut peeked, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((seen, _)) if seen > 0 => seen,
        Err(Errno::AGAIN | Errno::INTR) => return Greeting::Partial,
        _ => return Greeting::Nonsense,
    };
    let seen = peeked.get(..seen).unwrap_or_default();
    let Some(end) = seen.iter().position(|byte| *byte == b'\n') else {
        return if seen.len() < GREETING && b"CONNECT ".iter().zip(seen).all(|(a, b)| a == b) {
            Greeting::Partial
        } else {
            Greeting::Nonsense
        };
    };
    let mut line = [0; GREETING];
    let take = line.get_mut(..=end).unwrap_or_default();
    if !matches!(recv(socket, &mut *take, RecvFlags::DONTWAIT), Ok((got, _)) if got > end) {
        return Greeting::Nonsense;
    }
    let words = std::str::from_utf8(take).unwrap_or_default();
    let port = words
        .strip_prefix("CONNECT ")
        .and_then(|port| port.trim().parse().ok());
    port.map_or(Greeting::Nonsense, Greeting::Port)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn greetings_are_read_to_their_end_and_no_further() {
        let (mut client, mut served) = UnixStream::pair().unwrap();
        assert_eq!(greeting(served.as_fd()), Greeting::Partial);
        client.write_all(b"CONNECT 10").unwrap();
        assert_eq!(greeting(served.as_fd()), Greeting::Partial);
        client.write_all(b"24\nearly").unwrap();
        assert_eq!(greeting(served.as_fd()), Greeting::Port(1024));
        let mut rest = [0; 5];
        served.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"early");
    }

    #[test]
    fn what_is_no_greeting_is_nonsense() {
        for words in [
            "CONNECT\n",
            "CONNECT x\n",
            "CONNECT -1\n",
            "CONNECT 4294967296\n",
            "connect 1\n",
            "GET / HTTP",
            "CONNECT                                   1\n",
            "\n",
        ] {
            let (mut client, served) = UnixStream::pair().unwrap();
            client.write_all(words.as_bytes()).unwrap();
            assert_eq!(greeting(served.as_fd()), Greeting::Nonsense, "{words:?}");
        }
        let (client, served) = UnixStream::pair().unwrap();
        drop(client);
        assert_eq!(greeting(served.as_fd()), Greeting::Nonsense);
    }

    #[test]
    fn the_guest_reaches_who_listens() {
        let dir = std::env::temp_dir().join(format!("testudo-vsock-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let base = dir.join("v");
        let listener = UnixListener::bind(dir.join("v_7")).unwrap();
        let host = VsockHost {
            listener: UnixListener::bind(&base).unwrap().into(),
            base: Some(base),
        };
        let near = host.dial(7).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        UnixStream::from(near).write_all(b"hi").unwrap();
        let mut heard = [0; 2];
        far.read_exact(&mut heard).unwrap();
        assert_eq!(host.dial(8).unwrap_err(), Unreached::Refused);
        drop(listener);
        assert_eq!(host.dial(7).unwrap_err(), Unreached::Refused);
        let none = VsockHost { base: None, ..host };
        assert_eq!(none.dial(7).unwrap_err(), Unreached::Refused);
        std::fs::remove_dir_all(dir).unwrap();
    }
}
