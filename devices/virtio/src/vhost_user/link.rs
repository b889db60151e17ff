//! A connection on which both sides have agreed what they speak, and the exchanges that set a device
//! up and take it down.
//!
//! ```text
//!   open: features, protocol features, owner          start: features, RAM, each ring, kick
//!   stop: each ring off, its position, wait until the used ring has caught up with it
//! ```
//! Any error leaves the back-end in a state nobody knows: the link is to be dropped.

use std::os::fd::{AsFd, BorrowedFd};
use std::thread;
use std::time::Duration;

use testudo_memory::RamView;

use super::connection::{Connection, Deadline, PeerError, ask, name};
use super::kind::Profile;
use super::message::{
    MAX_CONFIG, Malformed, PROTOCOL_FEATURES, Payload, Request, backend_acknowledgement, protocol,
};
use super::table::{BASELINE, Region};
use crate::model::{ActiveQueue, features};
use crate::queue::QueueFault;

/// Sent instead of a queue's descriptor: there is none.
const NO_FD: u64 = 1 << 8;
/// How long a back-end that has stopped a ring may take to return what it holds.
const DRAIN: Duration = Duration::from_secs(2);
const DRAIN_STEP: Duration = Duration::from_millis(1);

/// A link.
pub(super) struct Link {
    connection: Connection,
    /// The other direction: what the back-end asks for.
    requests: Option<Connection>,
    features: u64,
    protocol: u64,
    slots: usize,
    table: Vec<Region>,
}

impl Link {
    /// Agrees with the back-end on `connection` about a device of `profile`.
    pub(super) fn open(
        connection: Connection,
        profile: &Profile,
        deadline: Deadline,
    ) -> Result<Self, PeerError> {
        let mut link = Self {
            connection,
            requests: None,
            features: 0,
            protocol: 0,
            slots: BASELINE,
            table: Vec::new(),
        };
        link.order(Request::SetOwner, &Payload::default(), &[], deadline)?;
        link.features = link.get(Request::GetFeatures, deadline)?;
        if link.features & features::VERSION_1 == 0 {
            return Err(unfit("offers no modern device (VIRTIO_F_VERSION_1)"));
        }
        if link.features & PROTOCOL_FEATURES != 0 {
            link.agree_protocol(profile, deadline)?;
        }
        let most = if link.protocol & protocol::MQ != 0 {
            link.get(Request::GetQueueNum, deadline)?
        } else {
            profile.queues_without_mq()
        };
        let wanted = profile.rings();
        if u64::from(wanted) > most {
            return Err(unfit(&format!(
                "has {most} queues, this device needs {wanted}; set `queues` lower"
            )));
        }
        Ok(link)
    }

    fn agree_protocol(&mut self, profile: &Profile, deadline: Deadline) -> Result<(), PeerError> {
        let offered = self.get(Request::GetProtocolFeatures, deadline)?;
        let mut wanted = protocol::MQ | protocol::REPLY_ACK | protocol::CONFIGURE_MEM_SLOTS;
        if profile.asks_for_config() {
            wanted |= protocol::CONFIG | protocol::BACKEND_REQ;
        }
        let agreed = offered & wanted;
        let payload = Payload::default().u64(agreed);
        // Acknowledgements begin once this is agreed.
        self.order(Request::SetProtocolFeatures, &payload, &[], deadline)?;
        self.protocol = agreed;
        if agreed & protocol::CONFIGURE_MEM_SLOTS != 0 {
            let slots = self.get(Request::GetMaxMemSlots, deadline)?;
            self.slots = usize::try_from(slots).unwrap_or(usize::MAX);
        }
        if agreed & protocol::BACKEND_REQ != 0 {
            let (ours, theirs) = Connection::pair().map_err(|source| PeerError::Io {
                request: name(Request::SetBackendReqFd),
                source,
            })?;
            let none = Payload::default();
            self.order(Request::SetBackendReqFd, &none, &[theirs.as_fd()], deadline)?;
            self.requests = Some(ours);
        }
        Ok(())
    }

