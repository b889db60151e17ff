//! The bytes of processes: pipes and terminals on one side, streams of the host on the other.
//!
//! ```text
//!  host ══ stream ══ relay ══ pipe or terminal ══ process
//! ```
//! A stream is a connection of its own, so that the kernel's flow control reaches from the process to
//! whoever reads at the other end: a relay holds at most one buffer that its taker has not taken, and
//! only while it cannot be taken. The end of a direction is passed on as such, never as data.

mod pipes;
pub(crate) mod relay;
mod streams;

pub(crate) use pipes::{Ends, Pipes};
pub(crate) use relay::Relays;
pub(crate) use streams::{Direction, Streams, Want};
