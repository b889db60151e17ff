//! A queue pair served by the kernel: rings, kicks, interrupts and a tap are vhost-net's between
//! start and stop; this process keeps the control queue, the link and the counters of errors.
//!
//! ```text
//!   start: features, rings, eventfds ─▶ running ─connect(wire)─▶ frames move, no thread of ours
//!                                          │ ◀──connect(none)──      (link down, pair not in use)
//!   stop: connect(none) drains ─▶ positions back into the VirtQueues
//! ```

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use testudo_memory::RamHandle;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::control::Control;
use super::shared::{Begin, Lane, Shared};
use super::vhost::{VhostError, VhostNet};
use super::wire::Wire;
use crate::model::ActiveQueue;
use crate::signal::DeviceEvents;

const RX: u32 = 0;
const TX: u32 = 1;

/// The kernel's data path of one queue pair.
pub(super) struct KernelPath {
    vhost: VhostNet,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Kicks of the rings that the kernel has.
    running: Option<[Arc<EventFd>; 2]>,
    connected: bool,
}

impl KernelPath {
    pub(super) fn new(vhost: VhostNet) -> Self {
        Self {
            vhost,
            state: Mutex::default(),
        }
    }

    pub(super) fn missing(&self) -> u64 {
        self.vhost.missing()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the rings reach `wire`, or none. Rings that the kernel does not have are left alone.
    pub(super) fn connect(&self, wire: Option<&Wire>) -> io::Result<()> {
        let mut state = self.state();
        let Some(kicks) = &state.running else {
            return Ok(());
        };
        if state.connected == wire.is_some() {
            return Ok(());
        }
        let fd = wire.map_or(-1, AsRawFd::as_raw_fd);
        for ring in [RX, TX] {
            if let Err(e) = self.vhost.set_backend(ring, fd) {
                let _ = self.vhost.set_backend(RX, -1);
                return Err(io::Error::other(e));
            }
        }
        if wire.is_some() {
            // What was made available before nobody would look at.
            for kick in kicks {
                let _ = kick.write(1);
            }
        }
        state.connected = wire.is_some();
        Ok(())
    }

    /// Gives both rings to the kernel, not connected yet.
    fn start(
        &self,
        features: u64,
        pair: &Pair,
        ram: &RamHandle,
        errors: &EventFd,
    ) -> Result<(), VhostError> {
        let view = ram.memory();
        self.vhost.set_features(features)?;
        for (ring, queue) in [(RX, &pair.rx), (TX, &pair.tx)] {
            self.vhost
                .set_ring(ring, queue, &view, errors.as_raw_fd())?;
        }
        let kicks = [Arc::clone(&pair.rx.kick), Arc::clone(&pair.tx.kick)];
        self.state().running = Some(kicks);
        Ok(())
    }

    /// Takes the rings back, with everything under way at its end.
    fn stop(&self, pair: &mut Pair, ram: &RamHandle) -> Result<(), VhostError> {
        if self.state().running.is_none() {
            return Ok(());
        }
        if let Err(e) = self.connect(None) {
            log::warn!("virtio-net: {e}");
        }
        self.state().running = None;
        let view = ram.memory();
        for (ring, queue) in [(RX, &mut pair.rx), (TX, &mut pair.tx)] {
            let next = self.vhost.take_ring(ring)?;
            queue.queue.continue_at(&view, next)?;
        }
        Ok(())
    }
}

/// The two queues of a pair.
pub(super) struct Pair {
    pub(super) rx: ActiveQueue,
    pub(super) tx: ActiveQueue,
}

const WAKE: u32 = 0;
const ERROR: u32 = 1;
const CONTROL: u32 = 2;

/// What this process does for a pair that the kernel serves.
pub(super) struct KernelWorker {
    lane: Arc<Lane>,
    shared: Arc<Shared>,
    /// `None` once they have been taken back.
    pair: Option<Pair>,
    control: Option<Control>,
    begin: Begin,
    ram: RamHandle,
    device: DeviceEvents,
    /// How the start went.
    started: Result<(), VhostError>,
}

impl KernelWorker {
    pub(super) fn new(
        lane: Arc<Lane>,
        shared: Arc<Shared>,
        pair: Pair,
        control: Option<Control>,
        begin: Begin,
        ram: RamHandle,
        device: DeviceEvents,
    ) -> Self {
        Self {
            lane,
            shared,
            pair: Some(pair),
            control,
            begin,
            ram,
            device,
            started: Ok(()),
        }
    }

    /// How the start went; asked once.
    pub(super) fn started(&mut self) -> Result<(), VhostError> {
        std::mem::replace(&mut self.started, Ok(()))
    }

    /// Takes the rings back from the kernel.
    pub(super) fn halt(&mut self) {
        if let (Some(pair), Some(kernel)) = (&mut self.pair, &self.lane.kernel)
            && let Err(e) = kernel.stop(pair, &self.ram)
        {
            log::warn!("virtio-net: the kernel's rings do not come back: {e}");
            self.device.needs_reset(&e);
        }
    }

    pub(super) fn into_queues(mut self) -> Vec<ActiveQueue> {
        let pair = self.pair.take();
        let control = self.control.take().map(|control| control.queue);
        let pair = pair.into_iter().flat_map(|pair| [pair.rx, pair.tx]);
        pair.chain(control).collect()
    }

    fn start(&self) -> Result<(), VhostError> {
        let (Some(pair), Some(kernel)) = (&self.pair, &self.lane.kernel) else {
            return Ok(());
        };
        self.begin
            .carry_out(&self.shared)
            .map_err(VhostError::Wire)?;
        kernel.start(self.begin.features, pair, &self.ram, &self.lane.errors)?;
        self.lane
            .connect(self.shared.link())
            .map_err(VhostError::Wire)
    }

    fn register(&self, ops: &mut EventOps<'_>) -> Result<(), event_manager::Error> {
        ops.add(Events::with_data(&self.lane.wake, WAKE, EventSet::IN))?;
        ops.add(Events::with_data(&self.lane.errors, ERROR, EventSet::IN))?;
        match &self.control {
            Some(control) => ops.add(Events::with_data(
                &*control.queue.kick,
                CONTROL,
                EventSet::IN,
            )),
            None => Ok(()),
        }
    }

    fn answer_commands(&mut self, ops: &mut EventOps<'_>) {
        let Some(control) = &mut self.control else {
            return;
        };
        let _ = control.queue.kick.read();
        let ram = self.ram.memory();
        if let Err(e) = control.serve(&ram) {
            self.device.needs_reset(&e);
            let _ = ops.remove(Events::new(&*control.queue.kick, EventSet::IN));
        }
    }
}

impl MutEventSubscriber for KernelWorker {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            WAKE => {
                let _ = self.lane.wake.read();
                if let Err(e) = self.lane.connect(self.shared.link()) {
                    self.device.needs_reset(&e);
                }
            }
            ERROR => {
                let _ = self.lane.errors.read();
                let e = io::Error::other("vhost-net cannot use the rings");
                self.device.needs_reset(&e);
            }
            CONTROL => self.answer_commands(ops),
            _ => {}
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.started = self.start();
        if let Err(e) = self.register(ops) {
            self.device.needs_reset(&e);
        }
        // Commands from before a pause bring no kick.
        if let (Ok(()), Some(control)) = (&self.started, &self.control) {
            let _ = control.queue.kick.write(1);
        }
    }
}

impl Drop for KernelWorker {
    fn drop(&mut self) {
        self.halt();
    }
}
