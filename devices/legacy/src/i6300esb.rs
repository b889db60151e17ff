//! The watchdog of Intel's 6300ESB, a PCI function that guests have drivers for (Linux: `i6300esb`).
//!
//! A driver enables the timer and reloads it before two stages have run down; one that does not is
//! hung, and the machine's owner is told by [`GuestEvent::Watchdog`]. What is to be done is the owner's
//! decision. The timer then stands until the driver reloads it: a guest that hangs is told of once.
//!
//! Registers (Intel 6300ESB I/O Controller Hub datasheet 300641, §15):
//!
//! | where | what |
//! |---|---|
//! | configuration 0x60 | bits 1:0 interrupt of stage 1, 2 clock (0: 1 kHz, 1: 1 MHz), 5 output off |
//! | configuration 0x68 | bit 0 locks this register until reset, 1 enables, 2 free-running |
//! | BAR 0 + 0x0, + 0x4 | preload of stage 1 and 2, 20 bits, in ticks |
//! | BAR 0 + 0xc | bit 8 reloads; bit 9 is set after a time-out, and cleared by writing 1 |
//!
//! A write to BAR 0 counts only right after 0x80 and then 0x86 have been written to 0xc. The interrupt
//! of stage 1 is not there, as no driver uses it.
//!
//! Threads: the function on vCPU threads, [`WatchdogHandle`] on the thread that watches its timer;
//! both lock the state for the length of one operation.

mod countdown;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use testudo_bus::{Access, GuestEvent, Mailbox};
use testudo_pci::{Bar, ClassCode, ConfigSpace, Identity, LayoutError, PciFunction};
use thiserror::Error;

use countdown::{Countdown, Stage};

const INTEL: u16 = 0x8086;
const I6300ESB_WDT: u16 = 0x25ab;
const RED_HAT_QUMRANET: u16 = 0x1af4;
const GENERIC_SUBSYSTEM: u16 = 0x1100;

const CONFIG: u16 = 0x60;
const CONFIG_INTERRUPT: u16 = 0b11;
const CONFIG_FAST: u16 = 1 << 2;
const CONFIG_OUTPUT_OFF: u16 = 1 << 5;
const CONTROL: u16 = 0x68;
const CONTROL_LOCK: u8 = 1 << 0;
const CONTROL_ENABLE: u8 = 1 << 1;
const CONTROL_FREE_RUNNING: u8 = 1 << 2;

const PRELOAD_1: u64 = 0x0;
const PRELOAD_2: u64 = 0x4;
const RELOAD: u64 = 0xc;
const RELOAD_TIMER: u32 = 1 << 8;
const RELOAD_TIMED_OUT: u32 = 1 << 9;
const UNLOCK_FIRST: u32 = 0x80;
const UNLOCK_SECOND: u32 = 0x86;

/// The PCI clock of 33 MHz, divided by 2¹⁵ or by 2⁵.
const SLOW_TICK: Duration = Duration::from_nanos(30 << 15);
const FAST_TICK: Duration = Duration::from_nanos(30 << 5);

/// The device could not be made.
#[derive(Debug, Error)]
pub enum WatchdogError {
    /// No timer.
    #[error("no timer for the watchdog; check the limit of open files")]
    Timer(#[from] io::Error),
    /// Its configuration space, a defect of this module.
    #[error("configuration space of the watchdog")]
    Layout(#[from] LayoutError),
}

/// How far a driver has come with the two writes that open the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unlock {
    Closed,
    Half,
    Open,
}

struct State {
    countdown: Countdown,
    unlock: Unlock,
    enabled: bool,
    output: bool,
}

struct Shared {
    state: Mutex<State>,
    timer: OwnedFd,
    epoch: Instant,
    /// The guest's last life ended by a time-out. Outlives the device.
    timed_out: Arc<AtomicBool>,
    mailbox: Arc<dyn Mailbox>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    /// Brings the timer in line with the countdown.
    fn arm(&self, state: &State) {
        let left = state.countdown.deadline().map(|at| {
            let left = at.saturating_sub(self.now());
            // All zeros would disarm it.
            left.max(Duration::from_nanos(1))
        });
        let left = left.unwrap_or_default();
        let spec = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            },
        };
        if let Err(e) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec) {
            log::error!("the watchdog's timer: {e}");
        }
    }
}

/// The watchdog as the guest sees it.
pub struct I6300Esb {
    config: ConfigSpace,
    shared: Arc<Shared>,
}

/// The timer's end of it.
pub struct WatchdogHandle {
    shared: Arc<Shared>,
}

impl I6300Esb {
    /// The BAR its registers are in, one of 32 bits.
    pub const BAR: u8 = 0;
    /// Its size in bytes.
    pub const BAR_SIZE: u64 = 16;

