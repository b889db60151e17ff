//! The limits of one disk, shared by all the threads that serve it.
//!
//! The buckets are under a lock that is taken only while there are limits. Each worker has a timer
//! of its own: one timer for all would wake one of them and leave the others waiting.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::limit::{RateLimit, TokenBucket};
use crate::limiter::Limits;

pub(super) struct Throttle {
    limited: AtomicBool,
    buckets: Mutex<Buckets>,
    epoch: Instant,
}

struct Buckets {
    bytes: Option<TokenBucket>,
    ops: Option<TokenBucket>,
}

impl Buckets {
    fn new(limits: Limits, now: Duration) -> Self {
        let bucket = |limit: Option<RateLimit>| limit.map(|limit| TokenBucket::new(limit, now));
        Self {
            bytes: bucket(limits.bytes),
            ops: bucket(limits.ops),
        }
    }
}

impl Throttle {
    /// Full buckets.
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limited: AtomicBool::new(limits != Limits::default()),
            buckets: Mutex::new(Buckets::new(limits, Duration::ZERO)),
            epoch: Instant::now(),
        }
    }

    /// New limits, with full buckets. Whoever waits has to be woken.
    pub(super) fn set(&self, limits: Limits) {
        *self.lock() = Buckets::new(limits, self.epoch.elapsed());
        let limited = limits != Limits::default();
        self.limited.store(limited, Ordering::Release);
    }

    /// Takes what one request of `bytes` costs; or says how long to wait, and takes nothing.
    pub(super) fn admit(&self, bytes: u64) -> Result<(), Duration> {
        if !self.limited.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut guard = self.lock();
        let Buckets {
            bytes: by_bytes,
            ops,
        } = &mut *guard;
        let now = self.epoch.elapsed();
        let wait = [(&mut *by_bytes, bytes), (&mut *ops, 1)]
            .into_iter()
            .filter_map(|(bucket, want)| Some(bucket.as_mut()?.wait_for(want, now)))
            .max()
            .unwrap_or_default();
        if !wait.is_zero() {
            return Err(wait);
        }
        for (bucket, want) in [(by_bytes, bytes), (ops, 1)] {
            if let Some(bucket) = bucket {
                bucket.take_all(want, now);
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Buckets> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_limits_hold_for_all_who_share_them() {
        let throttle = Throttle::new(Limits {
            bytes: RateLimit::new(1, 4096),
            ops: RateLimit::new(1, 3),
        });
        std::thread::scope(|scope| {
            let one = scope.spawn(|| throttle.admit(4096));
            one.join().unwrap().unwrap();
        });
        assert!(throttle.admit(4096).unwrap_err() > Duration::from_secs(4000));
        throttle.admit(0).unwrap();
        throttle.admit(0).unwrap();
        assert!(throttle.admit(0).unwrap_err() > Duration::from_millis(500));
        throttle.set(Limits::default());
        throttle.admit(u64::MAX).unwrap();
    }
}
