//! The socket between a job of the agent and a stage: its messages, and descriptors beside them.
//!
//! ```text
//!  | length, 4 bytes | descriptors, 1 byte | message …      descriptors ride with the header
//! ```

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use prost::Message;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::Pid;
use testudo_agent_protocol::{ContainerSpec, Process};

use crate::failure::{During, Failure};

/// Descriptors that go with one message; the kernel's own bound is 253.
pub(crate) const MAX_FDS: usize = 240;
const HEADER: usize = 5;
/// More than the arguments and environment that the kernel would take.
const MAX_MESSAGE: usize = 8 << 20;

/// What a stage shall do.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Order {
    /// A container to build; without one the process is one more of an existing container.
    #[prost(message, optional, tag = "1")]
    pub(crate) spec: Option<ContainerSpec>,
    #[prost(message, optional, tag = "2")]
    pub(crate) process: Option<Process>,
    /// Namespaces to join, as `CLONE_NEW*`; a descriptor for each.
    #[prost(uint32, repeated, tag = "3")]
    pub(crate) joins: Vec<u32>,
    /// Namespaces to have anew, as `CLONE_NEW*`.
    #[prost(uint32, tag = "4")]
    pub(crate) unshare: u32,
    /// A folder of the agent's that the root is attached to before it becomes the root.
    #[prost(string, tag = "5")]
    pub(crate) anchor: String,
    /// The compiled filter, 8 bytes an instruction; empty: none.
    #[prost(bytes = "vec", tag = "6")]
    pub(crate) filter: Vec<u8>,
    /// Device nodes cannot be made (a user namespace): bind the guest's.
    #[prost(bool, tag = "7")]
    pub(crate) bind_devices: bool,
    /// Flags of seccomp(2).
    #[prost(uint32, tag = "8")]
    pub(crate) filter_flags: u32,
}

/// What a stage tells.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Report {
    #[prost(enumeration = "Told", tag = "1")]
    pub(crate) told: i32,
    #[prost(int32, tag = "2")]
    pub(crate) pid: i32,
    #[prost(string, tag = "3")]
    pub(crate) failure: String,
    #[prost(int32, tag = "4")]
    pub(crate) errno: i32,
    #[prost(int32, tag = "5")]
    pub(crate) code: i32,
}

/// Kinds of report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
pub(crate) enum Told {
    Nothing = 0,
    /// The new user namespace wants its maps.
    NeedsMap = 1,
    /// The sibling's number.
    Born = 2,
    /// All is prepared.
    Ready = 3,
    Failed = 4,
}

impl Report {
    pub(crate) fn needs_map() -> Self {
        Self::of(Told::NeedsMap)
    }

    pub(crate) fn born(pid: Pid) -> Self {
        Self {
            pid: pid.as_raw_nonzero().get(),
            ..Self::of(Told::Born)
        }
    }

    pub(crate) fn ready() -> Self {
        Self::of(Told::Ready)
    }

    pub(crate) fn failed(failure: &Failure) -> Self {
        Self {
            failure: failure.what.clone(),
            errno: failure.errno(),
            code: failure.code,
            ..Self::of(Told::Failed)
        }
    }

    fn of(told: Told) -> Self {
        Self {
            told: told.into(),
            ..Self::default()
        }
    }

    /// The failure that was told.
    pub(crate) fn into_failure(self) -> Failure {
        Failure {
            code: self.code,
            what: self.failure,
            source: (self.errno != 0).then(|| io::Error::from_raw_os_error(self.errno)),
        }
    }
}

/// What the agent says after its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Word {
    /// The user namespace has its maps.
    Mapped,
    /// The agent knows the sibling; go on.
    Begin,
    /// Execute.
    Start,
}

impl Word {
    fn byte(self) -> u8 {
        match self {
            Self::Mapped => b'm',
            Self::Begin => b'b',
            Self::Start => b's',
        }
    }
}

