//! The limits of one data path: so many bytes and so many operations a second.

use crate::limit::RateLimit;

/// What a data path may do; `None` is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    pub bytes: Option<RateLimit>,
    /// Operations: requests of a disk, packets of a network device.
    pub ops: Option<RateLimit>,
}
