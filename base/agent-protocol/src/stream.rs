//! Streams: connections that carry a process's bytes and nothing else.
//!
//! The host connects to [`STREAM_PORT`] and sends a preamble: eight bytes that say what this is, and the
//! number that a request names (little-endian). All that follows, both ways, is the process's. The end of
//! a direction is a half-close.

/// Where the agent listens for requests.
pub const REQUEST_PORT: u32 = 1024;
/// Where the agent listens for streams.
pub const STREAM_PORT: u32 = 1025;
/// Where the host listens for the agent's call, if it says `agent.ready=vsock:1026` on the kernel's command
/// line: the agent connects as soon as it listens, says nothing, and keeps the connection open as long as it
/// lives. So nobody has to try.
pub const READY_PORT: u32 = 1026;

const MAGIC: [u8; 8] = *b"TSTREAM1";
/// Bytes of a preamble.
pub const PREAMBLE: usize = 16;

/// What a stream begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// The number a request names, not 0.
    pub number: u64,
}

impl Preamble {
    /// On the wire.
    pub fn to_bytes(self) -> [u8; PREAMBLE] {
        let mut bytes = [0; PREAMBLE];
        let (magic, number) = bytes.split_at_mut(MAGIC.len());
        magic.copy_from_slice(&MAGIC);
        number.copy_from_slice(&self.number.to_le_bytes());
        bytes
    }

    /// Nothing if these bytes are no preamble.
    pub fn from_bytes(bytes: &[u8; PREAMBLE]) -> Option<Self> {
        let number = bytes.strip_prefix(&MAGIC)?;
        let number = u64::from_le_bytes(number.try_into().ok()?);
        (number != 0).then_some(Self { number })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preambles_round_trip_and_strangers_are_known() {
        let preamble = Preamble {
            number: 0x1234_5678_9abc,
        };
        assert_eq!(Preamble::from_bytes(&preamble.to_bytes()), Some(preamble));
        assert_eq!(Preamble::from_bytes(b"GET / HTTP/1.1\r\n"), None);
        assert_eq!(
            Preamble::from_bytes(&Preamble { number: 0 }.to_bytes()),
            None
        );
    }
}
