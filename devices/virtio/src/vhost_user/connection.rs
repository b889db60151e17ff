//! The socket to a back-end: every exchange has a deadline, and descriptors only go out.
//!
//! A back-end is not trusted. It may be slow, silent, gone, or send anything: what comes in is read
//! without room for descriptors, so that the kernel drops those that ride along, and no more than
//! the reply that was asked for is ever read.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown,
    SocketAddrUnix, SocketFlags, SocketType,
};
use thiserror::Error;

use super::message::{HEADER, Header, MAX_FDS, Malformed, Payload, Request};

/// The back-end could not be reached, or does not do what the protocol says.
#[derive(Debug, Error)]
pub enum PeerError {
    /// Nobody listens.
    #[error(
        "no vhost-user back-end answers at {}; start it first", path.display()
    )]
    Nobody {
        /// The path.
        path: PathBuf,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The descriptor that was handed over is something else.
    #[error("the descriptor is not a connected Unix stream socket")]
    NotASocket,
    /// The connection broke.
    #[error("the connection to the back-end broke at {request:?}")]
    Io {
        /// What was being asked for.
        request: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The back-end has closed the connection.
    #[error("the back-end has closed the connection")]
    Closed,
    /// The back-end takes too long.
    #[error("the back-end does not answer {request} in time")]
    Timeout {
        /// What was being asked for.
        request: &'static str,
    },
    /// The back-end answers something else.
    #[error("the back-end answers {request} wrongly")]
    Malformed {
        /// What was asked for.
        request: &'static str,
        /// What is wrong with the answer.
        #[source]
        source: Malformed,
    },
    /// The back-end says no.
    #[error("the back-end refuses {request} with {code}")]
    Refused {
        /// What was asked for.
        request: &'static str,
        /// Its reason, whose meaning is its own.
        code: u64,
    },
    /// The back-end is not for such a device.
    #[error("the back-end {0}")]
    Unfit(String),
    /// Guest RAM that no other process can map.
    #[error(
        "guest RAM at {gpa:#x} cannot be shared with a back-end; add `shared` to the memory's options"
    )]
    PrivateRam {
        /// Where.
        gpa: u64,
    },
}

/// The time until which an operation must be over.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline(Instant);

impl Deadline {
    pub(super) fn after(patience: Duration) -> Self {
        let now = Instant::now();
        Self(now.checked_add(patience).unwrap_or(now))
    }

    pub(super) fn passed(self) -> bool {
        self.left().is_zero()
    }

    fn left(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }
}

/// A connected socket.
pub(super) struct Connection {
    socket: OwnedFd,
}

impl Connection {
    /// Connects to whoever listens at `path`, now or not at all.
    pub(super) fn open(path: &Path) -> Result<Self, PeerError> {
        let nobody = |source: Errno| PeerError::Nobody {
            path: path.to_path_buf(),
            source: source.into(),
        };
        let address = SocketAddrUnix::new(path).map_err(nobody)?;
        // Not blocking: a listener with a full backlog would keep the caller for as long as it likes.
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .map_err(nobody)?;
        rustix::net::connect(&socket, &address).map_err(nobody)?;
        Ok(Self { socket })
    }

    /// Takes over a connected socket.
    pub(super) fn from_socket(socket: OwnedFd) -> Result<Self, PeerError> {
        use rustix::net::sockopt::{socket_domain, socket_type};
        let unix = socket_domain(&socket) == Ok(AddressFamily::UNIX);
        let stream = socket_type(&socket) == Ok(SocketType::STREAM);
        if !unix || !stream || rustix::net::getpeername(&socket).is_err() {
            return Err(PeerError::NotASocket);
        }
        Ok(Self { socket })
    }

