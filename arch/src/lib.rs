//! Architectures: where things sit in a guest, what its CPUs look like and what its firmware
//! tables say.
//!
//! Each architecture is a module with a *pure half* (plans: values in, values out; no KVM, no
//! I/O; compiled and tested on every host) and a thin *KVM half* named `host`, which applies the
//! plans and exists only on a host of that architecture.
//!
//! Order of use, all on the control thread: plan the memory map, the topology and the MTRRs;
//! probe the host; prepare the VM; describe the machine in tables and write the blobs to guest
//! RAM; prepare each vCPU before its first run.

mod blob;
mod span;
pub mod x86_64;

pub use blob::{BlobArea, BlobAreaError, GuestBlob};
pub use span::Span;
