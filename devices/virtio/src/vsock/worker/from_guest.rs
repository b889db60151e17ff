//! Packets from the guest.
//!
//! Lengths: the header says how many bytes of data follow, the descriptors say how many there are.
//! Data that is not there is not read (CVE-2019-18960); data beyond what the header says is ignored.

use std::ops::ControlFlow;
use std::os::fd::AsFd;

use event_manager::EventOps;
use testudo_memory::RamView;

use super::connection::Connection;
use super::connections::Ports;
use super::{Pass, RESETS, Session, Worker};
use crate::queue::{Chain, QueueFault};
use crate::vsock::packet::{HOST_CID, Header, Op, TYPE_STREAM};
use crate::vsock::stream::{Stream, Taken};
use crate::vsock::transfer::Pieces;

/// Packets served before the other queue and other events have their turn.
const BUDGET: u32 = 64;
/// Bytes copied at a time when a socket does not take them.
const PIECE: usize = 16 * 1024;

impl Worker {
    pub(super) fn serve_tx(
        &mut self,
        session: &mut Session,
        ram: &RamView,
        ops: &mut EventOps<'_>,
    ) -> Result<Pass, QueueFault> {
        let mut pass = Pass::Idle;
        let mut left = BUDGET;
        self.tx_waits = false;
        let tx = &mut session.tx.queue;
        tx.drain(ram, |tx, chain| {
            if self.resets.len() >= RESETS {
                tx.undo_pop(chain);
                self.tx_waits = true;
                return Ok(ControlFlow::Break(()));
            }
            if !self.packet(ram, &chain, ops) {
                tx.count_error();
            }
            tx.push(ram, chain, 0)?;
            left = left.saturating_sub(1);
            if left == 0 {
                pass = Pass::Yield;
                return Ok(ControlFlow::Break(()));
            }
            Ok(ControlFlow::Continue(()))
        })?;
        tx.notify(ram)?;
        Ok(pass)
    }

    /// Serves one packet; `false` if it was not one.
    fn packet(&mut self, ram: &RamView, chain: &Chain, ops: &mut EventOps<'_>) -> bool {
        let mut bytes = [0; Header::LEN];
        if !matches!(chain.read(ram, 0, &mut bytes), Ok(Header::LEN)) {
            return false;
        }
        let header = Header::from_bytes(&bytes);
        let there = usize::try_from(chain.readable_len()).unwrap_or(0);
        let data = usize::try_from(header.len).unwrap_or(usize::MAX);
        if header.src_cid != self.guest_cid || data > there.saturating_sub(Header::LEN) {
            return false;
        }
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM || header.op.is_none() {
            self.reset(&header);
            return false;
        }
        let ports = (header.dst_port, header.src_port);
        let Some(id) = self.connections.by_ports(ports) else {
            if header.op == Some(Op::Request) {
                self.asked(ports, &header, ops);
            } else {
                self.reset(&header);
            }
            return true;
        };
        let taken = self.connections.with(id, ops, |connection| {
            let taken = connection.stream.packet(&header);
            match taken {
                Ok(Taken::Noted | Taken::Dropped) => {}
                Ok(Taken::Opened) => connection.opened(),
                Ok(Taken::Data(len)) => connection.deliver(ram, chain, len),
                Err(_) => connection.break_off(),
            }
            taken
        });
        matches!(taken, Some(Ok(_)))
    }

    /// Answers a packet that belongs to no stream; a reset needs no answer.
    fn reset(&mut self, header: &Header) {
        if header.op != Some(Op::Reset) {
            self.resets.push_back(header.reset_of());
        }
    }

    /// The guest wants a new stream.
    fn asked(&mut self, ports: Ports, header: &Header, ops: &mut EventOps<'_>) {
        if self.connections.full() {
            self.gauges.refused();
            self.reset(header);
            return;
        }
        self.connections
            .asked(ports, Stream::asked(header), &self.host, ops);
    }
}

impl Connection {
    /// Takes `len` bytes of data from `chain`: as much as the socket does by itself, the rest is kept.
    fn deliver(&mut self, ram: &RamView, chain: &Chain, len: u32) {
        let mut took = 0;
        if self.backlog.is_empty() && self.writable {
            took = self.send_directly(ram, chain, len);
            self.stream.delivered(took);
            if self.stream.is_delivered() {
                // All of it is there, or nobody takes it any more.
                return;
            }
        }
        let mut piece = [0; PIECE];
        let header = u32::try_from(Header::LEN).unwrap_or(0);
        while took < len {
            let left = usize::try_from(len.saturating_sub(took)).unwrap_or(PIECE);
            let Some(room) = piece.get_mut(..left.min(PIECE)) else {
                break;
            };
            let offset = header.saturating_add(took);
            let Ok(copied @ 1..) = chain.read(ram, offset, room) else {
                // Guest RAM was taken away: there is no telling what the data were.
                self.break_off();
                break;
            };
            self.backlog.push(room.get(..copied).unwrap_or_default());
            took = took.saturating_add(u32::try_from(copied).unwrap_or(len));
        }
    }

    fn send_directly(&mut self, ram: &RamView, chain: &Chain, len: u32) -> u32 {
        let (Some(socket), Ok(slices)) = (&self.socket, chain.readable_slices(ram)) else {
            return 0;
        };
        let mut pieces = Pieces::default();
        let wanted = pieces.add(
            &slices,
            Header::LEN,
            usize::try_from(len).unwrap_or(usize::MAX),
        );
        if wanted == 0 {
            return 0;
        }
        let result = pieces.send(socket.as_fd());
        let took = self.sent(result);
        self.writable &= took == wanted;
        u32::try_from(took).unwrap_or(len)
    }
}
