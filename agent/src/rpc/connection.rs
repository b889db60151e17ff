//! One connection: bytes in, frames out of them; frames in, bytes out.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use prost::Message;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use testudo_agent_protocol::envelope::Request;
use testudo_agent_protocol::{Call, Frame, FrameReader, Kind, SERVICE, code, refusal};

use crate::poll::{READ, READ_WRITE};

/// Bytes of answers that may wait; a client that lets more pile up is cut off.
const MOST_UNSENT: usize = 16 << 20;
/// Answers that wait stop requests from being read.
const ENOUGH_UNSENT: usize = 1 << 20;
/// Requests of one connection that are not answered yet.
const MOST_UNDER_WAY: usize = 1024;
/// Read at once.
const READ_SIZE: usize = 64 * 1024;

/// A request as far as it could be read.
pub(crate) type Incoming = Call;

pub(super) struct Connection {
    socket: OwnedFd,
    reader: FrameReader,
    out: Vec<u8>,
    sent: usize,
    under_way: usize,
}

impl Connection {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            reader: FrameReader::default(),
            out: Vec::new(),
            sent: 0,
            under_way: 0,
        }
    }

    /// Reads and writes what can be; gives requests, and whether to go on.
    pub(super) fn turn(&mut self) -> (Vec<(u32, Incoming)>, bool) {
        let mut requests = Vec::new();
        if !self.flush() {
            return (requests, false);
        }
        if self.held_up() {
            return (requests, true);
        }
        let mut bytes = vec![0; READ_SIZE];
        match rustix::net::recv(&self.socket, &mut bytes[..], RecvFlags::empty()) {
            Ok((0, _)) => return (requests, false),
            Ok((length, _)) => self.reader.push(bytes.get(..length).unwrap_or_default()),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => return (requests, false),
        }
        drop(bytes);
        loop {
            match self.reader.next_frame() {
                Ok(None) => return (requests, true),
                Ok(Some(frame)) => {
                    self.under_way = self.under_way.saturating_add(1);
                    match self.request(&frame) {
                        Ok(call) => requests.push((frame.stream, call)),
                        Err(refusal) => {
                            if !self.send(&refusal) {
                                return (requests, false);
                            }
                        }
                    }
                }
                Err(error) => {
                    log::warn!("a client sent {error}: its connection is closed");
                    return (requests, false);
                }
            }
        }
    }

    /// Reads a request, or says why it cannot be.
    fn request(&self, frame: &Frame) -> Result<Call, Frame> {
        let refuse = |code, why: &str| refusal(frame.stream, code, why);
        if frame.kind != Kind::Request {
            return Err(refuse(code::INVALID, "only requests come this way"));
        }
        if self.under_way > MOST_UNDER_WAY {
            let why = format!("{MOST_UNDER_WAY} requests wait for their answers already");
            return Err(refuse(code::EXHAUSTED, &why));
        }
        let request = Request::decode(frame.payload.as_slice())
            .map_err(|e| refuse(code::INVALID, &format!("not a ttrpc request: {e}")))?;
        if request.service != SERVICE {
            let why = format!("this is {SERVICE}; there is no {:?} here", request.service);
            return Err(refuse(code::UNIMPLEMENTED, &why));
        }
        match Call::decode(&request.method, &request.payload) {
            None => {
                let why = format!("there is no request {:?}", request.method);
                Err(refuse(code::UNIMPLEMENTED, &why))
            }
            Some(Err(e)) => {
                let why = format!("{} cannot be read: {e}", request.method);
                Err(refuse(code::INVALID, &why))
            }
            Some(Ok(call)) => Ok(call),
        }
    }

    /// Queues an answer and sends what can be; false if the connection is of no more use.
    pub(super) fn send(&mut self, frame: &Frame) -> bool {
        self.under_way = self.under_way.saturating_sub(1);
        self.out.extend_from_slice(&frame.to_bytes());
        if !self.flush() {
            return false;
        }
        if self.unsent() > MOST_UNSENT {
            log::warn!("a client takes no answers: its connection is closed");
            return false;
        }
        true
    }

    fn flush(&mut self) -> bool {
        while let Some(rest) = self.out.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match rustix::net::send(&self.socket, rest, SendFlags::NOSIGNAL) {
                Ok(length) => self.sent = self.sent.saturating_add(length),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return true,
                Err(_) => return false,
            }
        }
        // An idle connection keeps no buffer.
        self.out = Vec::new();
        self.sent = 0;
        true
    }

    fn held_up(&self) -> bool {
        self.unsent() > ENOUGH_UNSENT
    }

    /// Bytes that wait to be sent.
    pub(super) fn unsent(&self) -> usize {
        self.out.len().saturating_sub(self.sent)
    }

    /// What to be woken for.
    pub(super) fn wants(&self) -> EventFlags {
        match (self.unsent() > 0, self.held_up()) {
            (true, true) => EventFlags::OUT,
            (true, false) => READ_WRITE,
            (false, _) => READ,
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
