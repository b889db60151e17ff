//! Values of flags: what a person may write, as types that hold nothing else.
//!
//! Pure: nothing here looks at the host, so that the same words mean the same everywhere. All of it is
//! fuzzed (`tests/fuzz`, target `cli_values`).

mod limits;
mod mounts;
mod names;
mod network;

pub use limits::{Cpus, Signal, Size, Ulimit, UnknownSignal};
pub use mounts::{Tmpfs, Volume, VolumeSource};
pub use names::{Detach, EnvWord, KeyValue, PodName, SecurityOption, UserWord};
pub use network::{NetWord, Publish, Transport};
