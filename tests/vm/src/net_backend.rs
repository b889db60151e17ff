//! A vhost-user network back-end: a station with one address that answers ARP and ICMP echo. As
//! much of the protocol as a front-end needs, in a thread of its own.
#![expect(
    clippy::cast_possible_truncation,
    clippy::expect_used,
    reason = "talks to the front-end under test and fails if that one does not keep to the protocol"
)]

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, Shutdown, shutdown};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use crate::outcome::{Outcome, Verdict};

/// The station: 192.0.2.1.
const IP: [u8; 4] = [192, 0, 2, 1];
const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 1];
/// `struct virtio_net_hdr_v1`.
const HEADER: usize = 12;

const FEATURES: u64 = 1 << 32 | 1 << 30;
/// Acknowledgements.
const PROTOCOL: u64 = 1 << 3;

/// A back-end at work.
pub(crate) struct NetBackend {
    thread: JoinHandle<std::io::Result<()>>,
    socket: std::sync::mpsc::Receiver<UnixStream>,
    echoes: Arc<AtomicUsize>,
}

impl NetBackend {
    /// Waits for one front-end at `path`.
    pub(crate) fn listen(path: &Path) -> Verdict<NetBackend> {
        let listener = UnixListener::bind(path)?;
        let (tell, socket) = std::sync::mpsc::channel();
        let echoes = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&echoes);
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept()?;
            let _ = tell.send(stream.try_clone()?);
            Station::new(stream, counted).serve()
        });
        Ok(NetBackend {
            thread,
            socket,
            echoes,
        })
    }

    /// Goes away; returns how many echo requests came.
    pub(crate) fn end(self) -> Verdict<usize> {
        let nobody = |_| Outcome::Failed("no front-end came".into());
        let socket = self.socket.try_recv().map_err(nobody)?;
        shutdown(&socket, Shutdown::Both)?;
        match self.thread.join() {
            Ok(ended) => ended?,
            Err(_) => return Err(Outcome::Failed("the back-end panicked".into())),
        }
        Ok(self.echoes.load(Ordering::Relaxed))
    }
}

#[derive(Default)]
struct Ring {
    size: u16,
    base: u16,
    /// Descriptors, used ring, available ring.
    areas: [u64; 3],
    call: Option<File>,
    kick: Option<File>,
    enabled: bool,
    queue: Option<Queue>,
}

struct Station {
    stream: UnixStream,
    memory: GuestMemoryMmap,
    rings: [Ring; 2],
    echoes: Arc<AtomicUsize>,
}

const TO_GUEST: usize = 0;
const FROM_GUEST: usize = 1;

fn word(payload: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(payload[at..at + 4].try_into().expect("four bytes"))
}

fn long(payload: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(payload[at..at + 8].try_into().expect("eight bytes"))
}

impl Station {
    fn new(stream: UnixStream, echoes: Arc<AtomicUsize>) -> Station {
        Station {
            stream,
            memory: GuestMemoryMmap::default(),
            rings: Default::default(),
            echoes,
        }
    }

    fn serve(mut self) -> std::io::Result<()> {
        loop {
            let kick = self.rings[FROM_GUEST].kick.as_ref();
            let mut fds = vec![PollFd::new(&self.stream, PollFlags::IN)];
            fds.extend(kick.map(|kick| PollFd::new(kick, PollFlags::IN)));
            poll(&mut fds, None)?;
            let kicked = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
            let spoken = !fds[0].revents().is_empty();
            if kicked {
                self.packets()?;
            }
            if spoken && !self.message()? {
                return Ok(());
            }
        }
    }

    /// Answers every packet that waits.
    fn packets(&mut self) -> std::io::Result<()> {
        if let Some(mut kick) = self.rings[FROM_GUEST].kick.as_ref() {
            kick.read_exact(&mut [0; 8])?;
        }
        while let Some((head, packet)) = self.take() {
            self.give_back(FROM_GUEST, head, 0)?;
            if let Some(answer) = self.answer(&packet) {
                self.send(&answer)?;
            }
        }
        Ok(())
    }

    fn take(&mut self) -> Option<(u16, Vec<u8>)> {
        let ring = &mut self.rings[FROM_GUEST];
        let chain = ring.queue.as_mut()?.pop_descriptor_chain(&self.memory)?;
        let (head, mut packet) = (chain.head_index(), Vec::new());
        for desc in chain {
            let from = packet.len();
            packet.resize(from + desc.len() as usize, 0);
            self.memory
                .read_slice(&mut packet[from..], desc.addr())
                .ok()?;
        }
        Some((head, packet.split_off(HEADER.min(packet.len()))))
    }

    fn give_back(&mut self, ring: usize, head: u16, len: usize) -> std::io::Result<()> {
        let ring = &mut self.rings[ring];
        if let Some(queue) = &mut ring.queue {
            let len = u32::try_from(len).map_err(std::io::Error::other)?;
            queue
                .add_used(&self.memory, head, len)
                .map_err(std::io::Error::other)?;
        }
        match &ring.call {
            Some(call) => (&*call).write_all(&1_u64.to_ne_bytes()),
            None => Ok(()),
        }
    }

