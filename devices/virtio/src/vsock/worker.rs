//! Serves the device in its thread: packets from the guest to sockets, sockets to the guest.
//!
//! ```text
//!   TX queue ─▶ from_guest ─▶ Connection { Stream, socket, Backlog } ◀─ epoll, edge-triggered
//!                                   │ ready, one after the other
//!   RX queue ◀───────────── to_guest ┘
//! ```
//! The worker outlives sessions: a pause takes the queues away and leaves the connections; a reset
//! leaves what the guest had sent to be delivered. Sockets are watched edge-triggered once and for
//! all; `readable` and `writable` say what has not been used up.

mod connection;
mod connections;
mod from_guest;
mod to_guest;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::Gauges;
use super::host::VsockHost;
use super::packet::Header;
use super::session::Session;
use crate::model::{KICKED, Queues};
use crate::queue::QueueFault;
use crate::timer::Timer;
use connections::Connections;

const POKE: u32 = 0;
const TX: u32 = 1;
const RX: u32 = 2;
const LISTENER: u32 = 3;
const TIMER: u32 = 4;
/// Connections' ids begin here.
const FIRST_ID: u32 = 16;

/// Answers to packets without a stream that wait for room in the RX queue. When there are so many,
/// the TX queue waits.
const RESETS: usize = 256;

/// What a pass over the device left undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pass {
    /// Nothing; the next event says when there is more.
    Idle,
    /// There is more; other events first.
    Yield,
}

/// A queue's kick, and what epoll calls it.
type Kick = (u32, Arc<EventFd>);

pub(super) struct Worker {
    host: VsockHost,
    gauges: Gauges,
    /// The guest's address, while it has a session.
    guest_cid: u64,
    session: Option<Session>,
    /// Kicks that epoll knows.
    watched: Vec<Kick>,
    listening: bool,
    connections: Connections,
    resets: VecDeque<Header>,
    /// Chains of the TX queue wait for `resets` to be sent.
    tx_waits: bool,
    /// Chains of the TX queue wait for their turn.
    tx_goes_on: bool,
    /// The guest that the connections belong to is gone.
    forget: bool,
    poke: Arc<EventFd>,
    timer: Timer,
    epoch: Instant,
}

impl Worker {
    pub(super) fn new(
        host: VsockHost,
        gauges: Gauges,
        streams: usize,
        poke: Arc<EventFd>,
    ) -> io::Result<Self> {
        Ok(Self {
            host,
            connections: Connections::new(gauges.clone(), streams),
            gauges,
            guest_cid: 0,
            session: None,
            watched: Vec::new(),
            listening: false,
            resets: VecDeque::new(),
            tx_waits: false,
            tx_goes_on: false,
            forget: false,
            poke,
            timer: Timer::new()?,
            epoch: Instant::now(),
        })
    }

    /// From another thread: serve `session` from now on.
    pub(super) fn start(&mut self, guest_cid: u64, session: Session) {
        self.guest_cid = guest_cid;
        self.session = Some(session);
        self.poke();
    }

    /// From another thread: give the queues back.
    pub(super) fn stop(&mut self) -> Queues {
        self.poke();
        self.session.take().map_or(Vec::new(), Session::into_queues)
    }

    /// From another thread: the guest knows nothing of its connections any more.
    pub(super) fn forget(&mut self) {
        self.forget = true;
        self.poke();
    }

    /// From another thread: bytes of the guest's that the host has not taken, after a look at what
    /// the guest has handed over since.
    pub(super) fn undelivered(&mut self) -> usize {
        self.poke();
        let unserved = self.tx_waits || self.tx_goes_on;
        self.connections.undelivered().max(usize::from(unserved))
    }

    fn poke(&self) {
        // Fails only when it is set already.
        let _ = self.poke.write(1);
    }

