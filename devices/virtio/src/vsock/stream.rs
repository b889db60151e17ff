//! One stream as the two ends of the device see it: phases, shutdown of each direction, credit. No
//! socket, no queue, no clock.
//!
//! ```text
//!   guest's REQUEST ─▶ Asked ──host connected: RESPONSE──┐
//!   host's CONNECT ─▶ Requested ──guest's RESPONSE───────┴─▶ Open
//!                                                             │ both directions are over: SHUTDOWN of
//!                                                             ▼ both, or RST if the guest said so first
//!   any ──RST, either way─▶ Gone ◀──RST, or the owner's patience ends── Closing
//! ```
//! A direction to the host is over when the guest sends no more and everything has reached the host,
//! or when the host takes no more; the other way round alike. The owner tells what happened, then
//! asks what is [due](Stream::due) and what it may [send](Stream::room). What the guest sent before
//! it went is the owner's to deliver, whatever the phase.
//!
//! Credit (virtio 1.2 §5.10.6.3): each side says how large its buffer is and how much has left it;
//! the other never has more than that under way. Counters are modulo 2³².

use super::packet::{Header, NEITHER, NO_RECEIVE, NO_SEND, Op};

/// Bytes the guest may send ahead of the host's reader, and so the most a stream keeps.
pub(super) const BUFFER: u32 = 256 * 1024;
/// The guest is told of room when this much of it is news.
const NEWS: u32 = BUFFER / 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// The guest asked, the host's socket is not connected yet.
    Asked,
    /// The host asked, the guest has not answered.
    Requested,
    Open,
    /// Nothing goes either way any more; the guest has to confirm by RST, or is owed one.
    Closing,
    /// The guest knows nothing of it.
    Gone,
}

/// What a packet means to the owner of the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    /// Look at [`Stream::due`] and so on.
    Noted,
    /// The guest has answered: the host's client may go on.
    Opened,
    /// So many bytes are for the host; [`Stream::delivered`] says when they are there.
    Data(u32),
    /// So many bytes that nobody takes any more.
    Dropped,
}

/// The guest broke the protocol, and the stream is to be reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Violation;

/// A packet without data that the guest is owed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    Request,
    Response,
    Reset,
    /// With these flags.
    Shutdown(u32),
    CreditUpdate,
    CreditRequest,
}

