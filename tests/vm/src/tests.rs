//! The tests, by what they are about.

pub(crate) mod agent;
pub(crate) mod bad_input;
pub(crate) mod balloon;
pub(crate) mod blk;
pub(crate) mod boot;
pub(crate) mod config;
pub(crate) mod console;
pub(crate) mod control;
pub(crate) mod cpus;
pub(crate) mod ending;
pub(crate) mod fs;
pub(crate) mod harness;
pub(crate) mod isolation;
pub(crate) mod mem;
pub(crate) mod memory;
pub(crate) mod net;
pub(crate) mod pmem;
pub(crate) mod ports;
pub(crate) mod run;
pub(crate) mod userland;
pub(crate) mod vhost_user;
pub(crate) mod vsock;
pub(crate) mod watchdog;

use std::time::Duration;

/// For a guest to get somewhere: seconds on an idle machine.
pub(crate) const SOON: Duration = Duration::from_secs(60);
