//! The one who talks to the back-end, in the device's own thread, for the life of the device.
//!
//! ```text
//!              start ─▶ served by the back-end ◀───── back again, rings handed over ─────┐
//!   idle ◀── stop ──── or answered here: no back-end  ── timer: try again (reconnect) ───┘
//! ```
//! Model, control thread and RAM listener call in by [`Attachment::with`](crate::Attachment::with),
//! and wait no longer than the deadlines below. A back-end that breaks the protocol or takes too
//! long is treated as one that has gone: what it held is answered with errors here, and so is what
//! the driver asks for later, until there is a back-end again or the driver resets the device. The
//! driver never waits for nobody.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use testudo_memory::{RamHandle, RamRange, RamView};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::connection::{Connection, Deadline, PeerError};
use super::kind::Profile;
use super::link::Link;
use super::table::Region;
use super::{Shared, control};
use crate::model::{Activated, ActiveQueue, Queues};
use crate::queue::QueueFault;
use crate::signal::DeviceEvents;
use crate::timer::Timer;

/// How long a back-end may take over one exchange: a start, a stop, a change of RAM.
pub(super) const PATIENCE: Duration = Duration::from_secs(4);

/// The first wait before a back-end that has gone is looked for again; each wait is twice as long.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// A back-end that stayed so long is looked for eagerly when it goes.
const STEADY: Duration = Duration::from_secs(10);

const WAKE: u32 = 0;
const TIMER: u32 = 1;
const SOCKET: u32 = 2;
const REQUESTS: u32 = 3;
const QUEUES: u32 = 16;

/// The queues between start and stop.
struct Active {
    ram: RamHandle,
    features: u64,
    device: DeviceEvents,
    queues: Queues,
    /// The back-end has the rings.
    served: bool,
    /// Rings below this number are in use.
    enabled: u16,
}

pub(super) struct Worker {
    profile: Profile,
    /// Where a back-end that has gone is looked for.
    path: Option<PathBuf>,
    shared: Arc<Shared>,
    link: Option<Link>,
    since: Instant,
    /// What is to be dropped once nobody watches its sockets.
    retired: Vec<(Option<Link>, Option<Connection>)>,
    active: Option<Active>,
    wake: EventFd,
    timer: Timer,
    wait: Duration,
    watched: BTreeMap<u32, RawFd>,
}

impl Worker {
    pub(super) fn new(
        profile: Profile,
        path: Option<PathBuf>,
        shared: Arc<Shared>,
        link: Link,
        wake: EventFd,
        timer: Timer,
    ) -> Self {
        Self {
            profile,
            path,
            shared,
            link: Some(link),
            since: Instant::now(),
            retired: Vec::new(),
            active: None,
            wake,
            timer,
            wait: FIRST_WAIT,
            watched: BTreeMap::new(),
        }
    }

    /// Takes the queues and hands them to the back-end, if there is one.
    pub(super) fn start(&mut self, on: Activated) {
        self.active = Some(Active {
            ram: on.ram,
            features: on.features,
            device: on.device,
            queues: on.queues,
            served: false,
            enabled: self.profile.enabled_at_first(),
        });
        if self.link.is_none()
            && let Err(e) = self.connect()
        {
            log::debug!("virtio-{}: {e}", self.profile.name());
            self.without_link(&e);
        } else if let Err(e) = self.hand_over() {
            self.lose(&e);
        }
        self.look_again();
    }

    /// Takes the queues back from whoever has them.
    pub(super) fn stop(&mut self) -> Queues {
        if let Err(e) = self.take_back() {
            self.lose(&e);
        }
        self.look_again();
        self.active.take().map(|a| a.queues).unwrap_or_default()
    }

    /// Writes a part of the configuration space that is the back-end's.
    pub(super) fn write_config(&mut self, offset: u64, data: &[u8]) {
        let deadline = Deadline::after(PATIENCE);
        let Some(link) = self.link.as_ref().filter(|link| link.has_config()) else {
            return;
        };
        let written = link.write_config(offset, data, deadline);
        if let Err(e) = written.and_then(|()| self.refresh_config(deadline)) {
            self.lose(&e);
            self.look_again();
        }
    }

    /// A range of guest RAM is about to come.
    pub(super) fn ram_added(&mut self, range: &RamRange) -> Result<(), PeerError> {
        let region = Region::of(range)?;
        self.change_table(|table| {
            if !table.contains(&region) {
                table.push(region);
            }
        })
    }

    /// A range of guest RAM is about to go.
    pub(super) fn ram_removed(&mut self, range: &RamRange) -> Result<(), PeerError> {
        let region = Region::of(range)?;
        self.change_table(|table| table.retain(|r| *r != region))
    }