    /// Both ends of a new connection.
    pub(super) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (socket, other) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Self { socket }, other))
    }

    /// Ends the connection for both sides; the descriptor stays until this is dropped.
    pub(super) fn shut_down(&self) {
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }

    /// Sends a message with `fds`.
    pub(super) fn send(
        &self,
        request: Request,
        message: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<(), PeerError> {
        self.send_bytes(name(request), message, fds, deadline)
    }

    /// Sends bytes, the first of which carries `fds`.
    pub(super) fn send_bytes(
        &self,
        request: &'static str,
        message: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<(), PeerError> {
        let mut rest = message;
        let mut fds = fds;
        while !rest.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(PeerError::Io {
                    request,
                    source: io::ErrorKind::InvalidInput.into(),
                });
            }
            let sent = rustix::net::sendmsg(
                &self.socket,
                &[IoSlice::new(rest)],
                &mut ancillary,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            );
            match sent {
                Ok(sent) => {
                    rest = rest.get(sent..).unwrap_or_default();
                    fds = &[];
                }
                Err(e) => self.wait_or(e, request, PollFlags::OUT, deadline)?,
            }
        }
        Ok(())
    }

    /// Reads the reply to `request`: its whole payload, which has `payload.len()` bytes.
    pub(super) fn reply(
        &self,
        request: Request,
        payload: &mut [u8],
        deadline: Deadline,
    ) -> Result<(), PeerError> {
        let header = self.header(name(request), deadline)?;
        header
            .replies_to(request, payload.len())
            .map_err(|source| PeerError::Malformed {
                request: name(request),
                source,
            })?;
        self.read(name(request), payload, deadline)
    }

    /// Reads the header of whatever comes next.
    pub(super) fn header(
        &self,
        request: &'static str,
        deadline: Deadline,
    ) -> Result<Header, PeerError> {
        let mut header = [0; HEADER];
        self.read(request, &mut header, deadline)?;
        Ok(Header::read(&header))
    }

    fn read(
        &self,
        request: &'static str,
        data: &mut [u8],
        deadline: Deadline,
    ) -> Result<(), PeerError> {
        let mut rest = data;
        while !rest.is_empty() {
            match rustix::net::recv(&self.socket, &mut *rest, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(PeerError::Closed),
                Ok((_, read)) => rest = rest.get_mut(read..).unwrap_or_default(),
                Err(e) => self.wait_or(e, request, PollFlags::IN, deadline)?,
            }
        }
        Ok(())
    }

    /// Waits for the socket if that is what `error` asks for.
    fn wait_or(
        &self,
        error: Errno,
        request: &'static str,
        events: PollFlags,
        deadline: Deadline,
    ) -> Result<(), PeerError> {
        match error {
            Errno::INTR => return Ok(()),
            Errno::AGAIN => {}
            Errno::PIPE | Errno::CONNRESET => return Err(PeerError::Closed),
            source => {
                return Err(PeerError::Io {
                    request,
                    source: source.into(),
                });
            }
        }
        let left = deadline.left();
        if left.is_zero() {
            return Err(PeerError::Timeout { request });
        }
        let left = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(&self.socket, events)], Some(&left)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(source) => Err(PeerError::Io {
                request,
                source: source.into(),
            }),
        }
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sends `payload` and reads a reply of `N` bytes.
pub(super) fn ask<const N: usize>(
    connection: &Connection,
    request: Request,
    payload: &Payload,
    deadline: Deadline,
) -> Result<[u8; N], PeerError> {
    connection.send(request, &payload.message(request, false), &[], deadline)?;
    let mut reply = [0; N];
    connection.reply(request, &mut reply, deadline)?;
    Ok(reply)
}

/// A request as the protocol's text names it.
pub(super) fn name(request: Request) -> &'static str {
    match request {
        Request::GetFeatures => "GET_FEATURES",
        Request::SetFeatures => "SET_FEATURES",
        Request::SetOwner => "SET_OWNER",
        Request::SetMemTable => "SET_MEM_TABLE",
        Request::SetVringNum => "SET_VRING_NUM",
        Request::SetVringAddr => "SET_VRING_ADDR",
        Request::SetVringBase => "SET_VRING_BASE",
        Request::GetVringBase => "GET_VRING_BASE",
        Request::SetVringKick => "SET_VRING_KICK",
        Request::SetVringCall => "SET_VRING_CALL",
        Request::GetProtocolFeatures => "GET_PROTOCOL_FEATURES",
        Request::SetProtocolFeatures => "SET_PROTOCOL_FEATURES",
        Request::GetQueueNum => "GET_QUEUE_NUM",
        Request::SetVringEnable => "SET_VRING_ENABLE",
        Request::SetBackendReqFd => "SET_BACKEND_REQ_FD",
        Request::GetConfig => "GET_CONFIG",
        Request::SetConfig => "SET_CONFIG",
        Request::GetMaxMemSlots => "GET_MAX_MEM_SLOTS",
        Request::AddMemReg => "ADD_MEM_REG",
        Request::RemMemReg => "REM_MEM_REG",
    }
}
