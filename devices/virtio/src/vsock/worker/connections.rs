//! All connections: found by id (epoll) and by ports (packets), and whose turn it is.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events};

use super::FIRST_ID;
use super::connection::Connection;
use crate::vsock::Gauges;
use crate::vsock::host::{Greeting, Unreached, VsockHost, greeting};
use crate::vsock::stream::{Phase, Stream};

/// Of a connection, for epoll.
pub(super) type Id = u32;
/// The host's and the guest's.
pub(super) type Ports = (u32, u32);

/// How long a client may take for its greeting.
const GREETING_PATIENCE: Duration = Duration::from_secs(30);
/// How long the guest may take to answer a request.
const REQUEST_PATIENCE: Duration = Duration::from_secs(10);
/// How long a listener on the host may be too busy. Linux gives up after 2 s.
const DIAL_PATIENCE: Duration = Duration::from_millis(1500);
const DIAL_AGAIN: Duration = Duration::from_millis(5);
/// How long the guest may take to confirm the end of a stream; as Linux takes it.
const CLOSE_PATIENCE: Duration = Duration::from_secs(8);
/// How long no client is let in after the process ran out of descriptors.
const CHOKED: Duration = Duration::from_millis(100);

/// The host's own ports, as they are given to its clients.
const FIRST_PORT: u32 = 1 << 30;

/// A client that has not said what it wants.
struct Client {
    socket: OwnedFd,
    deadline: Duration,
}

pub(super) struct Connections {
    all: HashMap<Id, Connection>,
    clients: HashMap<Id, Client>,
    by_ports: HashMap<Ports, Id>,
    /// Those that have data for the guest, in turn.
    ready: VecDeque<Id>,
    /// Those that owe it an answer, a credit, an end: they cost little and somebody waits, so they go
    /// before all data.
    urgent: VecDeque<Id>,
    gauges: Gauges,
    most: usize,
    last_id: Id,
    last_port: u32,
    choked_until: Option<Duration>,
    /// The earliest deadline there is, and the one the timer is set for.
    next: Option<Duration>,
    armed: Option<Duration>,
    now: Duration,
}

fn watch(socket: &OwnedFd, id: Id) -> Events {
    let set = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    Events::with_data(socket, id, set)
}

fn unwatch(socket: OwnedFd, ops: &mut EventOps<'_>) {
    // Known to the loop since it was added: events of a descriptor it does not know end it.
    let _ = ops.remove(Events::with_data_raw(socket.as_raw_fd(), 0, EventSet::IN));
    drop(socket);
}

impl Connections {
    pub(super) fn new(gauges: Gauges, most: usize) -> Self {
        Self {
            all: HashMap::new(),
            clients: HashMap::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            urgent: VecDeque::new(),
            gauges,
            most,
            last_id: FIRST_ID,
            last_port: FIRST_PORT,
            choked_until: None,
            next: None,
            armed: None,
            now: Duration::ZERO,
        }
    }

    /// It is `now`, until further notice.
    pub(super) fn tick(&mut self, now: Duration) {
        self.now = now;
    }

    /// No more can be taken now.
    pub(super) fn full(&self) -> bool {
        self.choked_until.is_some()
            || self.all.len().saturating_add(self.clients.len()) >= self.most
    }

    pub(super) fn by_ports(&self, ports: Ports) -> Option<Id> {
        self.by_ports.get(&ports).copied()
    }

    /// Bytes of the guest's that the host has not taken.
    pub(super) fn undelivered(&self) -> usize {
        self.all.values().map(|c| c.backlog.len()).sum()
    }

    fn new_id(&mut self) -> Id {
        loop {
            self.last_id = self.last_id.checked_add(1).unwrap_or(FIRST_ID);
            let id = self.last_id;
            if !self.all.contains_key(&id) && !self.clients.contains_key(&id) {
                return id;
            }
        }
    }

    /// A port of the host's that no stream with the guest's `guest_port` uses.
    fn new_port(&mut self, guest_port: u32) -> u32 {
        loop {
            self.last_port = self.last_port.wrapping_add(1).max(FIRST_PORT);
            if !self.by_ports.contains_key(&(self.last_port, guest_port)) {
                return self.last_port;
            }
        }
    }