    /// What the back-end offers.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    pub(super) fn requests(&self) -> Option<&Connection> {
        self.requests.as_ref()
    }

    /// Takes a request of the back-end's: that the configuration space be read again.
    pub(super) fn take_request(&self, deadline: Deadline) -> Result<(), PeerError> {
        let request = "CONFIG_CHANGE_MSG";
        let Some(requests) = &self.requests else {
            return Ok(());
        };
        let wants_reply = requests
            .header(request, deadline)?
            .backend_request()
            .map_err(|source| PeerError::Malformed { request, source })?;
        if wants_reply {
            requests.send_bytes(request, &backend_acknowledgement(), &[], deadline)?;
        }
        Ok(())
    }

    /// Takes the channel for the back-end's requests away: it has closed it, which it may.
    pub(super) fn end_requests(&mut self) -> Option<Connection> {
        self.requests.take()
    }

    /// Whether the back-end keeps the configuration space.
    pub(super) fn has_config(&self) -> bool {
        self.protocol & protocol::CONFIG != 0
    }

    /// Reads the first `len` bytes of the configuration space.
    pub(super) fn read_config(&self, len: usize, deadline: Deadline) -> Result<Vec<u8>, PeerError> {
        let len = len.min(MAX_CONFIG);
        let request = Request::GetConfig;
        let ask = Payload::config(0, &vec![0; len]);
        self.connection
            .send(request, &ask.message(request, false), &[], deadline)?;
        let mut reply = vec![0; len.saturating_add(12)];
        self.connection.reply(request, &mut reply, deadline)?;
        Ok(reply.split_off(12))
    }

    /// Writes a part of the configuration space.
    pub(super) fn write_config(
        &self,
        offset: u64,
        data: &[u8],
        deadline: Deadline,
    ) -> Result<(), PeerError> {
        let offset = u32::try_from(offset).unwrap_or(u32::MAX);
        let payload = Payload::config(offset, data);
        self.order(Request::SetConfig, &payload, &[], deadline)
    }

    /// Brings the back-end's account of guest RAM in step with `wanted`.
    pub(super) fn set_table(
        &mut self,
        wanted: Vec<Region>,
        deadline: Deadline,
    ) -> Result<(), PeerError> {
        if wanted == self.table {
            return Ok(());
        }
        if wanted.len() > self.slots.max(BASELINE) {
            return Err(unfit(&format!(
                "takes {} ranges of guest RAM, there are {}",
                self.slots,
                wanted.len()
            )));
        }
        if self.protocol & protocol::CONFIGURE_MEM_SLOTS != 0 {
            let one = |region: &Region| region.describe(Payload::default().u64(0));
            for gone in self.table.iter().filter(|r| !wanted.contains(r)) {
                self.order(Request::RemMemReg, &one(gone), &[], deadline)?;
            }
            for new in wanted.iter().filter(|r| !self.table.contains(r)) {
                self.order(Request::AddMemReg, &one(new), &[new.fd()], deadline)?;
            }
        } else {
            let count = u32::try_from(wanted.len()).unwrap_or(u32::MAX);
            let head = Payload::default().u32(count).u32(0);
            let table = wanted.iter().fold(head, |table, r| r.describe(table));
            let fds: Vec<BorrowedFd<'_>> = wanted.iter().map(Region::fd).collect();
            self.order(Request::SetMemTable, &table, &fds, deadline)?;
        }
        self.table = wanted;
        self.fence(deadline)
    }

    pub(super) fn table(&self) -> &[Region] {
        &self.table
    }

    /// Tells the back-end what driver and device agreed on.
    pub(super) fn set_features(&self, accepted: u64, deadline: Deadline) -> Result<(), PeerError> {
        let known = (accepted | PROTOCOL_FEATURES) & self.features;
        let payload = Payload::default().u64(known);
        self.order(Request::SetFeatures, &payload, &[], deadline)
    }

    /// Hands a ring over, from where it stands.
    pub(super) fn start_ring(
        &self,
        queue: &ActiveQueue,
        enabled: bool,
        deadline: Deadline,
    ) -> Result<(), PeerError> {
        let index = queue.index;
        let areas = queue.queue.areas();
        let parts = [areas.descriptors, areas.device, areas.driver];
        let within = |(at, len): (vm_memory::GuestAddress, usize)| {
            self.table.iter().any(|region| region.holds(at.0, len))
        };
        if !parts.into_iter().all(within) {
            return Err(unfit(&format!(
                "cannot reach queue {index}, which lies across ranges of guest RAM"
            )));
        }
        let order = |request, payload: Payload| self.order(request, &payload, &[], deadline);
        let size = queue.queue.size().into();
        order(Request::SetVringNum, Payload::vring(index, size))?;
        let (next_avail, _) = queue.queue.positions();
        order(
            Request::SetVringBase,
            Payload::vring(index, next_avail.into()),
        )?;
        let addresses = parts
            .into_iter()
            .fold(Payload::vring(index, 0), |p, (at, _)| p.u64(at.0));
        // No log of dirty pages.
        order(Request::SetVringAddr, addresses.u64(0))?;
        let call = queue.interrupt.event();
        self.set_fd(Request::SetVringCall, index, call, deadline)?;
        self.set_fd(Request::SetVringKick, index, Some(&queue.kick), deadline)?;
        self.enable_ring(index, enabled, deadline)
    }

    fn set_fd(
        &self,
        request: Request,
        index: u16,
        event: Option<&vmm_sys_util::eventfd::EventFd>,
        deadline: Deadline,
    ) -> Result<(), PeerError> {
        let index = u64::from(index);
        match event {
            // The signal of an interrupt is KVM's own descriptor: the back-end's write is the
            // interrupt.
            Some(event) => {
                let payload = Payload::default().u64(index);
                self.order(request, &payload, &[borrow(event)], deadline)
            }
            None => {
                let payload = Payload::default().u64(index | NO_FD);
                self.order(request, &payload, &[], deadline)
            }
        }
    }

    /// Lets the back-end serve a ring, or not.
    pub(super) fn enable_ring(
        &self,
        index: u16,
        enabled: bool,
        deadline: Deadline,
    ) -> Result<(), PeerError> {
        if self.features & PROTOCOL_FEATURES == 0 {
            // Then a ring is served from its kick on.
            return Ok(());
        }
        let payload = Payload::vring(index, enabled.into());
        self.order(Request::SetVringEnable, &payload, &[], deadline)
    }

    /// Takes a ring back; waits until everything that was taken from it has been returned. Returns
    /// whether there was something to wait for.
    pub(super) fn stop_ring(
        &self,
        queue: &mut ActiveQueue,
        ram: &RamView,
        deadline: Deadline,
    ) -> Result<bool, PeerError> {
        let request = Request::GetVringBase;
        self.enable_ring(queue.index, false, deadline)?;
        let payload = Payload::vring(queue.index, 0);
        let reply: [u8; 8] = ask(&self.connection, request, &payload, deadline)?;
        let [a, b, c, d, e, f, g, h] = reply;
        let [index, base] = [[a, b, c, d], [e, f, g, h]].map(u32::from_ne_bytes);
        let wrong = |value: u32| PeerError::Malformed {
            request: name(request),
            source: Malformed::Value(value.into()),
        };
        if index != u32::from(queue.index) {
            return Err(wrong(index));
        }
        let base = u16::try_from(base).map_err(|_| wrong(base))?;
        let drained = Deadline::after(DRAIN);
        let mut waited = false;
        loop {
            let used = queue.queue.used_index(ram).map_err(|e| lost_ring(&e))?;
            if used == base {
                break;
            }
            if drained.passed() {
                return Err(unfit(&format!(
                    "stopped queue {} with {} chains in flight",
                    queue.index,
                    base.wrapping_sub(used)
                )));
            }
            waited = true;
            thread::sleep(DRAIN_STEP);
        }
        queue
            .queue
            .continue_at(ram, base)
            .map_err(|e| lost_ring(&e))?;
        Ok(waited)
    }

    /// Waits until the back-end has done what it was told.
    pub(super) fn fence(&self, deadline: Deadline) -> Result<(), PeerError> {
        if self.protocol & protocol::REPLY_ACK == 0 {
            self.get(Request::GetFeatures, deadline)?;
        }
        Ok(())
    }

    fn get(&self, request: Request, deadline: Deadline) -> Result<u64, PeerError> {
        ask(&self.connection, request, &Payload::default(), deadline).map(u64::from_ne_bytes)
    }

    /// Sends what has no reply of its own; waits for the acknowledgement if there are such.
    fn order(
        &self,
        request: Request,
        payload: &Payload,
        fds: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<(), PeerError> {
        let acknowledged = self.protocol & protocol::REPLY_ACK != 0;
        let message = payload.message(request, acknowledged);
        self.connection.send(request, &message, fds, deadline)?;
        if !acknowledged {
            return Ok(());
        }
        let mut code = [0; 8];
        self.connection.reply(request, &mut code, deadline)?;
        match u64::from_ne_bytes(code) {
            0 => Ok(()),
            code => Err(PeerError::Refused {
                request: name(request),
                code,
            }),
        }
    }
}

fn unfit(why: &str) -> PeerError {
    PeerError::Unfit(why.to_owned())
}

fn lost_ring(fault: &QueueFault) -> PeerError {
    PeerError::Unfit(format!("left a ring that cannot be read: {fault}"))
}

#[expect(unsafe_code, reason = "an eventfd's descriptor as a borrowed one")]
fn borrow(event: &vmm_sys_util::eventfd::EventFd) -> BorrowedFd<'_> {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open as long as `event` lives, and is borrowed for no longer.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
