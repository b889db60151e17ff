//! VM tests: real guests under `testudo-vmm`, on a host whose KVM is real. `cargo xtask` boots the lab
//! and runs the binary `vm-tests` in it; on a machine with a usable `/dev/kvm` it runs as it is.
//!
//! ```text
//! batches ─▶ runner ─▶ test(&Ctx) ─▶ Launch ─▶ Running ─▶ Finished
//!              │                        │ testudo-vmm run …; output captured as it comes
//!              └ PASS/FAIL/SKIP lines, JUnit XML, exit status
//! ```
//! A test is a function in a table ([`batch::Test`]). It runs on a thread of its own; when its time
//! is over its child processes are killed, and whatever it left behind is killed in any case.
#![allow(
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::panic,
    reason = "test equipment: a panic is a failed test, and it reports on stdout"
)]

mod agent;
pub mod batch;
mod capture;
mod context;
mod facts;
mod journal;
mod junit;
mod launch;
mod net_backend;
mod outcome;
mod pattern;
mod pod;
pub mod runner;
mod running;
mod smaps;
mod tests;

pub use context::{Ctx, Forms, Images, Kernel};
pub use facts::Facts;
pub use launch::Launch;
pub use outcome::{Outcome, Verdict};
pub use running::{Finished, Running};
pub use smaps::Pss;
