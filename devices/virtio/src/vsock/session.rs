//! The device's half between start and stop: three queues and guest RAM.

use std::collections::VecDeque;

use testudo_memory::{RamHandle, RamView};

use crate::model::{ActiveQueue, Queues};
use crate::queue::{Chain, QueueFault};
use crate::signal::DeviceEvents;

use super::packet::Header;

/// What the driver's queues are to the worker.
pub(super) struct Session {
    /// Packets to the guest.
    pub(super) rx: ActiveQueue,
    /// Packets from the guest.
    pub(super) tx: ActiveQueue,
    /// Left alone: the device's address never changes while the guest runs.
    event: Option<ActiveQueue>,
    pub(super) ram: RamHandle,
    pub(super) device: DeviceEvents,
    /// Chains of `rx` that were taken and not used yet, oldest first.
    stock: VecDeque<Chain>,
    /// The rings contradict themselves: nothing more until the driver resets the device.
    pub(super) broken: bool,
}

impl Session {
    pub(super) fn new(
        rx: ActiveQueue,
        tx: ActiveQueue,
        event: Option<ActiveQueue>,
        ram: RamHandle,
        device: DeviceEvents,
    ) -> Self {
        Self {
            rx,
            tx,
            event,
            ram,
            device,
            stock: VecDeque::new(),
            broken: false,
        }
    }

    /// The queues as they were handed over, with nothing in flight.
    pub(super) fn into_queues(mut self) -> Queues {
        while let Some(chain) = self.stock.pop_back() {
            self.rx.queue.put_back(chain);
        }
        let mut queues = vec![self.rx, self.tx];
        queues.extend(self.event);
        queues
    }

    /// Makes sure that up to `want` chains with room for data are in stock; returns how many are. If
    /// none is, the driver kicks when there is one.
    pub(super) fn stock(&mut self, ram: &RamView, want: usize) -> Result<usize, QueueFault> {
        let rx = &mut self.rx.queue;
        let mut useless = 0_u16;
        while self.stock.len() < want {
            if let Some(chain) = rx.pop(ram)? {
                if usize::try_from(chain.writable_len()).is_ok_and(|room| room > Header::LEN) {
                    self.stock.push_back(chain);
                } else {
                    // A driver may offer such without end.
                    if useless >= rx.size() {
                        return Err(QueueFault::Malformed { count: useless });
                    }
                    useless = useless.saturating_add(1);
                    rx.count_error();
                    rx.push(ram, chain, 0)?;
                }
            } else if !self.stock.is_empty() || !rx.resume_kicks(ram)? {
                break;
            }
        }
        Ok(self.stock.len())
    }

    /// The chains in stock, oldest first.
    pub(super) fn stocked(&self) -> impl Iterator<Item = &Chain> {
        self.stock.iter()
    }

    /// Returns the oldest chain in stock with `header` and the `data` bytes that are in it already.
    pub(super) fn send(
        &mut self,
        ram: &RamView,
        header: &Header,
        data: u32,
    ) -> Result<(), QueueFault> {
        let Some(chain) = self.stock.pop_front() else {
            return Ok(());
        };
        let rx = &mut self.rx.queue;
        let mut written = u32::try_from(Header::LEN).unwrap_or(0).saturating_add(data);
        if chain.write(ram, 0, &header.to_bytes()).is_err() {
            // Guest RAM was taken away under the driver's buffer.
            rx.count_error();
            written = 0;
        }
        rx.push(ram, chain, written)
    }
}
