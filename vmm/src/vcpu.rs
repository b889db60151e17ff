//! vCPU threads.
//!
//! ```text
//!            ┌───────── Run ─────────┐
//!   start ─▶ parked ◀── Pause ── running ── reset, power-off, failure ─▶ parked (says so by letter)
//!            └────────▶ Quit ◀───────┘
//! ```
//! The control thread changes the order and kicks; the thread clears the kick, then looks at the
//! order, so no order is overlooked. A parked thread is one that is surely not in the guest.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use testudo_bus::{Bus, GuestEvent, Mailbox};
use testudo_kvm::{Exit, Kick, Vcpu};

use crate::letters::{Letter, Letters};

/// How long a vCPU may take to leave the guest and the device access it is in.
const PARK_PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Pause,
    Run,
    Quit,
}

#[derive(Debug)]
struct State {
    order: Order,
    parked: bool,
    tid: i32,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    exits: AtomicU64,
    ignored_writes: AtomicU64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a vCPU thread needs to run its guest.
#[derive(Clone)]
pub(crate) struct Guest {
    pub(crate) pio: Bus,
    pub(crate) mmio: Bus,
    pub(crate) letters: Letters,
}

/// The control thread's end of one vCPU thread. Dropping it makes the thread quit and waits for
/// it.
pub(crate) struct VcpuThread {
    index: u16,
    shared: Arc<Shared>,
    kick: Kick,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Starts the thread, parked. `first` runs in it before anything else: affinity and filters;
    /// its error is the thread's.
    pub(crate) fn spawn(
        index: u16,
        vcpu: Vcpu,
        guest: Guest,
        first: Box<dyn FnOnce() -> io::Result<()> + Send>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                order: Order::Pause,
                parked: false,
                tid: 0,
            }),
            changed: Condvar::new(),
            exits: AtomicU64::new(0),
            ignored_writes: AtomicU64::new(0),
        });
        let kick = vcpu.kick();
        let (started_tx, started) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name(format!("vcpu-{index}"))
            .stack_size(256 * 1024)
            .spawn({
                let shared = Arc::clone(&shared);
                move || {
                    vcpu.adopt_this_thread();
                    shared.lock().tid = rustix::thread::gettid().as_raw_nonzero().get();
                    let begun = first();
                    let go = begun.is_ok();
                    let _ = started_tx.send(begun);
                    if go {
                        let thread = Thread {
                            index,
                            vcpu,
                            guest,
                            shared,
                        };
                        thread.main();
                    }
                }
            })?;
        started
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the vCPU thread ended at its start")))?;
        Ok(Self {
            index,
            shared,
            kick,
            thread: Some(thread),
        })
    }

    /// Index of the vCPU.
    pub(crate) fn index(&self) -> u16 {
        self.index
    }

    /// Host thread id.
    pub(crate) fn tid(&self) -> i32 {
        self.shared.lock().tid
    }

    /// Times the vCPU came back from the guest.
    pub(crate) fn exits(&self) -> u64 {
        self.shared.exits.load(Ordering::Relaxed)
    }

    /// Writes of the guest to read-only memory, or to where nothing is.
    pub(crate) fn ignored_writes(&self) -> u64 {
        self.shared.ignored_writes.load(Ordering::Relaxed)
    }

    /// Lets the vCPU run.
    pub(crate) fn run(&self) {
        self.order(Order::Run);
    }

    /// Asks the vCPU to leave the guest; [`wait_parked`](Self::wait_parked) tells when it has.
    pub(crate) fn pause(&self) {
        self.order(Order::Pause);
        self.kick.kick();
    }

    /// Waits until the thread is parked; `false` if a device access keeps it.
    pub(crate) fn wait_parked(&self) -> bool {
        let state = self.shared.lock();
        let (state, _) = self
            .shared
            .changed
            .wait_timeout_while(state, PARK_PATIENCE, |s| !s.parked)
            .unwrap_or_else(PoisonError::into_inner);
        state.parked
    }

    fn order(&self, order: Order) {
        let mut state = self.shared.lock();
        state.order = order;
        if order == Order::Run {
            state.parked = false;
        }
        self.shared.changed.notify_all();
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.order(Order::Quit);
        self.kick.kick();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("vCPU {} ended in a panic", self.index);
        }
    }
}

/// What a thread that looked at its order does next.
enum Go {
    /// Run the guest, perhaps after having been parked.
    After {
        parked: bool,
    },
    Quit,
}

struct Thread {
    index: u16,
    vcpu: Vcpu,
    guest: Guest,
    shared: Arc<Shared>,
}

impl Thread {
    fn main(mut self) {
        let mut has_run = false;
        loop {
            self.vcpu.clear_kick();
            match self.wait_for_order() {
                Go::Quit => return,
                Go::After { parked } => {
                    if parked && has_run {
                        self.vcpu.tell_paused();
                    }
                }
            }
            has_run = true;
            if let Some(letter) = self.run() {
                // In this order: the control thread may let it run again at once.
                self.stay_out();
                self.guest.letters.send(letter);
            } else if self.guest.letters.guest_done() {
                self.stay_out();
            }
        }
    }

    /// The guest cannot go on by itself: park until the control thread decides.
    fn stay_out(&self) {
        let mut state = self.shared.lock();
        if state.order == Order::Run {
            state.order = Order::Pause;
        }
    }

    /// Parks until the order is to run or to quit.
    fn wait_for_order(&self) -> Go {
        let mut state = self.shared.lock();
        let mut parked = false;
        loop {
            match state.order {
                Order::Run => return Go::After { parked },
                Order::Quit => return Go::Quit,
                Order::Pause => {
                    parked = true;
                    state.parked = true;
                    self.shared.changed.notify_all();
                    state = self
                        .shared
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Runs the guest until an order may have come, or until it cannot go on by itself.
    fn run(&mut self) -> Option<Letter> {
        loop {
            let exit = self.vcpu.run(&self.guest.pio, &self.guest.mmio);
            self.shared.exits.fetch_add(1, Ordering::Relaxed);
            if matches!(exit, Ok(Exit::Ignored)) {
                self.shared.ignored_writes.fetch_add(1, Ordering::Relaxed);
            }
            match exit {
                Ok(Exit::Handled | Exit::Ignored) if self.guest.letters.guest_done() => {
                    return None;
                }
                Ok(Exit::Handled | Exit::Ignored) => {}
                Ok(Exit::Interrupted) => return None,
                Ok(Exit::Reset) => return Some(Letter::Guest(GuestEvent::Reset)),
                Ok(Exit::PowerOff) => return Some(Letter::Guest(GuestEvent::PowerOff)),
                Ok(Exit::Crashed) => self.guest.letters.post(GuestEvent::Panicked),
                Err(error) => {
                    return Some(Letter::VcpuFailed {
                        index: self.index,
                        error,
                    });
                }
            }
        }
    }
}
