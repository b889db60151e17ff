//! The agent's children. The loop reaps whoever ends, its own and orphans alike; this is where it finds
//! out whose end that was, and where jobs learn of the programs they started.
//!
//! A number says nothing once its process is reaped, and a child can end before anybody has noted its
//! number. So while a birth is under way, ends that nobody knows are kept.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::Pid;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    Code(i32),
    Signal(i32),
}

#[derive(Default)]
struct State {
    births: usize,
    /// Ended while births were under way, and nobody's yet.
    unclaimed: BTreeMap<i32, Ended>,
    /// Whom the loop's owner knows.
    owned: BTreeMap<i32, u32>,
}

/// All of them.
#[derive(Default)]
pub(crate) struct Children {
    state: Mutex<State>,
    bell: Condvar,
}

/// Births are under way as long as this lives.
pub(crate) struct Birth<'a>(&'a Children);

impl Drop for Birth<'_> {
    fn drop(&mut self) {
        self.0.end_birth();
    }
}

impl Children {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on no end is forgotten.
    pub(crate) fn begin_birth(&self) {
        let mut state = self.state();
        state.births = state.births.saturating_add(1);
    }

    /// The number is noted, or there is none.
    pub(crate) fn end_birth(&self) {
        let mut state = self.state();
        state.births = state.births.saturating_sub(1);
        if state.births == 0 {
            state.unclaimed.clear();
        }
    }

    /// As [`Children::begin_birth`], for a job.
    pub(crate) fn birth(&self) -> Birth<'_> {
        self.begin_birth();
        Birth(self)
    }

    /// The loop knows this child under a key; if it has ended already, how. To be called in a birth.
    pub(crate) fn own(&self, pid: Pid, key: u32) -> Option<Ended> {
        let mut state = self.state();
        let number = pid.as_raw_nonzero().get();
        if let Some(ended) = state.unclaimed.remove(&number) {
            return Some(ended);
        }
        state.owned.insert(number, key);
        None
    }

    /// Somebody was reaped: the loop's own, by its key, or somebody else's.
    pub(crate) fn reaped(&self, pid: Pid, ended: Ended) -> Option<u32> {
        let mut state = self.state();
        let number = pid.as_raw_nonzero().get();
        if let Some(key) = state.owned.remove(&number) {
            return Some(key);
        }
        if state.births > 0 {
            state.unclaimed.insert(number, ended);
            self.bell.notify_all();
        }
        None
    }

    /// Waits for a program that the caller started in this birth; nothing if it takes longer.
    pub(crate) fn wait(
        &self,
        _: &Birth<'_>,
        pid: Pid,
        patience: Option<Duration>,
    ) -> Option<Ended> {
        let begun = Instant::now();
        let number = pid.as_raw_nonzero().get();
        let mut state = self.state();
        loop {
            if let Some(ended) = state.unclaimed.remove(&number) {
                return Some(ended);
            }
            state = match patience {
                None => self
                    .bell
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(patience) => {
                    let left = patience.checked_sub(begun.elapsed())?;
                    let waited = self.bell.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pid(number: i32) -> Pid {
        Pid::from_raw(number).unwrap()
    }

    #[test]
    fn an_end_before_the_number_is_noted_is_not_lost() {
        let children = Children::default();
        children.begin_birth();
        assert_eq!(children.reaped(pid(7), Ended::Code(3)), None);
        assert_eq!(children.own(pid(7), 1), Some(Ended::Code(3)));
        children.end_birth();
    }

    #[test]
    fn a_number_that_comes_again_is_somebody_else() {
        let children = Children::default();
        assert_eq!(children.reaped(pid(7), Ended::Code(0)), None);
        children.begin_birth();
        assert_eq!(children.own(pid(7), 1), None);
        children.end_birth();
        assert_eq!(children.reaped(pid(7), Ended::Signal(9)), Some(1));
        assert_eq!(children.reaped(pid(7), Ended::Signal(9)), None);
    }

    #[test]
    fn jobs_wait_for_what_they_started() {
        let children = Children::default();
        let birth = children.birth();
        let waited = children.wait(&birth, pid(9), Some(Duration::from_millis(5)));
        assert_eq!(waited, None);
        children.reaped(pid(9), Ended::Code(1));
        assert_eq!(children.wait(&birth, pid(9), None), Some(Ended::Code(1)));
    }
}