    fn insert(&mut self, id: Id, connection: Connection) {
        self.by_ports.insert(connection.ports, id);
        self.all.insert(id, connection);
        self.gauges.streams(self.all.len());
        self.gauges.opened();
    }

    fn wait_until(&mut self, deadline: Duration) -> Duration {
        self.next = Some(self.next.map_or(deadline, |next| next.min(deadline)));
        deadline
    }

    /// The time the timer is to be set for, if that is news.
    pub(super) fn take_new_deadline(&mut self) -> Option<Duration> {
        let next = self.next?;
        if self.armed.is_some_and(|armed| armed <= next) {
            return None;
        }
        self.armed = Some(next);
        Some(next)
    }

    /// Lets waiting clients in.
    pub(super) fn accept(&mut self, host: &VsockHost, ops: &mut EventOps<'_>) {
        while !self.full() {
            let socket = match host.accept() {
                Ok(socket) => socket,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => {
                    log::warn!("vsock: a client cannot be let in: {e}");
                    self.choked_until = Some(self.wait_until(self.now.saturating_add(CHOKED)));
                    return;
                }
            };
            let id = self.new_id();
            if let Err(e) = ops.add(watch(&socket, id)) {
                log::warn!("vsock: a client cannot be watched: {e}");
                continue;
            }
            let deadline = self.wait_until(self.now.saturating_add(GREETING_PATIENCE));
            self.clients.insert(id, Client { socket, deadline });
            self.greeted(id, ops);
        }
    }

    /// Looks at what a client has said.
    fn greeted(&mut self, id: Id, ops: &mut EventOps<'_>) {
        let Some(client) = self.clients.get(&id) else {
            return;
        };
        let heard = greeting(client.socket.as_fd());
        if heard == Greeting::Partial {
            return;
        }
        let Some(Client { socket, .. }) = self.clients.remove(&id) else {
            return;
        };
        let Greeting::Port(guest_port) = heard else {
            unwatch(socket, ops);
            return;
        };
        let ports = (self.new_port(guest_port), guest_port);
        let mut connection = Connection::new(ports, Stream::requested());
        connection.socket = Some(socket);
        connection.deadline = Some(self.wait_until(self.now.saturating_add(REQUEST_PATIENCE)));
        self.insert(id, connection);
        self.settle(id, ops);
    }

    /// A stream the guest asks for; connects it to whoever serves the port.
    pub(super) fn asked(
        &mut self,
        ports: Ports,
        stream: Stream,
        host: &VsockHost,
        ops: &mut EventOps<'_>,
    ) {
        let id = self.new_id();
        let mut connection = Connection::new(ports, stream);
        connection.dial_until = self.now.saturating_add(DIAL_PATIENCE);
        self.insert(id, connection);
        self.dial(id, host, ops);
    }

    fn dial(&mut self, id: Id, host: &VsockHost, ops: &mut EventOps<'_>) {
        let Some(connection) = self.all.get_mut(&id) else {
            return;
        };
        connection.deadline = None;
        match host.dial(connection.ports.0) {
            Ok(socket) if ops.add(watch(&socket, id)).is_ok() => {
                connection.socket = Some(socket);
                connection.stream.connected();
            }
            Err(Unreached::Busy) if self.now < connection.dial_until => {
                let again = self.now.saturating_add(DIAL_AGAIN);
                connection.deadline = Some(again);
                self.wait_until(again);
            }
            Ok(_) | Err(_) => {
                self.gauges.refused();
                connection.break_off();
            }
        }
        self.settle(id, ops);
    }

    /// What epoll says of a socket.
    pub(super) fn socket(&mut self, id: Id, events: EventSet, ops: &mut EventOps<'_>) {
        if self.clients.contains_key(&id) {
            self.greeted(id, ops);
        } else {
            self.with(id, ops, |connection| connection.event(events));
        }
    }

    /// Does something with a connection and sees to what follows from it; `None` if it is gone.
    pub(super) fn with<R>(
        &mut self,
        id: Id,
        ops: &mut EventOps<'_>,
        f: impl FnOnce(&mut Connection) -> R,
    ) -> Option<R> {
        let result = f(self.all.get_mut(&id)?);
        self.settle(id, ops);
        Some(result)
    }

