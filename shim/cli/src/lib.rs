//! `testudo`: runs containers in small virtual machines, with no daemon.
//!
//! ```text
//!  args ─▶ plan ─▶ Pod ─▶ launch ─▶ supervise ─▶ testudo-vmm, agent        testudo run
//!            ▲                          ▲ link
//!  config ───┘   image, values          └── session, commands               everything else
//! ```
//! A pod is a virtual machine with one container. What is known of it is on disk (`state`); whoever runs a
//! command reads that, and asks the pod's supervisor or its agent directly.

pub mod args;
mod clock;
pub mod commands;
pub mod config;
pub mod container;
pub mod guest;
pub mod image;
mod launch;
pub mod link;
mod machine;
mod os;
pub mod output;
pub mod places;
pub mod plan;
pub mod pod;
mod session;
pub mod state;
pub mod supervise;
pub mod terminal;
pub mod values;
