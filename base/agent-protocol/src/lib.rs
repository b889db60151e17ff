//! What the host and the agent in a guest say to each other.
//!
//! ```text
//! host                                    guest
//!  requests ── vsock, port REQUEST_PORT ──▶ agent      ttrpc: frames of protobuf messages
//!  bytes    ◀─ vsock, port STREAM_PORT ──▶ a process   a preamble, then the bytes themselves
//! ```
//! The messages are in `proto/`; their Rust is in `src/generated`, made by this crate's test. Frames are
//! ttrpc's, so that any client of it can talk to an agent.

mod capability;
mod client;
mod frame;
mod generated;
mod stream;

pub use calls::{Call, SERVICE};
pub use capability::CAPABILITIES;
pub use client::{CallError, Client, connect_through};
pub use frame::{
    Frame, FrameError, FrameReader, HEADER, Kind, MAX_PAYLOAD, code, refusal, request, response,
};
pub use generated::envelope;
pub use generated::messages::*;
pub use stream::{PREAMBLE, Preamble, READY_PORT, REQUEST_PORT, STREAM_PORT};

/// Meaning of the requests; raised when one changes its meaning.
pub const API: u32 = 1;

/// A request by its type.
pub trait Rpc: prost::Message + Default {
    /// Its name.
    const METHOD: &'static str;
    /// What answers it.
    type Response: prost::Message + Default;
}