    /// Sees to what follows from whatever happened to a connection.
    fn settle(&mut self, id: Id, ops: &mut EventOps<'_>) {
        let Some(connection) = self.all.get_mut(&id) else {
            return;
        };
        connection.flush();
        if connection.is_through()
            && let Some(socket) = connection.socket.take()
        {
            unwatch(socket, ops);
        }
        match connection.stream.phase() {
            Phase::Gone => {
                if self.by_ports.get(&connection.ports) == Some(&id) {
                    self.by_ports.remove(&connection.ports);
                }
                if connection.socket.is_none() {
                    self.all.remove(&id);
                    self.gauges.streams(self.all.len());
                    return;
                }
            }
            Phase::Closing if connection.deadline.is_none() => {
                let deadline = self.now.saturating_add(CLOSE_PATIENCE);
                connection.deadline = Some(deadline);
                self.next = Some(self.next.map_or(deadline, |next| next.min(deadline)));
            }
            _ => {}
        }
        let (owes, has_data) = connection.wants();
        if owes && !std::mem::replace(&mut connection.urgent, true) {
            self.urgent.push_back(id);
        }
        if has_data && !std::mem::replace(&mut connection.queued, true) {
            self.ready.push_back(id);
        }
    }

    /// The connection whose turn it is to send to the guest.
    pub(super) fn next_ready(&mut self) -> Option<Id> {
        while let Some(id) = self.urgent.pop_front() {
            if let Some(connection) = self.all.get_mut(&id) {
                connection.urgent = false;
                return Some(id);
            }
        }
        loop {
            let id = self.ready.pop_front()?;
            if let Some(connection) = self.all.get_mut(&id) {
                connection.queued = false;
                return Some(id);
            }
        }
    }

    /// It keeps its turn: the guest had no buffer.
    pub(super) fn ready_first(&mut self, id: Id) {
        // Settling has put it at the end of the queue it belongs to.
        for queue in [&mut self.urgent, &mut self.ready] {
            if queue.back() == Some(&id) {
                queue.rotate_right(1);
            }
        }
    }

    /// Ends whoever's patience is over.
    pub(super) fn expire(&mut self, host: &VsockHost, ops: &mut EventOps<'_>) {
        let now = self.now;
        self.armed = None;
        self.next = None;
        self.choked_until = self.choked_until.filter(|until| *until > now);
        if let Some(until) = self.choked_until {
            self.wait_until(until);
        }
        let over = |deadline: &Duration| *deadline <= now;
        let silent = self.clients.iter().filter(|(_, c)| over(&c.deadline));
        for id in silent.map(|(id, _)| *id).collect::<Vec<_>>() {
            if let Some(client) = self.clients.remove(&id) {
                unwatch(client.socket, ops);
            }
        }
        let late = self
            .all
            .iter()
            .filter(|(_, c)| c.deadline.as_ref().is_some_and(over));
        for id in late.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.late(id, host, ops);
        }
        let left = self.clients.values().map(|c| c.deadline);
        let left = left
            .chain(self.all.values().filter_map(|c| c.deadline))
            .min();
        if let Some(at) = left {
            self.wait_until(at);
        }
    }

    fn late(&mut self, id: Id, host: &VsockHost, ops: &mut EventOps<'_>) {
        let asked = |c: &Connection| c.stream.phase() == Phase::Asked;
        if self.all.get(&id).is_some_and(asked) {
            self.dial(id, host, ops);
            return;
        }
        self.with(id, ops, |connection| {
            connection.deadline = None;
            connection.break_off();
        });
    }

    /// The guest was away for a while that does not count.
    pub(super) fn be_patient_again(&mut self) {
        let until = self.now.saturating_add(REQUEST_PATIENCE);
        let deadlines = self.all.values_mut().filter_map(|c| c.deadline.as_mut());
        for deadline in deadlines {
            *deadline = (*deadline).max(until);
        }
    }

    /// The guest has forgotten everything. What it had sent is still delivered.
    pub(super) fn guest_is_gone(&mut self, ops: &mut EventOps<'_>) {
        for (_, client) in self.clients.drain() {
            unwatch(client.socket, ops);
        }
        for id in self.all.keys().copied().collect::<Vec<_>>() {
            self.with(id, ops, |connection| connection.stream.lost());
        }
        self.ready.clear();
        self.urgent.clear();
    }
}
