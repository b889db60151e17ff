//! A token bucket: so many units a second, with a burst.
//!
//! Pure: time is an argument. Tokens are kept in units times nanoseconds, so that no rounding
//! creates or loses any.

use std::time::Duration;

const NANOS: u128 = 1_000_000_000;

/// A configured limit; a rate or burst of 0 cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimit {
    per_second: u64,
    burst: u64,
}

impl RateLimit {
    /// `per_second` units on average and `burst` at once; `None` if either is 0.
    pub fn new(per_second: u64, burst: u64) -> Option<Self> {
        (per_second != 0 && burst != 0).then_some(Self { per_second, burst })
    }
}

/// The bucket of one limit.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    limit: RateLimit,
    /// Units × [`NANOS`].
    tokens: u128,
    /// Units × [`NANOS`] that were taken beyond what a full bucket holds.
    debt: u128,
    filled_at: Duration,
}

impl TokenBucket {
    /// A full bucket at `now`, a time since any fixed moment.
    pub fn new(limit: RateLimit, now: Duration) -> Self {
        Self {
            limit,
            tokens: u128::from(limit.burst).saturating_mul(NANOS),
            debt: 0,
            filled_at: now,
        }
    }

    fn fill(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.filled_at).as_nanos();
        let new = elapsed.saturating_mul(u128::from(self.limit.per_second));
        let full = u128::from(self.limit.burst).saturating_mul(NANOS);
        let paid = new.min(self.debt);
        self.debt = self.debt.saturating_sub(paid);
        let left = new.saturating_sub(paid);
        self.tokens = self.tokens.saturating_add(left).min(full);
        self.filled_at = self.filled_at.max(now);
    }

    /// Takes as many of `want` units as there are at `now`; returns how many.
    pub fn take(&mut self, want: u64, now: Duration) -> u64 {
        self.fill(now);
        let whole = self.tokens.checked_div(NANOS).unwrap_or(0);
        let taken = u64::try_from(whole).unwrap_or(u64::MAX).min(want);
        let spent = u128::from(taken).saturating_mul(NANOS);
        self.tokens = self.tokens.saturating_sub(spent);
        taken
    }

    /// Takes all of `want` units or none. More than the burst can be taken from a full bucket; the
    /// excess is paid off before it fills again.
    pub fn take_all(&mut self, want: u64, now: Duration) -> bool {
        self.fill(now);
        let wanted = u128::from(want).saturating_mul(NANOS);
        let full = u128::from(self.limit.burst).saturating_mul(NANOS);
        if self.debt != 0 || self.tokens < wanted.min(full) {
            return false;
        }
        self.debt = wanted.saturating_sub(self.tokens);
        self.tokens = self.tokens.saturating_sub(wanted);
        true
    }

    /// Takes `units` that have been used already, whatever there is; what is missing has to be paid
    /// off before anything else can be taken.
    pub fn charge(&mut self, units: u64, now: Duration) {
        self.fill(now);
        let wanted = u128::from(units).saturating_mul(NANOS);
        let owed = wanted.saturating_sub(self.tokens);
        self.tokens = self.tokens.saturating_sub(wanted);
        self.debt = self.debt.saturating_add(owed);
    }

    /// Puts back units that were taken and not used.
    pub fn give_back(&mut self, units: u64) {
        let full = u128::from(self.limit.burst).saturating_mul(NANOS);
        let back = u128::from(units).saturating_mul(NANOS);
        self.tokens = self.tokens.saturating_add(back).min(full);
    }

    /// How long from `now` until `want` units (at most the burst) can be taken.
    pub fn wait_for(&mut self, want: u64, now: Duration) -> Duration {
        self.fill(now);
        let wanted = u128::from(want.min(self.limit.burst)).saturating_mul(NANOS);
        let missing = wanted.saturating_sub(self.tokens).saturating_add(self.debt);
        let rate = u128::from(self.limit.per_second).max(1);
        Duration::from_nanos(u64::try_from(missing.div_ceil(rate)).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_burst_then_the_rate() {
        let start = Duration::from_secs(5);
        let mut bucket = TokenBucket::new(RateLimit::new(1000, 100).unwrap(), start);
        assert_eq!(bucket.take(150, start), 100);
        assert_eq!(bucket.take(1, start), 0);
        let wait = bucket.wait_for(50, start);
        assert_eq!(wait, Duration::from_millis(50));
        assert_eq!(bucket.take(60, start + wait), 50);
        bucket.give_back(7);
        assert_eq!(bucket.take(60, start + wait), 7);
        assert!(RateLimit::new(0, 1).is_none());
        assert!(RateLimit::new(1, 0).is_none());
    }

    #[test]
    fn more_than_the_burst_is_paid_off_later() {
        let mut bucket = TokenBucket::new(RateLimit::new(1000, 100).unwrap(), Duration::ZERO);
        assert!(bucket.take_all(350, Duration::ZERO));
        assert!(!bucket.take_all(1, Duration::from_millis(249)));
        let wait = bucket.wait_for(100, Duration::from_millis(250));
        assert_eq!(wait, Duration::from_millis(100));
        assert!(!bucket.take_all(350, Duration::from_millis(349)));
        assert!(bucket.take_all(350, Duration::from_millis(350)));
    }

    proptest! {
        #[test]
        fn whole_requests_keep_the_rate(
            rate in 1_u64..1_000_000_000,
            burst in 1_u64..1_000_000,
            steps in prop::collection::vec((0_u64..10_000_000, 0_u64..2_000_000), 1..100),
        ) {
            let mut bucket = TokenBucket::new(RateLimit::new(rate, burst).unwrap(), Duration::ZERO);
            let (mut now, mut total, mut last) = (Duration::ZERO, 0_u128, 0_u128);
            for (pause, want) in steps {
                now += Duration::from_nanos(pause);
                if bucket.take_all(want, now) {
                    // Whatever came before the last request is within burst and rate.
                    let most = u128::from(burst) * NANOS + now.as_nanos() * u128::from(rate);
                    prop_assert!(total * NANOS <= most);
                    last = u128::from(want);
                    total += last;
                } else {
                    let wait = bucket.wait_for(want, now);
                    prop_assert!(!wait.is_zero());
                    let mut later = bucket.clone();
                    prop_assert!(later.take_all(want, now + wait));
                }
            }
            prop_assert!(total >= last);
        }

        #[test]
        fn what_was_charged_is_paid_off(
            rate in 1_u64..1_000_000_000,
            burst in 1_u64..1_000_000,
            steps in prop::collection::vec((0_u64..10_000_000, 1_u64..100_000), 1..100),
        ) {
            let mut bucket = TokenBucket::new(RateLimit::new(rate, burst).unwrap(), Duration::ZERO);
            let (mut now, mut before) = (Duration::ZERO, 0_u128);
            for (pause, units) in steps {
                now += Duration::from_nanos(pause);
                let wait = bucket.wait_for(1, now);
                now += wait;
                prop_assert_eq!(bucket.wait_for(1, now), Duration::ZERO);
                let most = u128::from(burst) * NANOS + now.as_nanos() * u128::from(rate);
                prop_assert!(before * NANOS <= most);
                bucket.charge(units, now);
                before += u128::from(units);
            }
        }

        #[test]
        fn never_more_than_the_limit_and_waiting_is_enough(
            rate in 1_u64..1_000_000_000,
            burst in 1_u64..1_000_000,
            steps in prop::collection::vec((0_u64..10_000_000, 0_u64..100_000), 1..100),
        ) {
            let mut bucket = TokenBucket::new(RateLimit::new(rate, burst).unwrap(), Duration::ZERO);
            let (mut now, mut total) = (Duration::ZERO, 0_u128);
            for (pause, want) in steps {
                now += Duration::from_nanos(pause);
                let got = bucket.take(want, now);
                prop_assert!(got <= want);
                total += u128::from(got);
                let most = u128::from(burst) * NANOS + now.as_nanos() * u128::from(rate);
                prop_assert!(total * NANOS <= most);
                let need = want.min(burst);
                let wait = bucket.wait_for(need, now);
                let mut later = bucket.clone();
                prop_assert_eq!(later.take(need, now + wait), need);
            }
        }
    }
}
