//! The control thread: the one owner of the machine, and everybody who talks to it.
//!
//! ```text
//!   letters (guest, vCPUs, terminal) ─┐
//!   signals ──────────────────────────┤
//!   control socket ─ clients ─────────┼─▶ Control::process ─▶ Machine
//!   shutdown timer ───────────────────┘
//! ```
//! Every request is answered from memory or by a bounded step; what takes the guest's help
//! (`shutdown`) is answered when the guest has answered, and nobody waits for it meanwhile.

mod clients;
mod deadline;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::{Duration, Instant};

use anyhow::Context;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use testudo_bus::GuestEvent;
use testudo_protocol::{
    Ended, Event, Failure, FailureKind, Listener, Outcome, Phase, Reply, Request, Verb,
};

use crate::devices::{self, Adjust, AdjustError, OnWatchdog};
use crate::letters::{Letter, Letters};
use crate::machine::Machine;
use crate::seccomp::{ThreadKind, apply};
use crate::signals::{EndingSignals, WINDOW_CHANGED};
use crate::spec::{OnPanic, OnReset};
use clients::Client;
use deadline::Deadline;

const LETTERS: u32 = 0;
const SIGNALS: u32 = 1;
const LISTENER: u32 = 2;
const TIMER: u32 = 3;
const CLIENT: u32 = 4;

/// Control clients at a time; more are turned away.
const MAX_CLIENTS: usize = 32;

/// Runs the machine until it ends, and puts back what would outlive the process: the terminal, the
/// sockets' paths. The rest of the machine is left to the kernel, which frees it at once when the
/// process exits; taking it apart guard by guard first would make whoever waits for that wait longer.
pub(crate) fn run(
    machine: Machine,
    letters: Letters,
    signals: EndingSignals,
    listener: Option<Listener>,
    started: Instant,
) -> anyhow::Result<Ended> {
    let seccomp = machine.spec().seccomp;
    let events = EventManager::new().map_err(|e| anyhow::anyhow!("event loop: {e}"))?;
    let events = Box::leak(Box::new(events));
    let timer = Deadline::new().context("cannot make a timer")?;
    let control = Control {
        machine,
        letters,
        signals,
        listener,
        timer,
        clients: BTreeMap::new(),
        waiting: Vec::new(),
        ended: None,
        failure: None,
        started,
    };
    let id = events.add_subscriber(control);
    log::debug!("the guest begins to run");
    events
        .subscriber_mut(id)
        .map_err(|e| anyhow::anyhow!("event loop: {e}"))?
        .begin();
    // The vCPUs are under their filters already. This thread hears nothing of the guest before its
    // own is in place, so the guest need not wait for that.
    std::thread::yield_now();
    apply(ThreadKind::CTL, seccomp)?;
    if let Err(e) = crate::code::unmap() {
        log::debug!("the code of the start stays mapped: {e}");
    }
    loop {
        events
            .run()
            .map_err(|e| anyhow::anyhow!("event loop: {e}"))?;
        let control = events
            .subscriber_mut(id)
            .map_err(|e| anyhow::anyhow!("event loop: {e}"))?;
        if let Some(ended) = control.ended {
            control.finish(ended);
            return match control.failure.take() {
                Some(error) => Err(error),
                None => Ok(ended),
            };
        }
    }
}

/// Owns the machine.
struct Control {
    machine: Machine,
    letters: Letters,
    signals: EndingSignals,
    listener: Option<Listener>,
    timer: Deadline,
    clients: BTreeMap<RawFd, Client>,
    /// Requests that are answered when the VM has ended: client and request id.
    waiting: Vec<(RawFd, u64)>,
    ended: Option<Ended>,
    failure: Option<anyhow::Error>,
    started: Instant,
}

impl Control {
    fn begin(&mut self) {
        self.machine.run();
        self.tell("running", None);
    }

    fn end(&mut self, ended: Ended) {
        self.ended.get_or_insert(ended);
    }

    fn fail(&mut self, error: impl Into<anyhow::Error>) {
        self.failure.get_or_insert(error.into());
        self.end(Ended::Failed);
    }

    /// Takes the machine down and tells everybody.
    fn finish(&mut self, ended: Ended) {
        self.machine.end();
        self.tell("ended", None);
        for (fd, id) in std::mem::take(&mut self.waiting) {
            let outcome = Outcome::Ended(ended);
            if let Some(client) = self.clients.get_mut(&fd) {
                client.reply(Reply { id, outcome });
            }
        }
        self.listener = None;
    }

