//! Any bytes over a connection to the guest's agent, cut anywhere: frames, the requests in them, and the
//! preamble of a stream. What reads must write and read back as the same, however it was cut.
//!
//! Input: a byte that says how the connection is cut, and what comes over it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use testudo_agent_protocol::envelope::{Request, Response};
use testudo_agent_protocol::{
    Call, Frame, FrameReader, HEADER, Kind, MAX_PAYLOAD, PREAMBLE, Preamble,
};

fn frames(data: &[u8], piece: usize) -> Vec<Frame> {
    let mut reader = FrameReader::default();
    let mut all = Vec::new();
    for piece in data.chunks(piece) {
        reader.push(piece);
        loop {
            match reader.next_frame() {
                Ok(Some(frame)) => all.push(frame),
                Ok(None) => break,
                // There is no telling where the next one would begin.
                Err(_) => return all,
            }
        }
        assert!(reader.pending() <= MAX_PAYLOAD + HEADER + piece.len());
    }
    all
}

fuzz_target!(|data: &[u8]| {
    let Some((cut, data)) = data.split_first() else {
        return;
    };
    let whole = frames(data, data.len().max(1));
    let cut = frames(data, usize::from(*cut).max(1));
    assert_eq!(whole, cut);
    for frame in &whole {
        let again = frames(&frame.to_bytes(), usize::MAX);
        assert_eq!(again.as_slice(), std::slice::from_ref(frame));
        match frame.kind {
            Kind::Request => {
                let Ok(request) = Request::decode(frame.payload.as_slice()) else {
                    continue;
                };
                if let Some(Ok(call)) = Call::decode(&request.method, &request.payload) {
                    assert_eq!(call.name(), request.method);
                }
                for name in Call::NAMES {
                    let _ = Call::decode(name, &request.payload);
                }
            }
            Kind::Response => {
                let _ = Response::decode(frame.payload.as_slice());
            }
        }
    }
    if let Some(bytes) = data.first_chunk::<PREAMBLE>()
        && let Some(preamble) = Preamble::from_bytes(bytes)
    {
        assert_eq!(&preamble.to_bytes(), bytes);
    }
});
