//! Two stages that run down, one after the other. Time is an argument, since any fixed moment.
//!
//! ```text
//!   off ──start──▶ First ──preload 1──▶ Second ──preload 2──▶ over, and off
//!                    ▲ start (reload)     │
//!                    └────────────────────┘        hold ⇄ go_on: what is left stays left
//! ```

use std::time::Duration;

/// Bits of a preload.
const PRELOAD_MASK: u32 = 0xf_ffff;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    First,
    Second,
}

#[derive(Debug, Clone, Copy)]
enum Run {
    Off,
    /// Its end.
    Until(Stage, Duration),
    /// What is left of it.
    Held(Stage, Duration),
}

#[derive(Debug)]
pub(super) struct Countdown {
    tick: Duration,
    first: u32,
    second: u32,
    run: Run,
}

impl Countdown {
    pub(super) fn new(tick: Duration) -> Self {
        Self {
            tick,
            first: PRELOAD_MASK,
            second: PRELOAD_MASK,
            run: Run::Off,
        }
    }

    /// For the stages that begin from now on.
    pub(super) fn set_tick(&mut self, tick: Duration) {
        self.tick = tick;
    }

    /// For the stages that begin from now on.
    pub(super) fn set_preload(&mut self, stage: Stage, ticks: u32) {
        let ticks = ticks & PRELOAD_MASK;
        match stage {
            Stage::First => self.first = ticks,
            Stage::Second => self.second = ticks,
        }
    }

    pub(super) fn preload(&self, stage: Stage) -> u32 {
        match stage {
            Stage::First => self.first,
            Stage::Second => self.second,
        }
    }

    fn length(&self, stage: Stage) -> Duration {
        self.tick.saturating_mul(self.preload(stage))
    }

    /// Begins, or begins again.
    pub(super) fn start(&mut self, now: Duration) {
        let first = self.length(Stage::First);
        self.run = match self.run {
            Run::Held(..) => Run::Held(Stage::First, first),
            _ => Run::Until(Stage::First, now.saturating_add(first)),
        };
    }

    pub(super) fn stop(&mut self) {
        self.run = Run::Off;
    }

    /// When the present stage is over, if one runs.
    pub(super) fn deadline(&self) -> Option<Duration> {
        match self.run {
            Run::Until(_, at) => Some(at),
            Run::Off | Run::Held(..) => None,
        }
    }

    /// Time stands still for the guest.
    pub(super) fn hold(&mut self, now: Duration) {
        if let Run::Until(stage, at) = self.run {
            self.run = Run::Held(stage, at.saturating_sub(now));
        }
    }

    /// Time goes on.
    pub(super) fn go_on(&mut self, now: Duration) {
        if let Run::Held(stage, left) = self.run {
            self.run = Run::Until(stage, now.saturating_add(left));
        }
    }

    /// Moves on to `now`; `true` if the second stage has ended.
    pub(super) fn expire(&mut self, now: Duration) -> bool {
        if let Run::Until(Stage::First, at) = self.run
            && at <= now
        {
            let end = at.saturating_add(self.length(Stage::Second));
            self.run = Run::Until(Stage::Second, end);
        }
        let over = matches!(self.run, Run::Until(Stage::Second, at) if at <= now);
        if over {
            self.run = Run::Off;
        }
        over
    }
}