    /// Brings what epoll watches in line with the session.
    fn rewatch(&mut self, ops: &mut EventOps<'_>) {
        if std::mem::take(&mut self.forget) {
            self.resets.clear();
            self.tx_waits = false;
            self.tx_goes_on = false;
            self.connections.guest_is_gone(ops);
        }
        let wanted: Vec<Kick> = match &self.session {
            Some(session) if !session.broken => vec![
                (TX, Arc::clone(&session.tx.kick)),
                (RX, Arc::clone(&session.rx.kick)),
            ],
            _ => Vec::new(),
        };
        let same = |((_, a), (_, b)): (&Kick, &Kick)| Arc::ptr_eq(a, b);
        if wanted.len() != self.watched.len() || !wanted.iter().zip(&self.watched).all(same) {
            for (data, kick) in self.watched.drain(..) {
                let _ = ops.remove(Events::with_data(&*kick, data, EventSet::IN));
            }
            for (data, kick) in wanted {
                match ops.add(Events::with_data(&*kick, data, KICKED)) {
                    Ok(()) => self.watched.push((data, kick)),
                    Err(e) => self.needs_reset(&e),
                }
            }
            self.connections.be_patient_again();
        }
        self.relisten(ops);
    }

    /// Clients are let in while the guest can be asked and there is room; else they wait outside.
    fn relisten(&mut self, ops: &mut EventOps<'_>) {
        let wanted = self.session.is_some() && !self.connections.full();
        if wanted == self.listening {
            return;
        }
        let events = Events::with_data_raw(self.listener_fd(), LISTENER, EventSet::IN);
        let done = if wanted {
            ops.add(events)
        } else {
            ops.remove(events)
        };
        match done {
            Ok(()) => self.listening = wanted,
            Err(e) => log::warn!("vsock: the listening socket cannot be watched: {e}"),
        }
    }

    fn listener_fd(&self) -> RawFd {
        self.host.listener().as_raw_fd()
    }

    fn needs_reset(&mut self, why: &dyn std::error::Error) {
        if let Some(session) = &mut self.session {
            session.broken = true;
            session.device.needs_reset(why);
            self.poke();
        }
    }

    /// Serves both queues for a while.
    fn work(&mut self, ops: &mut EventOps<'_>, tx: bool) {
        let Some(mut session) = self.session.take() else {
            return;
        };
        let result = if session.broken {
            Ok(Pass::Idle)
        } else {
            self.passes(&mut session, ops, tx)
        };
        self.session = Some(session);
        match result {
            Ok(Pass::Idle) => {}
            Ok(Pass::Yield) => self.poke(),
            Err(e) => self.needs_reset(&e),
        }
        self.relisten(ops);
    }

    fn passes(
        &mut self,
        session: &mut Session,
        ops: &mut EventOps<'_>,
        tx: bool,
    ) -> Result<Pass, QueueFault> {
        let view = session.ram.memory();
        let mut from = Pass::Idle;
        if tx || self.tx_waits {
            from = self.serve_tx(session, &view, ops)?;
            self.tx_goes_on = from == Pass::Yield;
        }
        let mut to = self.serve_rx(session, &view, ops)?;
        if self.tx_waits && self.resets.len() < RESETS {
            to = Pass::Yield;
        }
        Ok(if from == Pass::Idle { to } else { from })
    }

    fn expire(&mut self, ops: &mut EventOps<'_>) {
        if self.session.is_none() {
            // The guest cannot be late while it is paused.
            self.connections.be_patient_again();
        }
        self.connections.expire(&self.host, ops);
    }

    /// Sets the timer for the next deadline, if there is one.
    fn rearm(&mut self) {
        let now = self.epoch.elapsed();
        if let Some(at) = self.connections.take_new_deadline() {
            let wait = at.saturating_sub(now).max(Duration::from_millis(1));
            if let Err(e) = self.timer.set(wait) {
                log::error!("vsock: timer: {e}");
            }
        }
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for events in [
            Events::with_data(&*self.poke, POKE, EventSet::IN),
            Events::with_data(&self.timer, TIMER, EventSet::IN),
        ] {
            if let Err(e) = ops.add(events) {
                log::error!("vsock: the device does not work: {e}");
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        self.connections.tick(self.epoch.elapsed());
        if self.forget {
            // Before anything of the next guest's.
            self.rewatch(ops);
        }
        // Level-triggered and non-blocking: what is signalled later is another event.
        match events.data() {
            POKE => {
                let _ = self.poke.read();
                self.rewatch(ops);
                self.work(ops, true);
            }
            TX => self.work(ops, true),
            RX => self.work(ops, false),
            LISTENER => {
                self.connections.accept(&self.host, ops);
                self.work(ops, false);
            }
            TIMER => {
                self.timer.take();
                self.expire(ops);
                self.work(ops, false);
            }
            id => {
                self.connections.socket(id, events.event_set(), ops);
                self.work(ops, false);
            }
        }
        self.rearm();
    }
}
