//! What a VM shall be: from words ([`Config`]) to a checked [`Spec`].

mod check;
mod config;
mod cpulist;
mod size;
mod source;

pub use check::{Affinity, Boot, Cpus, Memory, Spec, SpecError};
pub use config::{
    AffinityConfig, BootConfig, Config, ConsoleConfig, ConsoleError, CpusConfig, MemoryConfig,
    OnPanic, OnReset, ParseError, Protocol, Seccomp, TopologyConfig,
};
pub use cpulist::{CpuList, CpuListError};
pub use size::{ByteSize, SizeError};
pub(crate) use source::inherited;
pub use source::{Source, SourceError};