impl Due {
    pub(super) fn op(self) -> (Op, u32) {
        match self {
            Self::Request => (Op::Request, 0),
            Self::Response => (Op::Response, 0),
            Self::Reset => (Op::Reset, 0),
            Self::Shutdown(flags) => (Op::Shutdown, flags),
            Self::CreditUpdate => (Op::CreditUpdate, 0),
            Self::CreditRequest => (Op::CreditRequest, 0),
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Stream {
    phase: Phase,
    /// The guest's buffer, and what has left it.
    peer_alloc: u32,
    peer_forwarded: u32,
    /// Bytes sent to the guest, received from it, delivered of those to the host, and told of.
    sent: u32,
    received: u32,
    delivered: u32,
    told: u32,
    guest_sends_no_more: bool,
    guest_takes_no_more: bool,
    host_sends_no_more: bool,
    host_takes_no_more: bool,
    /// SHUTDOWN flags the guest has been sent.
    shutdown_told: u32,
    /// The packet of ours that opens the stream, REQUEST or RESPONSE, has gone.
    opener_sent: bool,
    reset_due: bool,
    update_due: bool,
    /// There is data and no credit for it.
    blocked: bool,
    /// `peer_forwarded` when credit was last asked for.
    asked_at: Option<u32>,
}

impl Stream {
    fn new(phase: Phase, peer_alloc: u32, peer_forwarded: u32) -> Self {
        Self {
            phase,
            peer_alloc,
            peer_forwarded,
            sent: 0,
            received: 0,
            delivered: 0,
            told: 0,
            guest_sends_no_more: false,
            guest_takes_no_more: false,
            host_sends_no_more: false,
            host_takes_no_more: false,
            shutdown_told: 0,
            opener_sent: false,
            reset_due: false,
            update_due: false,
            blocked: false,
            asked_at: None,
        }
    }

    /// The guest's REQUEST.
    pub(super) fn asked(request: &Header) -> Self {
        Self::new(Phase::Asked, request.buf_alloc, request.fwd_cnt)
    }

    /// The host wants one.
    pub(super) fn requested() -> Self {
        Self::new(Phase::Requested, 0, 0)
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    /// The host's socket is connected, as the guest asked.
    pub(super) fn connected(&mut self) {
        if self.phase == Phase::Asked {
            self.phase = Phase::Open;
        }
    }

    /// A packet of the guest's for this stream.
    pub(super) fn packet(&mut self, header: &Header) -> Result<Taken, Violation> {
        if self.phase == Phase::Gone {
            return Ok(Taken::Noted);
        }
        self.peer_alloc = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
        match header.op {
            Some(Op::Reset) => {
                self.lost();
                Ok(Taken::Noted)
            }
            Some(Op::Response) if self.phase == Phase::Requested => {
                self.phase = Phase::Open;
                Ok(Taken::Opened)
            }
            Some(Op::Data) => self.data(header.len),
            Some(Op::Shutdown) if self.established() => {
                self.guest_takes_no_more |= header.flags & NO_RECEIVE != 0;
                self.guest_sends_no_more |= header.flags & NO_SEND != 0;
                self.advance();
                Ok(Taken::Noted)
            }
            Some(Op::CreditUpdate) => Ok(Taken::Noted),
            Some(Op::CreditRequest) => {
                self.update_due = true;
                Ok(Taken::Noted)
            }
            // Its user gave up before the host's socket was connected.
            Some(Op::Shutdown) if self.phase == Phase::Asked => {
                self.refuse();
                Ok(Taken::Noted)
            }
            _ => Err(Violation),
        }
    }

    fn established(&self) -> bool {
        matches!(self.phase, Phase::Open | Phase::Closing)
    }

    fn data(&mut self, len: u32) -> Result<Taken, Violation> {
        let under_way = self.received.wrapping_sub(self.delivered);
        let room = BUFFER.saturating_sub(under_way);
        if !self.established() || self.guest_sends_no_more || len > room {
            return Err(Violation);
        }
        self.received = self.received.wrapping_add(len);
        if self.host_takes_no_more {
            self.delivered = self.received;
            return Ok(Taken::Dropped);
        }
        Ok(Taken::Data(len))
    }

    /// So many bytes of the guest's have reached the host.
    pub(super) fn delivered(&mut self, bytes: u32) {
        let under_way = self.received.wrapping_sub(self.delivered);
        self.delivered = self.delivered.wrapping_add(bytes.min(under_way));
        self.advance();
    }

    /// Everything the guest sent has reached the host, or will not be taken.
    pub(super) fn is_delivered(&self) -> bool {
        self.received == self.delivered
    }

    /// Everything the guest will ever send has reached the host.
    pub(super) fn guest_is_done(&self) -> bool {
        self.guest_sends_no_more && self.is_delivered()
    }

    /// The guest takes no more of the host's.
    pub(super) fn guest_takes_no_more(&self) -> bool {
        self.guest_takes_no_more
    }

    /// The host has sent its last byte, and it is on its way to the guest.
    pub(super) fn host_sends_no_more(&mut self) {
        self.host_sends_no_more = true;
        self.blocked = false;
        self.advance();
    }

    /// The host takes nothing any more; what is under way to it is lost.
    pub(super) fn host_takes_no_more(&mut self) {
        self.host_takes_no_more = true;
        self.delivered = self.received;
        self.advance();
    }

    fn advance(&mut self) {
        if self.phase != Phase::Open && self.phase != Phase::Closing {
            return;
        }
        let to_guest_over = self.host_sends_no_more || self.guest_takes_no_more;
        let to_host_over = self.host_takes_no_more || self.guest_is_done();
        if to_guest_over && to_host_over {
            self.phase = Phase::Closing;
            // A guest that has said both waits for this (virtio 1.2 §5.10.6.6).
            self.reset_due |= self.guest_sends_no_more && self.guest_takes_no_more;
        }
    }

    /// Ends the stream from this side: the guest is owed a reset.
    pub(super) fn refuse(&mut self) {
        if self.phase != Phase::Gone {
            self.phase = Phase::Closing;
            self.reset_due = true;
        }
    }

    /// The guest has forgotten the stream.
    pub(super) fn lost(&mut self) {
        self.phase = Phase::Gone;
        self.guest_sends_no_more = true;
        self.guest_takes_no_more = true;
    }

    /// The packet the guest is owed next. [`Self::told`] says that it is on its way.
    pub(super) fn due(&self) -> Option<Due> {
        if self.phase == Phase::Gone {
            return None;
        }
        if self.reset_due {
            return Some(Due::Reset);
        }
        match self.phase {
            Phase::Requested if !self.opener_sent => Some(Due::Request),
            Phase::Open | Phase::Closing => self.due_when_open(),
            _ => None,
        }
    }

    fn due_when_open(&self) -> Option<Due> {
        if !self.opener_sent {
            return Some(Due::Response);
        }
        let shutdown = self.shutdown();
        if shutdown & !self.shutdown_told != 0 {
            return Some(Due::Shutdown(shutdown));
        }
        let news = self.delivered.wrapping_sub(self.told);
        if self.update_due || (news >= NEWS && !self.guest_sends_no_more) {
            return Some(Due::CreditUpdate);
        }
        // Asked once, the guest tells by itself; asking for every bit of room would make every bit a
        // packet.
        let gained = |at| self.peer_forwarded.wrapping_sub(at) >= (self.peer_alloc / 2).max(1);
        let ask = self.blocked && self.waits_for_credit() && self.asked_at.is_none_or(gained);
        ask.then_some(Due::CreditRequest)
    }

    /// What the guest is to know of the host's end.
    fn shutdown(&self) -> u32 {
        if self.phase == Phase::Closing {
            return NEITHER;
        }
        let mut flags = 0;
        if self.host_takes_no_more && !self.guest_sends_no_more {
            flags |= NO_RECEIVE;
        }
        if self.host_sends_no_more {
            flags |= NO_SEND;
        }
        flags
    }

    /// `due` is on its way to the guest.
    pub(super) fn told(&mut self, due: Due) {
        self.told = self.delivered;
        self.update_due = false;
        match due {
            Due::Request | Due::Response => self.opener_sent = true,
            Due::Reset => self.lost(),
            Due::Shutdown(flags) => self.shutdown_told |= flags,
            Due::CreditUpdate => {}
            Due::CreditRequest => self.asked_at = Some(self.peer_forwarded),
        }
    }

    fn may_send(&self) -> bool {
        let open = self.phase == Phase::Open && self.opener_sent;
        open && !self.host_sends_no_more && !self.guest_takes_no_more
    }

    fn waits_for_credit(&self) -> bool {
        self.may_send() && self.room() == 0
    }

    /// Bytes that may be sent to the guest now.
    pub(super) fn room(&self) -> u32 {
        if !self.may_send() {
            return 0;
        }
        let under_way = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_alloc.saturating_sub(under_way)
    }

    /// Data waits for credit.
    pub(super) fn blocked(&mut self, blocked: bool) {
        self.blocked = blocked;
    }

    /// So many bytes, at most [`Self::room`], are on their way to the guest.
    pub(super) fn sent(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
        self.told = self.delivered;
        self.update_due = false;
        self.blocked = false;
    }

    /// What every packet of this stream tells of the host's buffer.
    pub(super) fn credit(&self) -> (u32, u32) {
        (BUFFER, self.delivered)
    }
}

#[cfg(test)]
mod tests;
