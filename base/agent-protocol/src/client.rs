//! A client that blocks: one connection, as many requests under way as its owner likes.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use prost::Message;
use thiserror::Error;

use crate::envelope::{Response, Status};
use crate::frame::{FrameReader, Kind, request};
use crate::{FrameError, Rpc};

/// A request was not answered with what was asked for.
#[derive(Debug, Error)]
pub enum CallError {
    /// The connection broke.
    #[error("the connection to the agent broke during {method}")]
    Broken {
        /// The request.
        method: &'static str,
        /// How.
        #[source]
        source: io::Error,
    },
    /// The agent hung up.
    #[error("the agent closed the connection during {method}")]
    Closed {
        /// The request.
        method: &'static str,
    },
    /// The agent refused, or failed.
    #[error("{method}: {message}")]
    Refused {
        /// The request.
        method: &'static str,
        /// One of [`code`](crate::code).
        code: i32,
        /// Why.
        message: String,
    },
    /// What came back is no ttrpc.
    #[error("the answer to {method} cannot be read: {why}")]
    Garbled {
        /// The request.
        method: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

impl CallError {
    /// The agent's code, if it was the agent that refused.
    pub fn code(&self) -> Option<i32> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }
}

/// One connection to an agent.
pub struct Client<S> {
    socket: S,
    reader: FrameReader,
    next: u32,
    /// Answers that came while another was awaited.
    early: BTreeMap<u32, Response>,
}

/// A request that has been sent.
#[must_use = "its answer waits"]
pub struct Pending<R> {
    stream: u32,
    request: std::marker::PhantomData<R>,
}

impl<S: Read + Write> Client<S> {
    /// Over a connected socket.
    pub fn new(socket: S) -> Self {
        Self {
            socket,
            reader: FrameReader::default(),
            next: 1,
            early: BTreeMap::new(),
        }
    }

    /// Sends a request and waits for its answer.
    pub fn call<R: Rpc>(&mut self, message: &R) -> Result<R::Response, CallError> {
        let pending = self.send(message)?;
        self.receive(pending)
    }

    /// Sends a request.
    pub fn send<R: Rpc>(&mut self, message: &R) -> Result<Pending<R>, CallError> {
        let stream = self.next;
        self.next = self.next.wrapping_add(2);
        self.socket
            .write_all(&request(stream, message).to_bytes())
            .map_err(|source| CallError::Broken {
                method: R::METHOD,
                source,
            })?;
        Ok(Pending {
            stream,
            request: std::marker::PhantomData,
        })
    }

    /// Waits for the answer to a request that was sent.
    #[expect(clippy::needless_pass_by_value, reason = "an answer is taken once")]
    pub fn receive<R: Rpc>(&mut self, pending: Pending<R>) -> Result<R::Response, CallError> {
        let method = R::METHOD;
        let response = self.response(pending.stream, method)?;
        if let Some(Status { code, message }) = response.status.filter(|status| status.code != 0) {
            return Err(CallError::Refused {
                method,
                code,
                message,
            });
        }
        R::Response::decode(response.payload.as_slice()).map_err(|e| CallError::Garbled {
            method,
            why: e.to_string(),
        })
    }

    /// The socket.
    pub fn socket(&self) -> &S {
        &self.socket
    }

    fn response(&mut self, stream: u32, method: &'static str) -> Result<Response, CallError> {
        let garbled = |why: String| CallError::Garbled { method, why };
        loop {
            if let Some(response) = self.early.remove(&stream) {
                return Ok(response);
            }
            while let Some(frame) = self
                .reader
                .next_frame()
                .map_err(|e: FrameError| garbled(e.to_string()))?
            {
                if frame.kind == Kind::Response {
                    let response = Response::decode(frame.payload.as_slice())
                        .map_err(|e| garbled(e.to_string()))?;
                    self.early.insert(frame.stream, response);
                }
            }
            if self.early.contains_key(&stream) {
                continue;
            }
            let mut bytes = [0; 16 * 1024];
            match self.socket.read(&mut bytes) {
                Ok(0) => return Err(CallError::Closed { method }),
                Ok(length) => self.reader.push(bytes.get(..length).unwrap_or_default()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(CallError::Broken { method, source }),
            }
        }
    }
}

/// Asks the VMM at the other end of `socket` (its vsock device's Unix socket) for a connection to a port
/// of the guest; afterwards the socket is that connection.
pub fn connect_through<S: Read + Write>(socket: &mut S, port: u32) -> io::Result<()> {
    socket.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut line = Vec::new();
    // Byte by byte: what follows the line is the guest's.
    while line.len() < 64 {
        let mut byte = [0];
        if socket.read(&mut byte)? == 0 {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionRefused,
                format!("nobody listens on port {port} of the guest"),
            ));
        }
        if byte == *b"\n" {
            return if line.starts_with(b"OK ") {
                Ok(())
            } else {
                Err(io::Error::other(format!(
                    "the VMM answered {:?}",
                    String::from_utf8_lossy(&line)
                )))
            };
        }
        line.extend_from_slice(&byte);
    }
    Err(io::Error::other("the VMM's answer does not end"))
}
