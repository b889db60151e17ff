//! A back-end for tests, in a thread of this process: serves rings with the engine of this crate.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketFlags,
    SocketType,
};
use testudo_memory::RamView;
use vm_memory::{FileOffset, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::model::features;
use crate::queue::{CheckedQueue, QueueRegisters, VirtQueue};
use crate::signal::{Interrupts, QueueInterrupt};

/// What a back-end does instead of sending a reply.
pub(super) enum Answer {
    Send(Vec<u8>),
    /// With descriptors nobody asked for.
    SendWithFds(Vec<u8>, usize),
    Nothing,
    Close,
}

/// How a back-end is.
pub(super) struct Manners {
    pub(super) features: u64,
    pub(super) protocol: u64,
    pub(super) queues: u64,
    pub(super) config: Vec<u8>,
    /// Takes chains and never returns them.
    pub(super) hoards: bool,
    /// May change what is answered: request, and the whole reply if there is one.
    pub(super) twist: Box<dyn FnMut(u32, Option<Vec<u8>>) -> Answer + Send>,
}

pub(super) fn honest(_request: u32, reply: Option<Vec<u8>>) -> Answer {
    reply.map_or(Answer::Nothing, Answer::Send)
}

impl Default for Manners {
    fn default() -> Self {
        Self {
            features: features::COMMON | 1 << 30,
            protocol: 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 15,
            queues: 8,
            config: (0..=255).collect(),
            hoards: false,
            twist: Box::new(honest),
        }
    }
}

/// A back-end in a thread, which ends with the connection.
pub(super) fn spawn(manners: Manners) -> (OwnedFd, JoinHandle<Seen>) {
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    (
        ours,
        std::thread::spawn(move || Fake::new(theirs, manners).run()),
    )
}

/// What a back-end saw.
#[derive(Default, Debug)]
pub(super) struct Seen {
    pub(super) requests: Vec<u32>,
    pub(super) regions: Vec<(u64, u64)>,
    pub(super) bases: Vec<(u32, u32)>,
    pub(super) enabled: BTreeMap<u32, bool>,
    pub(super) config_writes: Vec<Vec<u8>>,
}

#[derive(Default)]
struct Ring {
    size: u16,
    base: u16,
    areas: [u64; 3],
    call: Option<OwnedFd>,
    kick: Option<OwnedFd>,
    enabled: bool,
    queue: Option<VirtQueue>,
}

pub(super) struct Fake {
    socket: OwnedFd,
    manners: Manners,
    acked: u64,
    protocol: u64,
    regions: Vec<(u64, u64, Arc<File>, u64)>,
    rings: BTreeMap<u32, Ring>,
    hoard: Vec<crate::queue::Chain>,
    requests: Option<Arc<Mutex<Option<OwnedFd>>>>,
    seen: Seen,
}

struct Call(Option<EventFd>);

impl Interrupts for Call {
    fn queue(&self, _index: u16) {
        if let Some(call) = &self.0 {
            let _ = call.write(1);
        }
    }
    fn config(&self) {}
    fn queue_event(&self, _index: u16) -> Option<&EventFd> {
        self.0.as_ref()
    }
}

fn event(fd: &OwnedFd) -> EventFd {
    use std::os::fd::{FromRawFd, IntoRawFd};
    let fd = fd.try_clone().unwrap().into_raw_fd();
    #[expect(unsafe_code, reason = "an eventfd that came over a socket")]
    // SAFETY: a new descriptor that nobody else owns.
    unsafe {
        EventFd::from_raw_fd(fd)
    }
}

fn word(payload: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(payload[at..at + 4].try_into().unwrap())
}

fn long(payload: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(payload[at..at + 8].try_into().unwrap())
}

impl Fake {
    pub(super) fn new(socket: OwnedFd, manners: Manners) -> Self {
        Self {
            socket,
            manners,
            acked: 0,
            protocol: 0,
            regions: Vec::new(),
            rings: BTreeMap::new(),
            hoard: Vec::new(),
            requests: None,
            seen: Seen::default(),
        }
    }

    /// Puts the channel for a back-end's own requests into `place` when it comes.
    pub(super) fn keep_requests(mut self, place: &Arc<Mutex<Option<OwnedFd>>>) -> Self {
        self.requests = Some(Arc::clone(place));
        self
    }

    pub(super) fn run(mut self) -> Seen {
        loop {
            let kicks: Vec<u32> = self
                .rings
                .iter()
                .filter(|(_, ring)| ring.enabled && ring.kick.is_some())
                .map(|(index, _)| *index)
                .collect();
            let mut fds = vec![PollFd::new(&self.socket, PollFlags::IN)];
            for index in &kicks {
                let kick = self.rings[index].kick.as_ref().unwrap();
                fds.push(PollFd::new(kick, PollFlags::IN));
            }
            poll(&mut fds, None).unwrap();
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            for (index, _) in kicks.iter().zip(&ready[1..]).filter(|(_, ready)| **ready) {
                self.serve(*index);
            }
            if ready[0] && !self.message() {
                return self.seen;
            }
        }
    }

    fn view(&self) -> RamView {
        let ranges = self.regions.iter().map(|(gpa, size, file, offset)| {
            let len = usize::try_from(*size).unwrap();
            let file = FileOffset::from_arc(Arc::clone(file), *offset);
            (GuestAddress(*gpa), len, Some(file))
        });
        RamView::from_ranges_with_files(ranges.collect::<Vec<_>>()).unwrap()
    }

    fn serve(&mut self, index: u32) {
        let view = self.view();
        let acked = self.acked;
        let ring = self.rings.get_mut(&index).unwrap();
        let kick = event(ring.kick.as_ref().unwrap());
        let _ = kick.read();
        if ring.queue.is_none() {
            let [descriptors, device, driver] = ring.areas;
            let registers = QueueRegisters {
                size: ring.size,
                enabled: true,
                descriptors,
                driver,
                device,
                ..QueueRegisters::new(ring.size)
            };
            let rings = CheckedQueue::check(0, &registers, acked, &view).unwrap();
            let call = Call(ring.call.as_ref().map(event));
            let interrupt = QueueInterrupt::new(Arc::new(call), 0);
            let mut queue = VirtQueue::new(rings, interrupt, Arc::default());
            queue.continue_at(&view, ring.base).unwrap();
            ring.queue = Some(queue);
        }
        let (hoards, hoard) = (self.manners.hoards, &mut self.hoard);
        let queue = ring.queue.as_mut().unwrap();
        let round = queue.drain(&view, |queue, chain| {
            if hoards {
                hoard.push(chain);
                return Ok(ControlFlow::Continue(()));
            }
            let len = chain.writable_len();
            let data = vec![0x5a; usize::try_from(len).unwrap()];
            chain.write(&view, 0, &data).unwrap();
            queue.push(&view, chain, len)?;
            Ok(ControlFlow::Continue(()))
        });
        if round.and_then(|_| queue.notify(&view)).is_err() {
            ring.enabled = false;
        }
    }

    fn read(&self, data: &mut [u8], fds: &mut Vec<OwnedFd>) -> bool {
        let mut rest = data;
        while !rest.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(rest)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            let got = rustix::net::recvmsg(&self.socket, &mut parts, &mut ancillary, flags);
            let Some(read) = got.ok().map(|got| got.bytes).filter(|n| *n != 0) else {
                return false;
            };
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            rest = &mut rest[read..];
        }
        true
    }

    /// Takes one request; `false` at the end.
    fn message(&mut self) -> bool {
        let (mut header, mut fds) = ([0; 12], Vec::new());
        if !self.read(&mut header, &mut fds) {
            return false;
        }
        let [request, flags, size] = [0, 4, 8].map(|at| word(&header, at));
        let mut payload = vec![0; usize::try_from(size).unwrap()];
        if !self.read(&mut payload, &mut fds) {
            return false;
        }
        self.seen.requests.push(request);
        let payload = self.carry_out(request, &payload, fds);
        let acknowledged = self.protocol & 1 << 3 != 0 && flags & 8 != 0;
        let payload = payload.or_else(|| acknowledged.then(|| 0_u64.to_ne_bytes().to_vec()));
        let reply = payload.map(|payload| {
            let len = u32::try_from(payload.len()).unwrap();
            let header = [request, 5, len].map(u32::to_ne_bytes).concat();
            [header, payload].concat()
        });
        match (self.manners.twist)(request, reply) {
            Answer::Send(bytes) => {
                let _ = rustix::net::send(&self.socket, &bytes, SendFlags::NOSIGNAL);
            }
            Answer::SendWithFds(bytes, count) => {
                use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage};
                let fds = vec![self.socket.as_fd(); count];
                let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
                let parts = [std::io::IoSlice::new(&bytes)];
                let _ =
                    rustix::net::sendmsg(&self.socket, &parts, &mut ancillary, SendFlags::NOSIGNAL);
            }
            Answer::Nothing => {}
            Answer::Close => return false,
        }
        true
    }

    /// Does what was asked; returns the reply's payload, if the request has one of its own.
    fn carry_out(&mut self, request: u32, payload: &[u8], fds: Vec<OwnedFd>) -> Option<Vec<u8>> {
        let value = |value: u64| Some(value.to_ne_bytes().to_vec());
        let mut fds = fds.into_iter();
        let fd = fds.next();
        match request {
            1 => return value(self.manners.features),
            2 => self.acked = long(payload, 0),
            5 => {
                self.regions.clear();
                for (at, fd) in (8..)
                    .step_by(32)
                    .zip(std::iter::once(fd.unwrap()).chain(fds))
                {
                    self.map(payload, at, fd);
                }
                assert_eq!(word(payload, 0) as usize, self.regions.len());
            }
            8 => self.ring(payload).size = u16::try_from(word(payload, 4)).unwrap(),
            9 => {
                let areas = [8, 16, 24].map(|at| long(payload, at));
                self.ring(payload).areas = areas;
            }
            10 => {
                let base = word(payload, 4);
                self.seen.bases.push((word(payload, 0), base));
                self.ring(payload).base = u16::try_from(base).unwrap();
            }
            11 => {
                let view = self.view();
                let index = word(payload, 0);
                let ring = self.ring(payload);
                let queue = ring.queue.take();
                let base = queue.map_or(ring.base, |queue| queue.positions().0);
                (ring.kick, ring.call, ring.base) = (None, None, base);
                drop(view);
                return Some([index, base.into()].map(u32::to_ne_bytes).concat());
            }
            12 => {
                let legacy = self.acked & 1 << 30 == 0;
                let ring = self.ring(payload);
                ring.kick = fd;
                ring.enabled |= legacy;
            }
            13 => self.ring(payload).call = fd,
            15 => return value(self.manners.protocol),
            16 => self.protocol = long(payload, 0),
            17 => return value(self.manners.queues),
            18 => {
                let on = word(payload, 4) == 1;
                self.seen.enabled.insert(word(payload, 0), on);
                self.ring(payload).enabled = on;
            }
            21 => {
                if let Some(place) = &self.requests {
                    *place.lock().unwrap() = fd;
                }
            }
            24 => {
                let len = usize::try_from(word(payload, 4)).unwrap();
                let head = &payload[..12];
                return Some([head, &self.manners.config[..len]].concat());
            }
            25 => self.seen.config_writes.push(payload.to_vec()),
            36 => return value(32),
            37 => self.map(payload, 8, fd.unwrap()),
            38 => {
                let gpa = long(payload, 8);
                self.regions.retain(|(at, ..)| *at != gpa);
            }
            _ => {}
        }
        None
    }

    fn map(&mut self, payload: &[u8], at: usize, fd: OwnedFd) {
        let (gpa, size) = (long(payload, at), long(payload, at + 8));
        self.seen.regions.push((gpa, size));
        let file = Arc::new(File::from(fd));
        self.regions.push((gpa, size, file, long(payload, at + 24)));
    }

    fn ring(&mut self, payload: &[u8]) -> &mut Ring {
        self.rings.entry(word(payload, 0) & 0xff).or_default()
    }
}

/// Waits for a connection to `listener`, for a while.
pub(super) fn accept(listener: &std::os::unix::net::UnixListener) -> OwnedFd {
    let patience = Timespec::try_from(Duration::from_secs(10)).unwrap();
    let mut fds = [PollFd::new(listener, PollFlags::IN)];
    assert_ne!(
        poll(&mut fds, Some(&patience)).unwrap(),
        0,
        "nobody connects"
    );
    listener.accept().unwrap().0.into()
}