    /// What a station answers to a frame.
    fn answer(&self, frame: &[u8]) -> Option<Vec<u8>> {
        let (from, kind) = (frame.get(6..12)?, frame.get(12..14)?);
        let mut answer = [from, &MAC, kind].concat();
        let body = frame.get(14..)?;
        match kind {
            // ARP: who has our address.
            [8, 6] if body.get(6..8)? == [0, 1] && body.get(24..28)? == IP => {
                answer.extend([&body[..6], &[0, 2], &MAC, &IP, &body[8..18]].concat());
            }
            // IPv4, ICMP, echo request.
            [8, 0] if *body.get(9)? == 1 && body.get(16..20)? == IP && *body.get(20)? == 8 => {
                self.echoes.fetch_add(1, Ordering::Relaxed);
                let len = usize::from(u16::from_be_bytes([body[2], body[3]]));
                let mut packet = body.get(..len)?.to_vec();
                // Source and destination change places, which leaves the header's sum as it is.
                packet[12..20].rotate_left(4);
                packet[20] = 0;
                let old = u32::from(u16::from_be_bytes([packet[22], packet[23]]));
                // The type's word became smaller by 0x800, so the sum is greater by it (RFC 1624).
                let sum = old + 0x800;
                let sum = u16::try_from((sum & 0xffff) + (sum >> 16)).ok()?;
                packet[22..24].copy_from_slice(&sum.to_be_bytes());
                answer.extend(packet);
            }
            _ => return None,
        }
        Some(answer)
    }

    /// Gives the guest a frame, if it has a buffer for it.
    fn send(&mut self, frame: &[u8]) -> std::io::Result<()> {
        let ring = &mut self.rings[TO_GUEST];
        let Some(queue) = ring.queue.as_mut().filter(|_| ring.enabled) else {
            return Ok(());
        };
        let Some(chain) = queue.pop_descriptor_chain(&self.memory) else {
            return Ok(());
        };
        let mut header = [0; HEADER];
        // One buffer.
        header[10] = 1;
        let data = [&header, frame].concat();
        let (head, mut rest) = (chain.head_index(), data.as_slice());
        for desc in chain {
            let now = rest.len().min(desc.len() as usize);
            let written = self.memory.write_slice(&rest[..now], desc.addr());
            written.map_err(std::io::Error::other)?;
            rest = &rest[now..];
        }
        self.give_back(TO_GUEST, head, data.len())
    }

    fn read(&self, data: &mut [u8], fds: &mut Vec<OwnedFd>) -> std::io::Result<bool> {
        let mut rest = data;
        while !rest.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(rest)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            let got = rustix::net::recvmsg(&self.stream, &mut parts, &mut ancillary, flags)?;
            if got.bytes == 0 {
                return Ok(false);
            }
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            rest = &mut rest[got.bytes..];
        }
        Ok(true)
    }

    /// Carries one request out; `false` when the front-end has gone.
    fn message(&mut self) -> std::io::Result<bool> {
        let (mut header, mut fds) = ([0; 12], Vec::new());
        if !self.read(&mut header, &mut fds)? {
            return Ok(false);
        }
        let [request, flags, size] = [0, 4, 8].map(|at| word(&header, at));
        let mut payload = vec![0; size as usize];
        self.read(&mut payload, &mut fds)?;
        let reply = self.carry_out(request, &payload, fds);
        let acknowledgement = (flags & 8 != 0).then(|| 0_u64.to_ne_bytes().to_vec());
        if let Some(payload) = reply.or(acknowledgement) {
            let size = u32::try_from(payload.len()).map_err(std::io::Error::other)?;
            let mut reply = [request, 5, size].map(u32::to_ne_bytes).concat();
            reply.extend(payload);
            self.stream.write_all(&reply)?;
        }
        Ok(true)
    }

    fn carry_out(&mut self, request: u32, payload: &[u8], fds: Vec<OwnedFd>) -> Option<Vec<u8>> {
        let ring = |payload: &[u8]| (word(payload, 0) & 0xff) as usize;
        let mut files = fds.into_iter().map(File::from);
        match request {
            1 => return Some(FEATURES.to_ne_bytes().to_vec()),
            5 => {
                let regions = files.zip((8..).step_by(32)).map(|(file, at)| {
                    let offset = FileOffset::new(file, long(payload, at + 24));
                    let gpa = GuestAddress(long(payload, at));
                    (gpa, long(payload, at + 8) as usize, Some(offset))
                });
                let regions: Vec<_> = regions.collect();
                self.memory = GuestMemoryMmap::from_ranges_with_files(regions).expect("it maps");
            }
            8 => self.rings[ring(payload)].size = word(payload, 4) as u16,
            9 => self.rings[ring(payload)].areas = [8, 16, 24].map(|at| long(payload, at)),
            10 => self.rings[ring(payload)].base = word(payload, 4) as u16,
            11 => {
                let (index, ring) = (word(payload, 0), &mut self.rings[ring(payload)]);
                let base = ring
                    .queue
                    .take()
                    .map_or(ring.base, |queue| queue.next_avail());
                (ring.base, ring.kick, ring.call) = (base, None, None);
                return Some([index, base.into()].map(u32::to_ne_bytes).concat());
            }
            12 => {
                let ring = &mut self.rings[ring(payload)];
                ring.kick = files.next();
                ring.queue = Some(ring.open());
            }
            13 => self.rings[ring(payload)].call = files.next(),
            15 => return Some(PROTOCOL.to_ne_bytes().to_vec()),
            18 => self.rings[ring(payload)].enabled = word(payload, 4) == 1,
            _ => {}
        }
        None
    }
}

impl Ring {
    fn open(&self) -> Queue {
        let mut queue = Queue::new(self.size).expect("a size of the front-end's");
        let [descriptors, used, available] = self.areas.map(GuestAddress);
        queue.try_set_size(self.size).expect("a size");
        queue
            .try_set_desc_table_address(descriptors)
            .expect("aligned");
        queue.try_set_used_ring_address(used).expect("aligned");
        queue
            .try_set_avail_ring_address(available)
            .expect("aligned");
        queue.set_next_avail(self.base);
        queue.set_next_used(self.base);
        queue.set_ready(true);
        queue
    }
}