    fn letters(&mut self) {
        for letter in self.letters.take() {
            if self.ended.is_some() {
                return;
            }
            match letter {
                Letter::Guest(event) => self.guest_event(event),
                Letter::DeviceAsks => self.machine.attend_devices(),
                Letter::EndRequested => self.end(Ended::Stopped),
                Letter::VcpuFailed { index, error }
                    if error.is_of_memory() && self.machine.mend(index) => {}
                Letter::VcpuFailed { index, error } => {
                    self.fail(anyhow::Error::new(error).context(format!("vCPU {index}")));
                }
            }
        }
    }

    fn guest_event(&mut self, event: GuestEvent) {
        match event {
            GuestEvent::PowerOff => {
                self.tell("power-off", None);
                self.end(Ended::PowerOff);
            }
            GuestEvent::Reset => self.reset(),
            GuestEvent::Panicked => {
                self.tell("panic", None);
                if self.machine.spec().on_panic == OnPanic::Exit {
                    self.end(Ended::Panic);
                }
            }
            GuestEvent::Watchdog => self.hung(),
            GuestEvent::CrashLoaded => self.tell("crash-dump", None),
            GuestEvent::DebugPort(byte) => self.tell("debug-port", Some(byte.into())),
            other => log::debug!("nobody waits for {other:?}"),
        }
    }

    fn reset(&mut self) {
        self.tell("reset", None);
        match self.machine.spec().on_reset {
            OnReset::Exit => self.end(Ended::Reset),
            OnReset::Reboot => self.reboot(),
        }
    }

    fn hung(&mut self) {
        log::warn!("the guest is hung: it does not reload its watchdog");
        self.tell("watchdog", None);
        match self.machine.spec().watchdog {
            Some(OnWatchdog::Reset) => self.reset(),
            Some(OnWatchdog::Exit) => self.end(Ended::Watchdog),
            Some(OnWatchdog::Pause) if self.machine.phase() == Phase::Running => {
                match self.machine.pause() {
                    Ok(()) => self.tell("paused", None),
                    Err(stuck) => log::error!("{stuck}"),
                }
            }
            _ => {}
        }
    }

    fn reboot(&mut self) {
        match self.machine.reset() {
            Ok(()) => {
                self.machine.run();
                self.tell("running", None);
            }
            Err(error) => {
                self.fail(anyhow::Error::new(error).context("the guest cannot boot again"));
            }
        }
    }

    /// Tells everybody who asked for events.
    fn tell(&mut self, what: &str, value: Option<u64>) {
        if self.clients.is_empty() {
            return;
        }
        let event = self.event(what, value);
        for client in self.clients.values_mut() {
            client.event(&event);
        }
    }

    fn event(&self, what: &str, value: Option<u64>) -> Event {
        let at = self.started.elapsed().as_micros();
        Event {
            at_us: u64::try_from(at).unwrap_or(u64::MAX),
            what: what.to_owned(),
            value,
        }
    }

    fn accept(&mut self, ops: &mut EventOps<'_>) {
        let Some(listener) = &self.listener else {
            return;
        };
        let Ok(connection) = listener.accept() else {
            return;
        };
        if self.clients.len() >= MAX_CLIENTS {
            log::warn!("more than {MAX_CLIENTS} control clients: one was turned away");
            return;
        }
        let fd = connection.as_fd().as_raw_fd();
        let events = Events::with_data_raw(fd, CLIENT, EventSet::IN);
        if ops.add(events).is_ok() {
            self.clients.insert(fd, Client::new(connection));
        }
    }

    fn client_ready(&mut self, fd: RawFd, ops: &mut EventOps<'_>) {
        let Some(client) = self.clients.get_mut(&fd) else {
            return;
        };
        match client.request() {
            Ok(Some(request)) => self.request(fd, &request),
            Ok(None) => {}
            Err(clients::Gone) => self.forget(fd, ops),
        }
        if self.clients.get(&fd).is_some_and(Client::is_gone) {
            self.forget(fd, ops);
        }
    }

    fn forget(&mut self, fd: RawFd, ops: &mut EventOps<'_>) {
        let _ = ops.remove(Events::with_data_raw(fd, CLIENT, EventSet::IN));
        self.clients.remove(&fd);
        self.waiting.retain(|(waiting, _)| *waiting != fd);
    }

    fn request(&mut self, fd: RawFd, request: &Request) {
        let id = request.id;
        let outcome = match self.carry_out(fd, id, &request.verb) {
            Ok(Some(outcome)) => outcome,
            Ok(None) => return,
            Err(failure) => Outcome::Failed(failure),
        };
        let now = self.event(phase_name(self.machine.phase()), None);
        if let Some(client) = self.clients.get_mut(&fd) {
            client.reply(Reply { id, outcome });
            if request.verb == Verb::Events {
                client.event(&now);
            }
        }
    }

