//! When a disk's thread does by system call, at once, what hardly waits: the choice of
//! `engine=auto` for files in the page cache (ADR 0005). Pure: time is an argument.

use std::time::{Duration, Instant};

/// Calls of one pass that took longer than this did wait, for dirty pages to be written or so.
const STALL: Duration = Duration::from_millis(20);
/// For so long writes go to io_uring after that.
const AFTER_STALL: Duration = Duration::from_secs(1);
/// Reads that go to io_uring without a try after one that was not in the page cache.
const AFTER_MISS: u8 = 15;

/// What one thread has learnt of its disk.
#[derive(Debug, Default)]
pub(super) struct Inline {
    /// When the pass in hand made its first write.
    since: Option<Instant>,
    /// No write is made at once before.
    not_before: Option<Instant>,
    /// Reads that are not tried.
    misses: u8,
}

impl Inline {
    /// Whether a write is made at once. Many file systems have no way to try one, and io_uring
    /// hands every such write to a thread of its own.
    pub(super) fn may_write(&mut self, now: impl FnOnce() -> Instant) -> bool {
        if self.since.is_some() {
            return true;
        }
        let now = now();
        if self.not_before.is_some_and(|then| now < then) {
            return false;
        }
        self.not_before = None;
        self.since = Some(now);
        true
    }

    /// The pass over the queue is over.
    pub(super) fn pass_ended(&mut self, now: impl FnOnce() -> Instant) {
        let Some(since) = self.since.take() else {
            return;
        };
        let now = now();
        if now.saturating_duration_since(since) > STALL {
            self.not_before = now.checked_add(AFTER_STALL);
        }
    }

    /// Whether the next read is worth a try.
    pub(super) fn may_read(&mut self) -> bool {
        match self.misses.checked_sub(1) {
            Some(left) => {
                self.misses = left;
                false
            }
            None => true,
        }
    }

    /// A read was tried, and the page cache did not have it.
    pub(super) fn missed(&mut self) {
        self.misses = AFTER_MISS;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_stall_writes_keep_away_for_a_while() {
        let start = Instant::now();
        let at = |ms| move || start + Duration::from_millis(ms);
        let mut inline = Inline::default();
        assert!(inline.may_write(at(0)));
        assert!(inline.may_write(at(500)), "the pass in hand goes on");
        inline.pass_ended(at(20));
        assert!(inline.may_write(at(21)));
        inline.pass_ended(at(42));
        assert!(!inline.may_write(at(43)));
        inline.pass_ended(at(44));
        assert!(!inline.may_write(at(1041)));
        assert!(inline.may_write(at(1042)));
    }

    #[test]
    fn after_a_miss_some_reads_are_not_tried() {
        let mut inline = Inline::default();
        assert!(inline.may_read() && inline.may_read());
        inline.missed();
        let tried = (0..16).map(|_| inline.may_read()).collect::<Vec<_>>();
        assert_eq!(tried.iter().position(|t| *t), Some(15));
    }
}
