//! The control protocol of `testudo-vmm`: its messages and the socket that carries them.
//!
//! A client connects to a `SOCK_SEQPACKET` Unix socket. Each packet is one JSON message, and file
//! descriptors ride along by `SCM_RIGHTS`. A client sends [`Request`]s and gets one [`Reply`] for
//! each, in the order in which they are finished; once it has asked for events it also gets
//! [`Event`]s in between. Requests are idempotent: pausing a paused VM succeeds.

pub mod control;
pub mod socket;

pub use control::{
    Counters, CpuState, Direction, Ended, Event, Failure, FailureKind, Info, LimitsSpec,
    MemoryState, MessageError, Outcome, Phase, RateSpec, Reply, Request, ServerMessage, Verb,
};
pub use socket::{BindError, ConnectError, Connection, Listener, MAX_FDS, MAX_MESSAGE, Received};