    /// `None` when the answer comes later.
    fn carry_out(&mut self, fd: RawFd, id: u64, verb: &Verb) -> Result<Option<Outcome>, Failure> {
        match verb {
            Verb::Info => return Ok(Some(Outcome::Info(Box::new(self.machine.info())))),
            Verb::Counters => return Ok(Some(Outcome::Counters(self.machine.counters()))),
            Verb::Events => {
                if let Some(client) = self.clients.get_mut(&fd) {
                    client.follow();
                }
            }
            Verb::Pause => {
                if self.machine.phase() == Phase::Running {
                    self.machine
                        .pause()
                        .map_err(|e| failure(FailureKind::Internal, &e))?;
                    self.tell("paused", None);
                }
            }
            Verb::Resume => {
                if self.machine.phase() == Phase::Paused {
                    self.machine.run();
                    self.tell("resumed", None);
                }
            }
            Verb::ResizeDisk { id, bytes } => self.adjust(id, &Adjust::DiskSize(*bytes))?,
            Verb::ResizeMemory { bytes } => {
                self.adjust(devices::MEMORY, &Adjust::Memory(*bytes))?;
            }
            Verb::Balloon { bytes } => self.adjust(devices::BALLOON, &Adjust::Balloon(*bytes))?,
            Verb::Limits { id, limits } => self.adjust(id, &Adjust::Limits(limits.clone()))?,
            Verb::Link { id, up } => self.adjust(id, &Adjust::Link(*up))?,
            Verb::ResizeConsole { columns, rows } => {
                self.adjust(devices::CONSOLE, &Adjust::ConsoleSize(*columns, *rows))?;
            }
            Verb::PowerButton => self.press_power_button()?,
            Verb::Shutdown { timeout_s } => {
                self.press_power_button()?;
                let patience = Duration::from_secs((*timeout_s).into());
                self.timer
                    .set(patience)
                    .map_err(|e| failure(FailureKind::Internal, &e))?;
                self.waiting.push((fd, id));
                return Ok(None);
            }
            Verb::Stop => {
                self.waiting.push((fd, id));
                self.end(Ended::Stopped);
                return Ok(None);
            }
        }
        Ok(Some(Outcome::Done))
    }

    fn adjust(&self, id: &str, what: &Adjust) -> Result<(), Failure> {
        let adjusted = self.machine.adjust(id, what).ok_or_else(|| Failure {
            kind: FailureKind::NoDevice,
            message: match id {
                devices::MEMORY => {
                    "this VM's memory is fixed; start it with --memory SIZE,max=SIZE".to_owned()
                }
                devices::BALLOON => "this VM has no balloon; start it with --balloon on".to_owned(),
                _ => format!("this VM has no device `{id}`; `info` lists what it has"),
            },
        })?;
        adjusted.map_err(|error| Failure {
            kind: match error {
                AdjustError::Unsupported(_) => FailureKind::Unsupported,
                AdjustError::Value(_) => FailureKind::BadValue,
                AdjustError::Host { .. } => FailureKind::Internal,
            },
            message: format!("{id}: {:#}", anyhow::Error::from(error)),
        })
    }

    fn press_power_button(&mut self) -> Result<(), Failure> {
        if self.machine.phase() == Phase::Paused {
            return Err(Failure {
                kind: FailureKind::WrongPhase,
                message: "the VM is paused and its guest cannot answer; resume it first".to_owned(),
            });
        }
        self.machine.power_button();
        self.tell("power-button", None);
        Ok(())
    }
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Running => "running",
        Phase::Paused => "paused",
        Phase::Ending => "ending",
    }
}

fn failure(kind: FailureKind, error: &dyn std::error::Error) -> Failure {
    Failure {
        kind,
        message: error.to_string(),
    }
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let mut fds = vec![
            Events::with_data(self.letters.event(), LETTERS, EventSet::IN),
            Events::with_data(&self.signals, SIGNALS, EventSet::IN),
            Events::with_data(&self.timer, TIMER, EventSet::IN),
        ];
        if let Some(listener) = &self.listener {
            let fd = listener.as_fd().as_raw_fd();
            fds.push(Events::with_data_raw(fd, LISTENER, EventSet::IN));
        }
        for events in fds {
            if let Err(error) = ops.add(events) {
                self.fail(anyhow::anyhow!("event loop: {error}"));
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            LETTERS => self.letters(),
            SIGNALS => {
                let signal = self.signals.take();
                if signal == Some(WINDOW_CHANGED) {
                    self.machine.window_changed();
                } else if let Some(signal) = signal {
                    log::info!("signal {signal}: the VM ends");
                    self.end(Ended::Stopped);
                }
            }
            TIMER if self.timer.is_over() => {
                log::info!("the guest did not power off in time: the VM ends");
                self.end(Ended::Stopped);
            }
            LISTENER => self.accept(ops),
            CLIENT => self.client_ready(events.fd(), ops),
            _ => {}
        }
    }
}
