//! The `SOCK_SEQPACKET` Unix socket: whole messages, with descriptors alongside.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use thiserror::Error;

/// Longest message, in bytes. A longer packet is refused whole.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// Most descriptors that ride along with one message.
pub const MAX_FDS: usize = 16;

/// The socket could not be bound.
#[derive(Debug, Error)]
pub enum BindError {
    /// A VM answers there.
    #[error("control socket {} is in use by a running VM; choose another path", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Something that is not a socket is there.
    #[error("{} exists and is not a socket; remove it or choose another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The host refused.
    #[error("cannot bind control socket {}: does its folder exist, and may this user write there?", path.display())]
    Host {
        /// The path.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

/// The socket could not be connected to.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// Nobody answers.
    #[error("no VM answers at control socket {}: it has ended, or the path is another's", path.display())]
    NobodyThere {
        /// The path.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The host refused.
    #[error("cannot connect to control socket {}", path.display())]
    Host {
        /// The path.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
}

fn seqpacket(flags: SocketFlags) -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        flags | SocketFlags::CLOEXEC,
        None,
    )
}

/// A listening socket. Dropping it removes the path it was bound to.
pub struct Listener {
    fd: OwnedFd,
    path: Option<PathBuf>,
}

impl Listener {
    /// Binds `path`. A socket left behind by a VMM that is gone is replaced.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let host = |source: Errno| BindError::Host {
            path: path.to_path_buf(),
            source: source.into(),
        };
        let address = SocketAddrUnix::new(path).map_err(host)?;
        let fd = seqpacket(SocketFlags::NONBLOCK).map_err(host)?;
        match rustix::net::bind(&fd, &address) {
            Err(Errno::ADDRINUSE) => {
                remove_stale(path)?;
                rustix::net::bind(&fd, &address).map_err(host)?;
            }
            bound => bound.map_err(host)?,
        }
        rustix::net::listen(&fd, 16).map_err(host)?;
        Ok(Self {
            fd,
            path: Some(path.to_path_buf()),
        })
    }

    /// Uses a listening socket made by somebody else, who also removes its path.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        rustix::fs::fcntl_setfl(&fd, rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self { fd, path: None })
    }

    /// The next waiting client; `WouldBlock` if there is none.
    pub fn accept(&self) -> io::Result<Connection> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::accept_with(&self.fd, flags)?;
        Ok(Connection { fd })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), BindError> {
    use std::os::unix::fs::FileTypeExt;
    let here = || path.to_path_buf();
    let host = |source| BindError::Host {
        path: here(),
        source,
    };
    let metadata = std::fs::symlink_metadata(path).map_err(host)?;
    if !metadata.file_type().is_socket() {
        return Err(BindError::NotASocket { path: here() });
    }
    match Connection::open(path) {
        Err(ConnectError::NobodyThere { .. }) => std::fs::remove_file(path).map_err(host),
        _ => Err(BindError::InUse { path: here() }),
    }
}

/// One end of a connection.
pub struct Connection {
    fd: OwnedFd,
}

/// One message as it came in.
#[derive(Debug)]
pub struct Received {
    /// The packet's bytes; empty when the peer has closed the connection.
    pub message: Vec<u8>,
    /// Descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

impl Connection {
    /// Connects to the VMM listening at `path`. The connection blocks.
    pub fn open(path: &Path) -> Result<Self, ConnectError> {
        let here = || path.to_path_buf();
        let host = |source: Errno| ConnectError::Host {
            path: here(),
            source: source.into(),
        };
        let address = SocketAddrUnix::new(path).map_err(host)?;
        let fd = seqpacket(SocketFlags::empty()).map_err(host)?;
        match rustix::net::connect(&fd, &address) {
            Ok(()) => Ok(Self { fd }),
            Err(source @ (Errno::CONNREFUSED | Errno::NOENT)) => Err(ConnectError::NobodyThere {
                path: here(),
                source: source.into(),
            }),
            Err(source) => Err(host(source)),
        }
    }

