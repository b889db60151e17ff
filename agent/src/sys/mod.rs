//! System calls that no crate wraps, each in a module that says why its use is sound.

pub(crate) mod clone;
pub(crate) mod exec;
pub(crate) mod limits;
pub(crate) mod mount_attr;
pub(crate) mod namespace;
pub(crate) mod random;
pub(crate) mod signal;
pub(crate) mod spawn;
pub(crate) mod vsock;
