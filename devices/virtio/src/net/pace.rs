//! The rate limit of one direction, shared by the threads that serve it.
//!
//! A frame's size is known when it has gone, so a frame goes when nothing is owed and is charged
//! afterwards. Each worker has a timer of its own to wait with. Any thread may change the limits.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::limit::{RateLimit, TokenBucket};
use crate::limiter::Limits;

/// The buckets of one direction.
pub(super) struct Pace {
    /// Whether there is any limit: what a worker asks per frame takes no lock otherwise.
    limited: AtomicBool,
    buckets: Mutex<Buckets>,
    epoch: Instant,
}

#[derive(Default)]
struct Buckets {
    bytes: Option<TokenBucket>,
    frames: Option<TokenBucket>,
}

impl Pace {
    pub(super) fn new(limits: Limits) -> Self {
        let pace = Self {
            limited: AtomicBool::new(false),
            buckets: Mutex::default(),
            epoch: Instant::now(),
        };
        pace.set(limits);
        pace
    }

    fn buckets(&self) -> MutexGuard<'_, Buckets> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// New limits, with full buckets.
    pub(super) fn set(&self, limits: Limits) {
        let now = self.epoch.elapsed();
        let bucket = |limit: Option<RateLimit>| limit.map(|limit| TokenBucket::new(limit, now));
        let mut buckets = self.buckets();
        buckets.bytes = bucket(limits.bytes);
        buckets.frames = bucket(limits.ops);
        let limited = buckets.bytes.is_some() || buckets.frames.is_some();
        self.limited.store(limited, Ordering::Release);
    }

    /// How long the next frame has to wait; `None` if it may go now.
    pub(super) fn wait(&self) -> Option<Duration> {
        if !self.limited.load(Ordering::Acquire) {
            return None;
        }
        let now = self.epoch.elapsed();
        let mut buckets = self.buckets();
        let wait = |bucket: &mut Option<TokenBucket>| {
            let bucket = bucket.as_mut();
            bucket.map_or(Duration::ZERO, |bucket| bucket.wait_for(1, now))
        };
        let longest = wait(&mut buckets.bytes).max(wait(&mut buckets.frames));
        (!longest.is_zero()).then_some(longest)
    }

    /// A frame of `bytes` has gone.
    pub(super) fn charge(&self, bytes: u64) {
        if !self.limited.load(Ordering::Acquire) {
            return;
        }
        let now = self.epoch.elapsed();
        let mut buckets = self.buckets();
        if let Some(bucket) = &mut buckets.bytes {
            bucket.charge(bytes, now);
        }
        if let Some(bucket) = &mut buckets.frames {
            bucket.charge(1, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_wait_until_the_last_one_is_paid_for() {
        let none = Pace::new(Limits::default());
        none.charge(u64::MAX);
        assert_eq!(none.wait(), None);
        let pace = Pace::new(Limits {
            bytes: RateLimit::new(1000, 1000),
            ops: None,
        });
        pace.charge(900);
        assert_eq!(pace.wait(), None);
        pace.charge(10_000);
        let wait = pace.wait().unwrap();
        assert!(wait > Duration::from_secs(9), "{wait:?}");
        pace.set(Limits {
            bytes: None,
            ops: RateLimit::new(1, 2),
        });
        pace.charge(1 << 40);
        assert_eq!(pace.wait(), None);
        pace.charge(0);
        assert!(pace.wait().is_some());
        pace.set(Limits::default());
        assert_eq!(pace.wait(), None);
    }
}
