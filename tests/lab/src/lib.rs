//! The lab: an emulated host (QEMU's TCG with nested virtualisation) in which KVM is real, seen from
//! the machine that starts it. It sees that machine's root read-only under a writable overlay, runs
//! one command there and hands back its output as it comes, and its exit status.
//!
//! ```text
//! LabSpec ──▶ initramfs (cpio + modules + lab-init) ──▶ QEMU ──▶ Outcome
//!                                                        │ virtio-serial: ctl, out, err, in
//!                                                        │ 9p: this root, the output folder
//! ```
//! [`run`] is the whole of it. The half that runs inside is the binary `lab-init` of this package;
//! what the two say to each other is in [`wire`].
#![allow(
    clippy::indexing_slicing,
    reason = "test equipment: it sees no guest-controlled data"
)]

pub mod cpio;
mod initramfs;
mod modules;
mod qemu;
mod session;
mod spec;
pub mod wire;

pub use modules::{ModulesError, load_order};
pub use session::{LabError, Outcome, Streams, run};
pub use spec::{Arch, Kit, LabSpec, SpecError};