/// One end of the socket.
pub(crate) struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Both ends.
    pub(crate) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Self { socket: ours }, theirs))
    }

    #[expect(unsafe_code, reason = "a descriptor known only by its number")]
    pub(super) fn inherited(number: i32) -> io::Result<Self> {
        // SAFETY: only borrowed for this check, which fails for a descriptor that is not open.
        rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) })?;
        // SAFETY: it is open, and in a process that was just executed nobody else has it.
        let socket = unsafe { OwnedFd::from_raw_fd(number) };
        rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
        Ok(Self { socket })
    }

    /// Sends an order with its descriptors.
    pub(crate) fn send_order(&self, order: &Order, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send(&order.encode_to_vec(), fds)
    }

    pub(super) fn order(&self) -> io::Result<(Order, Vec<OwnedFd>)> {
        let (message, fds) = self.receive()?;
        let order = Order::decode(message.as_slice()).map_err(io::Error::other)?;
        Ok((order, fds))
    }

    pub(super) fn report(&self, report: &Report, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        self.send(&report.encode_to_vec(), fd.as_slice())
    }

    /// The next report; end of file is an error of that kind.
    pub(crate) fn next_report(&self) -> io::Result<(Report, Option<OwnedFd>)> {
        let (message, fds) = self.receive()?;
        let report = Report::decode(message.as_slice()).map_err(io::Error::other)?;
        Ok((report, fds.into_iter().next()))
    }

    /// Says a word.
    pub(crate) fn say(&self, word: Word) -> io::Result<()> {
        self.send_all(&[word.byte()])
    }

    pub(super) fn await_word(&self, word: Word) -> Result<(), Failure> {
        let mut byte = [0];
        self.receive_all(&mut byte)
            .during(|| "hear from the agent".into())?;
        if byte == [word.byte()] {
            return Ok(());
        }
        Err(Failure::new("the agent said something unexpected"))
    }

    fn send(&self, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let length = u32::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let count = u8::try_from(fds.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let [l0, l1, l2, l3] = length.to_le_bytes();
        let header = [l0, l1, l2, l3, count];
        let mut space = vec![MaybeUninit::uninit(); SendAncillaryMessage::ScmRights(fds).size()];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let sent = rustix::net::sendmsg(
            &self.socket,
            &[IoSlice::new(&header)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        // Nobody else writes, and the buffer of a fresh message is empty: five bytes fit.
        if sent != HEADER {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.send_all(message)
    }

    fn receive(&self) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
        let mut header = [0; HEADER];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got = rustix::net::recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut header)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(given) = message {
                fds.extend(given);
            }
        }
        let rest = header.get_mut(got.bytes..).unwrap_or_default();
        if got.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.receive_all(rest)?;
        let [l0, l1, l2, l3, count] = header;
        let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3]))
            .ok()
            .filter(|length| *length <= MAX_MESSAGE)
            .ok_or_else(|| io::Error::other("a message too long"))?;
        if fds.len() != usize::from(count) {
            return Err(io::Error::other("descriptors were lost on the way"));
        }
        let mut message = vec![0; length];
        self.receive_all(&mut message)?;
        Ok((message, fds))
    }

    fn send_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let sent = rustix::net::send(&self.socket, bytes, SendFlags::NOSIGNAL)?;
            bytes = bytes.get(sent..).unwrap_or_default();
        }
        Ok(())
    }

    fn receive_all(&self, mut bytes: &mut [u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (got, _) = rustix::net::recv(&self.socket, &mut *bytes, RecvFlags::empty())?;
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            bytes = bytes.get_mut(got..).unwrap_or_default();
        }
        Ok(())
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_cross_with_their_descriptors() {
        let (agent, stage) = Channel::pair().unwrap();
        let stage = Channel { socket: stage };
        let order = Order {
            joins: vec![1, 2],
            process: Some(Process {
                // Larger than a socket's buffer.
                args: vec!["x".repeat(1 << 20)],
                ..Process::default()
            }),
            ..Order::default()
        };
        let sent = order.clone();
        let sender = std::thread::spawn(move || {
            let null = std::fs::File::open("/dev/null").unwrap();
            let fds = vec![null.as_fd(); 100];
            agent.send_order(&sent, &fds).unwrap();
            agent
        });
        let (received, fds) = stage.order().unwrap();
        assert_eq!(received, order);
        assert_eq!(fds.len(), 100);
        let agent = sender.join().unwrap();
        agent.say(Word::Begin).unwrap();
        stage.await_word(Word::Begin).unwrap();
        agent.say(Word::Mapped).unwrap();
        assert!(stage.await_word(Word::Start).is_err());
        stage
            .report(&Report::failed(&Failure::invalid("nothing")), None)
            .unwrap();
        let (report, _) = agent.next_report().unwrap();
        assert_eq!(report.into_failure().to_string(), "nothing");
        drop(stage);
        let end = agent.next_report().unwrap_err();
        assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
    }
}