    /// A watchdog that is off. It reads and keeps in `timed_out` whether a guest was given up.
    pub fn new(
        mailbox: Arc<dyn Mailbox>,
        timed_out: Arc<AtomicBool>,
    ) -> Result<(Self, WatchdogHandle), WatchdogError> {
        let mut config = ConfigSpace::new(&Identity {
            vendor: INTEL,
            device: I6300ESB_WDT,
            revision: 0,
            class: ClassCode {
                base: 0x08,
                sub: 0x80,
                interface: 0x00,
            },
            subsystem_vendor: RED_HAT_QUMRANET,
            subsystem: GENERIC_SUBSYSTEM,
        });
        config.add_bar(Bar {
            index: Self::BAR,
            size: Self::BAR_SIZE,
            wide: false,
            prefetchable: false,
        })?;
        let writable = CONFIG_INTERRUPT | CONFIG_FAST | CONFIG_OUTPUT_OFF;
        config.allow(CONFIG, &writable.to_le_bytes());
        let writable = CONTROL_LOCK | CONTROL_ENABLE | CONTROL_FREE_RUNNING;
        config.allow(CONTROL, &[writable]);
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags).map_err(io::Error::from)?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                countdown: Countdown::new(SLOW_TICK),
                unlock: Unlock::Closed,
                enabled: false,
                output: true,
            }),
            timer,
            epoch: Instant::now(),
            timed_out,
            mailbox,
        });
        let handle = WatchdogHandle {
            shared: Arc::clone(&shared),
        };
        Ok((Self { config, shared }, handle))
    }

    fn configured(&mut self) {
        let config = self.config.get_u16(CONFIG);
        let control = self.config.get_u8(CONTROL);
        let mut state = self.shared.lock();
        state.output = config & CONFIG_OUTPUT_OFF == 0;
        let fast = config & CONFIG_FAST != 0;
        state
            .countdown
            .set_tick(if fast { FAST_TICK } else { SLOW_TICK });
        let enabled = control & CONTROL_ENABLE != 0;
        if enabled != std::mem::replace(&mut state.enabled, enabled) {
            if enabled {
                state.countdown.start(self.shared.now());
            } else {
                state.countdown.stop();
            }
            self.shared.arm(&state);
        }
    }
}

impl State {
    /// A write to BAR 0; `true` if the timer is to be looked at.
    fn write(&mut self, offset: u64, value: u32, now: Duration, timed_out: &AtomicBool) -> bool {
        let open = std::mem::replace(&mut self.unlock, Unlock::Closed);
        match (offset, value) {
            (RELOAD, UNLOCK_FIRST) => self.unlock = Unlock::Half,
            (RELOAD, UNLOCK_SECOND) if open == Unlock::Half => self.unlock = Unlock::Open,
            _ if open != Unlock::Open => {}
            (PRELOAD_1, ticks) => self.countdown.set_preload(Stage::First, ticks),
            (PRELOAD_2, ticks) => self.countdown.set_preload(Stage::Second, ticks),
            (RELOAD, bits) => {
                if bits & RELOAD_TIMED_OUT != 0 {
                    timed_out.store(false, Ordering::Relaxed);
                }
                if bits & RELOAD_TIMER != 0 && self.enabled {
                    self.countdown.start(now);
                    return true;
                }
            }
            _ => {}
        }
        false
    }
}

impl PciFunction for I6300Esb {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        let control = self.config.get_u8(CONTROL);
        self.config.write(offset, data);
        if control & CONTROL_LOCK != 0 {
            self.config.set(CONTROL, &[control]);
        }
        self.configured();
    }

    fn bar_read(&mut self, _bar: u8, at: Access, data: &mut [u8]) {
        let state = self.shared.lock();
        let value = match at.offset {
            PRELOAD_1 => state.countdown.preload(Stage::First),
            PRELOAD_2 => state.countdown.preload(Stage::Second),
            RELOAD if self.shared.timed_out.load(Ordering::Relaxed) => RELOAD_TIMED_OUT,
            _ => 0,
        };
        let bytes = value.to_le_bytes().into_iter().chain(std::iter::repeat(0));
        for (byte, value) in data.iter_mut().zip(bytes) {
            *byte = value;
        }
    }

    fn bar_write(&mut self, _bar: u8, at: Access, data: &[u8]) {
        let mut bytes = [0; 4];
        for (byte, value) in bytes.iter_mut().zip(data) {
            *byte = *value;
        }
        let value = u32::from_le_bytes(bytes);
        let now = self.shared.now();
        let mut state = self.shared.lock();
        if state.write(at.offset, value, now, &self.shared.timed_out) {
            self.shared.arm(&state);
        }
    }

    fn pause(&mut self) {
        let mut state = self.shared.lock();
        state.countdown.hold(self.shared.now());
        self.shared.arm(&state);
    }

    fn resume(&mut self) {
        let mut state = self.shared.lock();
        state.countdown.go_on(self.shared.now());
        self.shared.arm(&state);
    }
}

impl WatchdogHandle {
    /// The timer has expired, or may have.
    pub fn expired(&self) {
        let _ = rustix::io::read(&self.shared.timer, &mut [0; 8]);
        let mut state = self.shared.lock();
        if state.countdown.expire(self.shared.now()) {
            self.shared.timed_out.store(true, Ordering::Relaxed);
            if state.output {
                self.shared.mailbox.post(GuestEvent::Watchdog);
            }
        }
        self.shared.arm(&state);
    }
}

impl AsRawFd for WatchdogHandle {
    /// The timer, readable when it has expired; reading it does not block.
    fn as_raw_fd(&self) -> RawFd {
        self.shared.timer.as_raw_fd()
    }
}

#[cfg(test)]
mod tests;
