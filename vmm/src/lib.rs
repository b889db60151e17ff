//! `testudo-vmm`: a container-optimised virtual machine monitor on KVM.
//!
//! ```text
//!   flags, JSON ─▶ spec::Config ─check─▶ spec::Spec ─┐
//!   /dev/kvm ───▶ host::Host ────────────────────────┴▶ plan::Plan ─build─▶ Machine ─▶ control
//!                                                       (pure, printable)      (owned by one thread)
//! ```
//! Threads: `ctl` (the main thread) owns the machine; `vcpu-N` run the guest and answer its
//! accesses; `io` serves the console and device queues. Each runs under a system call filter of
//! its own.

mod affinity;
mod board;
pub mod cli;
mod code;
mod console;
mod control;
pub mod devices;
pub mod heap;
pub mod host;
mod letters;
mod machine;
mod options;
pub mod plan;
pub mod run;
pub mod seccomp;
mod signals;
pub mod spec;
mod unix_path;
mod vcpu;
mod virtio;
mod watchdog;

pub use console::keep_terminal;