    /// Two ends of a connection that has no path. Both block.
    pub fn pair() -> io::Result<(Self, Self)> {
        let kind = SocketType::SEQPACKET;
        let (one, other) =
            rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        Ok((Self { fd: one }, Self { fd: other }))
    }

    /// An end that was inherited or received.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Makes calls on it wait, or return `WouldBlock` instead.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        Ok(rustix::io::ioctl_fionbio(&self.fd, nonblocking)?)
    }

    /// Sends one message with `fds` alongside. On a non-blocking connection whose buffer is full
    /// this is `WouldBlock` and nothing was sent.
    pub fn send(&self, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        if message.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        rustix::net::sendmsg(
            &self.fd,
            &[IoSlice::new(message)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }

    /// Receives one message. A packet longer than [`MAX_MESSAGE`] is `InvalidData`, and so is one
    /// with more than [`MAX_FDS`] descriptors (all of them are closed).
    pub fn receive(&self) -> io::Result<Received> {
        let mut message = vec![0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got = rustix::net::recvmsg(
            &self.fd,
            &mut [IoSliceMut::new(&mut message)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        let fds: Vec<OwnedFd> = ancillary
            .drain()
            .filter_map(|m| match m {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        if got
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(io::ErrorKind::InvalidData.into());
        }
        message.truncate(got.bytes);
        Ok(Received { message, fds })
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use super::*;

    fn pair(dir: &Path) -> (Listener, Connection, Connection) {
        let path = dir.join("ctl");
        let listener = Listener::bind(&path).unwrap();
        let client = Connection::open(&path).unwrap();
        let server = listener.accept().unwrap();
        (listener, client, server)
    }

    #[test]
    fn messages_keep_their_borders_and_carry_descriptors() {
        let dir = tempfile::tempdir().unwrap();
        let (_listener, client, server) = pair(dir.path());
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"inside").unwrap();
        client.send(b"one", &[file.as_fd()]).unwrap();
        client.send(b"two", &[]).unwrap();
        let mut first = server.receive().unwrap();
        assert_eq!(first.message, b"one");
        let mut file = std::fs::File::from(first.fds.pop().unwrap());
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "inside");
        assert_eq!(server.receive().unwrap().message, b"two");
        drop(client);
        assert!(server.receive().unwrap().message.is_empty());
    }

    #[test]
    fn a_live_socket_is_refused_and_a_stale_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ctl");
        let live = Listener::bind(&path).unwrap();
        assert!(matches!(
            Listener::bind(&path),
            Err(BindError::InUse { .. })
        ));
        // What a killed VMM leaves: the path without the socket behind it.
        let mut live = live;
        live.path = None;
        drop(live);
        assert!(path.exists());
        drop(Listener::bind(&path).unwrap());
        assert!(!path.exists(), "a listener removes its path");
        std::fs::write(&path, "x").unwrap();
        assert!(matches!(
            Listener::bind(&path),
            Err(BindError::NotASocket { .. })
        ));
        assert!(matches!(
            Connection::open(&dir.path().join("none")),
            Err(ConnectError::NobodyThere { .. })
        ));
    }

    #[test]
    fn a_pair_needs_no_path() {
        let (one, other) = Connection::pair().unwrap();
        let other = Connection::from_fd(other.fd);
        one.send(b"hello", &[]).unwrap();
        assert_eq!(other.receive().unwrap().message, b"hello");
        other.set_nonblocking(true).unwrap();
        let nothing = other.receive().unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn too_much_is_refused_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (_listener, client, server) = pair(dir.path());
        assert!(client.send(&vec![b'x'; MAX_MESSAGE + 1], &[]).is_err());
        // A client that does not keep to the limit.
        rustix::net::send(&client.fd, &vec![b'x'; MAX_MESSAGE + 1], SendFlags::empty()).unwrap();
        client.send(b"ok", &[]).unwrap();
        assert_eq!(
            server.receive().unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        assert_eq!(server.receive().unwrap().message, b"ok");
        assert_eq!(
            server.receive().unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
    }
}
