//! One deadline as a descriptor. Reading it never blocks, whatever became of the deadline since
//! it was seen to be over.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// A timerfd that is readable once the deadline is over.
pub(super) struct Deadline {
    fd: OwnedFd,
}

impl Deadline {
    /// No deadline yet.
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self {
            fd: timerfd_create(TimerfdClockId::Monotonic, flags)?,
        })
    }

    /// The deadline is `from_now`; an earlier one is forgotten.
    pub(super) fn set(&self, from_now: Duration) -> io::Result<()> {
        // An all-zero time would disarm the timer.
        let from_now = from_now.max(Duration::from_nanos(1));
        let never = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let at = Timespec {
            tv_sec: i64::try_from(from_now.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: from_now.subsec_nanos().into(),
        };
        let spec = Itimerspec {
            it_interval: never,
            it_value: at,
        };
        timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &spec)?;
        Ok(())
    }

    /// Whether the deadline is over; says so once.
    pub(super) fn is_over(&self) -> bool {
        rustix::io::read(&self.fd, &mut [0; 8]).is_ok()
    }
}

impl AsRawFd for Deadline {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_that_moved_is_not_over() {
        let deadline = Deadline::new().unwrap();
        assert!(!deadline.is_over());
        deadline.set(Duration::ZERO).unwrap();
        std::thread::sleep(Duration::from_millis(5));
        deadline.set(Duration::from_secs(3600)).unwrap();
        assert!(!deadline.is_over(), "and asking did not block");
        deadline.set(Duration::ZERO).unwrap();
        std::thread::sleep(Duration::from_millis(5));
        assert!(deadline.is_over());
        assert!(!deadline.is_over());
    }
}
