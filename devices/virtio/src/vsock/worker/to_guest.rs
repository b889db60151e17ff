//! Packets to the guest: one connection after the other, each a bounded piece at a time.

use std::os::fd::AsFd;

use event_manager::EventOps;
use testudo_memory::RamView;

use super::connection::Connection;
use super::{Pass, Session, Worker};
use crate::queue::QueueFault;
use crate::vsock::packet::{HOST_CID, Header, Op, TYPE_STREAM};
use crate::vsock::transfer::Pieces;

/// Turns before other events are looked at.
const BUDGET: u32 = 64;
/// Chains that one read fills at most. Linux gives chains of 4 KiB, so a turn is 128 KiB.
const BURST: usize = 32;
/// What the number of chains in a read grows by when the one before filled all it had.
const GROWTH: usize = 4;
/// Bytes that one turn reads at most.
const TURN: usize = 256 * 1024;

/// How a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// Others first.
    Done,
    /// The guest offers no buffer.
    Starved,
}

impl Worker {
    pub(super) fn serve_rx(
        &mut self,
        session: &mut Session,
        ram: &RamView,
        ops: &mut EventOps<'_>,
    ) -> Result<Pass, QueueFault> {
        session.rx.queue.pause_kicks(ram)?;
        let mut pass = Pass::Idle;
        let mut left = BUDGET;
        while let Some(header) = self.resets.front().copied() {
            if session.stock(ram, 1)? == 0 {
                break;
            }
            session.send(ram, &header, 0)?;
            self.resets.pop_front();
        }
        while self.resets.is_empty() {
            let Some(id) = self.connections.next_ready() else {
                break;
            };
            let guest_cid = self.guest_cid;
            let turn = self.connections.with(id, ops, |connection| {
                connection.turn(session, ram, guest_cid)
            });
            if turn.transpose()? == Some(Turn::Starved) {
                session.rx.queue.count_stall();
                self.connections.ready_first(id);
                break;
            }
            left = left.saturating_sub(1);
            if left == 0 {
                pass = Pass::Yield;
                break;
            }
        }
        session.rx.queue.notify(ram)?;
        Ok(pass)
    }
}

impl Connection {
    fn turn(
        &mut self,
        session: &mut Session,
        ram: &RamView,
        guest_cid: u64,
    ) -> Result<Turn, QueueFault> {
        let mut owed = false;
        while let Some(due) = self.stream.due() {
            if session.stock(ram, 1)? == 0 {
                return Ok(Turn::Starved);
            }
            let (op, flags) = due.op();
            session.send(ram, &self.header(guest_cid, op, flags, 0), 0)?;
            self.stream.told(due);
            owed = true;
        }
        if owed {
            // Data has a turn of its own.
            return Ok(Turn::Done);
        }
        let room = self.stream.room();
        if !self.readable || room == 0 {
            return Ok(Turn::Done);
        }
        let room = usize::try_from(room).unwrap_or(TURN).min(TURN);
        self.receive(session, ram, guest_cid, room)
    }

    /// Reads up to `room` bytes straight into the guest's buffers.
    fn receive(
        &mut self,
        session: &mut Session,
        ram: &RamView,
        guest_cid: u64,
        room: usize,
    ) -> Result<Turn, QueueFault> {
        let Some(socket) = &self.socket else {
            self.readable = false;
            return Ok(Turn::Done);
        };
        if session.stock(ram, self.burst)? == 0 {
            return Ok(Turn::Starved);
        }
        let mut pieces = Pieces::default();
        let mut shares = Vec::with_capacity(self.burst);
        let mut asked = 0_usize;
        for chain in session.stocked().take(self.burst) {
            let left = room.saturating_sub(asked);
            let Ok(slices) = chain.writable_slices(ram) else {
                break;
            };
            let share = pieces.add(&slices, Header::LEN, left);
            if share == 0 {
                break;
            }
            asked = asked.saturating_add(share);
            shares.push(share);
        }
        if asked == 0 {
            // A buffer that is out of reach: back with it, unfilled.
            session.send(ram, &self.header(guest_cid, Op::CreditUpdate, 0, 0), 0)?;
            return Ok(Turn::Done);
        }
        let (got, tells) = match pieces.receive(socket.as_fd()) {
            Ok((0, _)) => {
                self.readable = false;
                self.stream.host_sends_no_more();
                return Ok(Turn::Done);
            }
            Ok(got) => got,
            Err(e) => {
                self.readable = false;
                self.receive_failed(&e);
                return Ok(Turn::Done);
            }
        };
        if tells && got < asked && !self.ended {
            // All there was: what comes later is another event.
            self.readable = false;
        }
        let mut left = got;
        for share in shares {
            let here = share.min(left);
            if here == 0 {
                break;
            }
            left = left.saturating_sub(here);
            let here = u32::try_from(here).unwrap_or(u32::MAX);
            self.stream.sent(here);
            session.send(ram, &self.header(guest_cid, Op::Data, 0, here), here)?;
        }
        self.burst = if got == asked {
            self.burst.saturating_mul(GROWTH).min(BURST)
        } else {
            1
        };
        Ok(Turn::Done)
    }

    fn header(&self, guest_cid: u64, op: Op, flags: u32, len: u32) -> Header {
        let (buf_alloc, fwd_cnt) = self.stream.credit();
        let (src_port, dst_port) = self.ports;
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port,
            dst_port,
            len,
            kind: TYPE_STREAM,
            op: Some(op),
            flags,
            buf_alloc,
            fwd_cnt,
        }
    }
}
