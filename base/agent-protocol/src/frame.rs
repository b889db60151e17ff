//! ttrpc's frames: ten bytes of header and a protobuf message.
//!
//! ```text
//!  0        4          8      9       10
//!  | length | stream   | kind | flags | payload …     integers big-endian
//! ```
//! A stream is a request and its response; the client numbers them oddly, from 1. Streaming requests of
//! newer ttrpc are not used: bytes go over streams of their own.

use prost::Message;
use thiserror::Error;

use crate::envelope::{Request, Response, Status};
use crate::{Rpc, SERVICE};

/// Bytes of a header.
pub const HEADER: usize = 10;
/// Most bytes of a payload; ttrpc's own bound.
pub const MAX_PAYLOAD: usize = 4 << 20;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// [`Request`]
    Request,
    /// [`Response`]
    Response,
}

impl Kind {
    fn number(self) -> u8 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
        }
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Which request it belongs to.
    pub stream: u32,
    /// What it carries.
    pub kind: Kind,
    /// The message.
    pub payload: Vec<u8>,
}

/// These bytes are not frames; there is no telling where the next one would begin.
#[derive(Debug, Error, Clone, Copy, PartialEq, Eq)]
pub enum FrameError {
    /// Too long.
    #[error("a frame of {0} bytes; the longest allowed has {MAX_PAYLOAD}")]
    TooLong(u32),
    /// A kind nobody sends.
    #[error("a frame of kind {0}; known are 1 (request) and 2 (response)")]
    Kind(u8),
}

/// Cuts what arrives into frames. Holds at most one frame that is not complete and what one read brought.
#[derive(Debug, Default)]
pub struct FrameReader {
    bytes: Vec<u8>,
    /// How much of the front has been handed out.
    taken: usize,
}

impl FrameReader {
    /// Takes what has arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.taken > 0 {
            self.bytes.drain(..self.taken.min(self.bytes.len()));
            self.taken = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next complete frame.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let rest = self.bytes.get(self.taken..).unwrap_or_default();
        let Some((header, rest)) = rest.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let [l0, l1, l2, l3, s0, s1, s2, s3, kind, _flags] = *header;
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        let stream = u32::from_be_bytes([s0, s1, s2, s3]);
        let size = usize::try_from(length)
            .ok()
            .filter(|size| *size <= MAX_PAYLOAD)
            .ok_or(FrameError::TooLong(length))?;
        let kind = match kind {
            1 => Kind::Request,
            2 => Kind::Response,
            other => return Err(FrameError::Kind(other)),
        };
        let Some(payload) = rest.get(..size) else {
            return Ok(None);
        };
        let payload = payload.to_vec();
        self.taken = self.taken.saturating_add(HEADER).saturating_add(size);
        if self.taken >= self.bytes.len() {
            // An idle connection keeps no buffer.
            self.bytes = Vec::new();
            self.taken = 0;
        }
        Ok(Some(Frame {
            stream,
            kind,
            payload,
        }))
    }

    /// Bytes that wait.
    pub fn pending(&self) -> usize {
        self.bytes.len().saturating_sub(self.taken)
    }
}

impl Frame {
    /// On the wire.
    pub fn to_bytes(&self) -> Vec<u8> {
        let length = u32::try_from(self.payload.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(HEADER.saturating_add(self.payload.len()));
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(&self.stream.to_be_bytes());
        bytes.extend_from_slice(&[self.kind.number(), 0]);
        bytes.extend_from_slice(&self.payload);
        bytes
    }
}

/// Codes of a refusal, as gRPC numbers them.
pub mod code {
    /// The request's values cannot be.
    pub const INVALID: i32 = 3;
    /// It took too long.
    pub const DEADLINE: i32 = 4;
    /// There is no such thing.
    pub const NOT_FOUND: i32 = 5;
    /// There is one already.
    pub const EXISTS: i32 = 6;
    /// The policy refused.
    pub const DENIED: i32 = 7;
    /// A bound of the agent's is reached.
    pub const EXHAUSTED: i32 = 8;
    /// Not in the present state.
    pub const WRONG_STATE: i32 = 9;
    /// No such request, or this guest cannot do it.
    pub const UNIMPLEMENTED: i32 = 12;
    /// The guest failed.
    pub const INTERNAL: i32 = 13;
}

/// The frame of a request.
pub fn request<R: Rpc>(stream: u32, message: &R) -> Frame {
    let request = Request {
        service: SERVICE.into(),
        method: R::METHOD.into(),
        payload: message.encode_to_vec(),
        ..Request::default()
    };
    Frame {
        stream,
        kind: Kind::Request,
        payload: request.encode_to_vec(),
    }
}

/// The frame of an answer, given the encoded message.
pub fn response(stream: u32, payload: Vec<u8>) -> Frame {
    let response = Response {
        status: None,
        payload,
    };
    Frame {
        stream,
        kind: Kind::Response,
        payload: response.encode_to_vec(),
    }
}

/// The frame of a refusal.
pub fn refusal(stream: u32, code: i32, message: &str) -> Frame {
    let status = Status {
        code,
        message: message.into(),
    };
    let response = Response {
        status: Some(status),
        payload: Vec::new(),
    };
    Frame {
        stream,
        kind: Kind::Response,
        payload: response.encode_to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Call, HealthRequest};

    #[test]
    fn a_request_is_what_ttrpc_says() {
        let bytes = request(1, &HealthRequest {}).to_bytes();
        let mut expected = vec![0, 0, 0, 32, 0, 0, 0, 1, 1, 0];
        expected.extend_from_slice(b"\x0a\x16testudo.agent.v1.Agent\x12\x06Health");
        assert_eq!(bytes, expected);
    }

    #[test]
    fn too_long_and_unknown_frames_are_errors() {
        let mut reader = FrameReader::default();
        reader.push(&[0, 0x40, 0, 1, 0, 0, 0, 1, 1, 0]);
        assert_eq!(reader.next_frame(), Err(FrameError::TooLong(0x40_0001)));
        let mut reader = FrameReader::default();
        reader.push(&[0, 0, 0, 0, 0, 0, 0, 1, 3, 0]);
        assert_eq!(reader.next_frame(), Err(FrameError::Kind(3)));
    }

    #[test]
    fn every_request_has_a_name_and_reads_its_default() {
        for name in Call::NAMES {
            let call = Call::decode(name, &[])
                .expect("known")
                .expect("empty is a message");
            assert_eq!(call.name(), *name);
        }
        assert!(Call::decode("NoSuchThing", &[]).is_none());
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in(
            payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..8),
            cuts in proptest::collection::vec(1_usize..64, 1..50),
        ) {
            let frames: Vec<Frame> = payloads
                .into_iter()
                .zip(1_u32..)
                .map(|(payload, stream)| Frame { stream, kind: Kind::Request, payload })
                .collect();
            let wire: Vec<u8> = frames.iter().flat_map(Frame::to_bytes).collect();
            let mut reader = FrameReader::default();
            let (mut seen, mut rest, mut cuts) = (Vec::new(), wire.as_slice(), cuts.iter().cycle());
            while !rest.is_empty() {
                let (piece, more) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
                reader.push(piece);
                while let Some(frame) = reader.next_frame().unwrap() {
                    seen.push(frame);
                }
                rest = more;
            }
            prop_assert_eq!(seen, frames);
            prop_assert_eq!(reader.pending(), 0);
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut reader = FrameReader::default();
            reader.push(&bytes);
            while let Ok(Some(_)) = reader.next_frame() {}
        }
    }
}