    fn change_table(&mut self, change: impl FnOnce(&mut Vec<Region>)) -> Result<(), PeerError> {
        // A back-end that has no table yet gets a whole one at the start.
        let Some(link) = self.link.as_mut().filter(|link| !link.table().is_empty()) else {
            return Ok(());
        };
        let mut table = link.table().to_vec();
        change(&mut table);
        match link.set_table(table, Deadline::after(PATIENCE)) {
            Err(e @ (PeerError::Refused { .. } | PeerError::Unfit(_))) => Err(e),
            Err(e) => {
                self.lose(&e);
                self.look_again();
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    fn connect(&mut self) -> Result<(), PeerError> {
        let path = self.path.as_ref().ok_or(PeerError::Closed)?;
        let deadline = Deadline::after(PATIENCE);
        let link = Link::open(Connection::open(path)?, &self.profile, deadline)?;
        let known = self.profile.backend_features();
        let missing = self.shared.offered & known & !link.features();
        if missing != 0 {
            return Err(PeerError::Unfit(format!(
                "that came back lacks features {missing:#x} of the one before"
            )));
        }
        self.link = Some(link);
        self.since = Instant::now();
        self.refresh_config(deadline)?;
        self.shared.connected.store(1, Ordering::Relaxed);
        self.shared.reconnects.fetch_add(1, Ordering::Relaxed);
        log::info!("virtio-{}: there is a back-end again", self.profile.name());
        Ok(())
    }

    fn refresh_config(&mut self, deadline: Deadline) -> Result<(), PeerError> {
        if let Some(link) = self.link.as_ref().filter(|link| link.has_config()) {
            let config = link.read_config(self.profile.config_len(), deadline)?;
            self.shared.set_config(config);
        }
        Ok(())
    }

    fn hand_over(&mut self) -> Result<(), PeerError> {
        let (Some(link), Some(active)) = (&mut self.link, &mut self.active) else {
            return Ok(());
        };
        let deadline = Deadline::after(PATIENCE);
        let rings = self.profile.rings();
        link.set_features(active.features, deadline)?;
        link.set_table(Region::all(&active.ram.memory())?, deadline)?;
        // From here on the back-end may have rings, whatever goes wrong.
        active.served = true;
        let of_backend = || active.queues.iter().filter(|q| q.index < rings);
        for queue in of_backend() {
            link.start_ring(queue, queue.index < active.enabled, deadline)?;
        }
        link.fence(deadline)?;
        for queue in of_backend() {
            // What was made available before is looked at now.
            let _ = queue.kick.write(1);
        }
        Ok(())
    }

    fn take_back(&mut self) -> Result<(), PeerError> {
        let (Some(link), Some(active)) = (&self.link, &mut self.active) else {
            return Ok(());
        };
        if !active.served {
            return Ok(());
        }
        let deadline = Deadline::after(PATIENCE);
        let rings = self.profile.rings();
        let view = active.ram.memory();
        for queue in active.queues.iter_mut().filter(|q| q.index < rings) {
            if link.stop_ring(queue, &view, deadline)? {
                // The back-end returned chains after it had been told to be silent.
                queue.interrupt.fire();
            }
        }
        active.served = false;
        Ok(())
    }

    /// The back-end is gone, or is treated as gone.
    fn lose(&mut self, why: &PeerError) {
        if let Some(link) = self.link.take() {
            link.connection().shut_down();
            self.retired.push((Some(link), None));
            self.shared.connected.store(0, Ordering::Relaxed);
            self.shared.lost.fetch_add(1, Ordering::Relaxed);
            log::warn!(
                "virtio-{}: back-end lost: {}",
                self.profile.name(),
                said(why)
            );
        }
        if self.since.elapsed() >= STEADY {
            self.wait = FIRST_WAIT;
        }
        self.without_link(why);
    }

    fn without_link(&mut self, why: &PeerError) {
        let rings = self.profile.rings();
        if let Some(active) = &mut self.active {
            let view = active.ram.memory();
            if std::mem::take(&mut active.served) {
                for queue in active.queues.iter_mut().filter(|q| q.index < rings) {
                    if let Err(e) = queue.queue.reclaim(&view) {
                        active.device.needs_reset(&e);
                    }
                }
            }
            if self.profile.options().reconnect {
                active.device.config_changed();
            } else {
                active.device.needs_reset(why);
            }
        }
        if self.profile.options().reconnect {
            self.set_timer();
        }
    }

    fn set_timer(&mut self) {
        if let Err(e) = self.timer.set(self.wait) {
            log::error!("virtio-{}: timer: {e}", self.profile.name());
        }
        self.wait = self.wait.saturating_mul(2).min(LONGEST_WAIT);
    }

    fn try_again(&mut self) {
        if self.link.is_some() || !self.profile.options().reconnect {
            return;
        }
        if let Err(e) = self.connect() {
            log::debug!("virtio-{}: {}", self.profile.name(), said(&e));
            self.retired.push((self.link.take(), None));
            self.set_timer();
            return;
        }
        if let Err(e) = self.hand_over() {
            self.lose(&e);
        } else if let Some(active) = &self.active {
            active.device.config_changed();
        }
    }

    fn backend_asks(&mut self) -> Result<(), PeerError> {
        let deadline = Deadline::after(PATIENCE);
        if let Some(link) = &mut self.link {
            match link.take_request(deadline) {
                Err(PeerError::Closed) => {
                    self.retired.push((None, link.end_requests()));
                    return Ok(());
                }
                taken => taken?,
            }
            self.refresh_config(deadline)?;
            if let Some(active) = &self.active {
                active.device.config_changed();
            }
        }
        Ok(())
    }

    /// Has [`MutEventSubscriber::process`] run, which alone can change what is watched.
    fn look_again(&self) {
        let _ = self.wake.write(1);
    }

    /// Serves what is not the back-end's to serve.
    fn serve(&mut self) {
        let Some(mut active) = self.active.take() else {
            return;
        };
        let (view, rings) = (active.ram.memory(), self.profile.rings());
        let control = self.profile.control_queue();
        let mut enabled = active.enabled;
        for queue in &mut active.queues {
            let served = if Some(queue.index) == control {
                control::serve(&mut queue.queue, &view, |pairs| {
                    self.set_pairs(pairs, active.served, &mut enabled)
                })
            } else if !active.served && queue.index < rings && self.profile.answers(queue.index) {
                refuse(&self.profile, queue, &view)
            } else {
                Ok(())
            };
            if let Err(e) = served {
                active.device.needs_reset(&e);
            }
        }
        active.enabled = enabled;
        self.active = Some(active);
    }

    /// The driver uses `pairs` pairs of queues from now on.
    fn set_pairs(&self, pairs: u16, served: bool, enabled: &mut u16) -> bool {
        let rings = pairs.saturating_mul(2);
        if pairs == 0 || rings > self.profile.rings() {
            return false;
        }
        let (from, to) = (rings.min(*enabled), rings.max(*enabled));
        let on = rings > *enabled;
        *enabled = rings;
        let Some(link) = self.link.as_ref().filter(|_| served) else {
            return true;
        };
        let deadline = Deadline::after(PATIENCE);
        let done = (from..to).try_for_each(|index| link.enable_ring(index, on, deadline));
        if let Err(e) = done {
            // The socket's event brings the loss about.
            log::debug!("virtio-{}: {}", self.profile.name(), said(&e));
            link.connection().shut_down();
            return false;
        }
        true
    }

    /// What is to be watched now.
    fn wanted(&self) -> BTreeMap<u32, RawFd> {
        let mut wanted = BTreeMap::from([
            (WAKE, self.wake.as_raw_fd()),
            (TIMER, self.timer.as_raw_fd()),
        ]);
        if let Some(link) = &self.link {
            wanted.insert(SOCKET, link.connection().as_raw_fd());
            let requests = link.requests().map(AsRawFd::as_raw_fd);
            wanted.extend(requests.map(|fd| (REQUESTS, fd)));
        }
        if let Some(active) = &self.active {
            let control = self.profile.control_queue();
            let here = active.queues.iter().filter(|q| {
                Some(q.index) == control || (!active.served && self.profile.answers(q.index))
            });
            wanted
                .extend(here.map(|q| (QUEUES.saturating_add(q.index.into()), q.kick.as_raw_fd())));
        }
        wanted
    }

    fn watch(&mut self, ops: &mut EventOps<'_>) {
        let wanted = self.wanted();
        let stale: Vec<(u32, RawFd)> = self
            .watched
            .iter()
            .filter(|(data, fd)| wanted.get(data) != Some(fd))
            .map(|(data, fd)| (*data, *fd))
            .collect();
        for (data, fd) in stale {
            self.watched.remove(&data);
            if let Err(e) = ops.remove(Events::empty_raw(fd)) {
                log::error!("virtio-{}: event loop: {e:?}", self.profile.name());
            }
        }
        self.retired.clear();
        for (data, fd) in wanted {
            if self.watched.contains_key(&data) {
                continue;
            }
            match ops.add(Events::with_data_raw(fd, data, EventSet::IN)) {
                Ok(()) => {
                    self.watched.insert(data, fd);
                }
                Err(e) => log::error!("virtio-{}: event loop: {e:?}", self.profile.name()),
            }
        }
    }
}

/// Answers what waits in `queue` in place of the back-end that is not there.
fn refuse(profile: &Profile, queue: &mut ActiveQueue, view: &RamView) -> Result<(), QueueFault> {
    queue.queue.drain(view, |queue, chain| {
        let written = profile.refuse(view, &chain);
        queue.count_error();
        queue.push(view, chain, written)?;
        Ok(ControlFlow::Continue(()))
    })?;
    queue.queue.notify(view)
}

/// An error with its cause.
fn said(error: &PeerError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

impl MutEventSubscriber for Worker {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            WAKE => {
                let _ = self.wake.read();
            }
            TIMER => {
                self.timer.take();
                self.try_again();
            }
            // Nothing comes that was not asked for, except the end.
            SOCKET => self.lose(&PeerError::Closed),
            REQUESTS => {
                if let Err(e) = self.backend_asks() {
                    self.lose(&e);
                }
            }
            queue => {
                let index = queue
                    .checked_sub(QUEUES)
                    .and_then(|n| u16::try_from(n).ok());
                let queues = self.active.iter().flat_map(|active| &active.queues);
                for queue in queues.filter(|q| Some(q.index) == index) {
                    let _ = queue.kick.read();
                }
            }
        }
        self.serve();
        self.watch(ops);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.watch(ops);
    }
}
