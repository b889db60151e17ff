//! The limits of one data path: so many bytes and so many operations a second.
//!
//! Owned by a worker. A request that must wait sets a timer, whose expiry is an event of the
//! worker's loop: look at the queue again then. Limits may change while requests wait.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use crate::limit::{RateLimit, TokenBucket};
use crate::timer::Timer;

/// What a data path may do; `None` is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    pub bytes: Option<RateLimit>,
    /// Operations: requests of a disk, packets of a network device.
    pub ops: Option<RateLimit>,
}

/// Limits at work.
pub(crate) struct Limiter {
    bytes: Option<TokenBucket>,
    ops: Option<TokenBucket>,
    timer: Timer,
    epoch: Instant,
}

impl Limiter {
    /// Full buckets.
    pub(crate) fn new(limits: Limits) -> io::Result<Self> {
        let mut limiter = Self {
            bytes: None,
            ops: None,
            timer: Timer::new()?,
            epoch: Instant::now(),
        };
        limiter.set(limits);
        Ok(limiter)
    }

    /// New limits, with full buckets. Look at the queue again afterwards.
    pub(crate) fn set(&mut self, limits: Limits) {
        let now = self.epoch.elapsed();
        let bucket = |limit: Option<RateLimit>| limit.map(|limit| TokenBucket::new(limit, now));
        self.bytes = bucket(limits.bytes);
        self.ops = bucket(limits.ops);
    }

    /// Whether one operation of `bytes` may go now. If not, the timer is set.
    pub(crate) fn admit(&mut self, bytes: u64) -> bool {
        if self.bytes.is_none() && self.ops.is_none() {
            return true;
        }
        let now = self.epoch.elapsed();
        let wait = |bucket: &mut Option<TokenBucket>, want| {
            bucket
                .as_mut()
                .map_or(Duration::ZERO, |b| b.wait_for(want, now))
        };
        let wait = wait(&mut self.bytes, bytes).max(wait(&mut self.ops, 1));
        if !wait.is_zero() {
            if let Err(e) = self.timer.set(wait) {
                log::error!("timer of a rate limit: {e}");
            }
            return false;
        }
        let take = |bucket: &mut Option<TokenBucket>, want| {
            bucket.as_mut().is_none_or(|b| b.take_all(want, now))
        };
        take(&mut self.bytes, bytes);
        take(&mut self.ops, 1);
        true
    }

    /// Takes an expiry of the timer, if there is one.
    pub(crate) fn expired(&self) {
        self.timer.take();
    }
}

impl AsRawFd for Limiter {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_limits_hold_and_can_be_lifted() {
        let limits = Limits {
            bytes: RateLimit::new(1, 4096),
            ops: RateLimit::new(1, 3),
        };
        let mut limiter = Limiter::new(limits).unwrap();
        assert!(limiter.admit(4096));
        assert!(!limiter.admit(4096), "no bytes left");
        assert!(limiter.admit(0));
        assert!(limiter.admit(0));
        assert!(!limiter.admit(0), "no operations left");
        limiter.set(Limits::default());
        assert!(limiter.admit(u64::MAX));
        limiter.expired();
    }
}
