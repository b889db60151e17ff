//! The transmitter: hands bytes to the sink in order and keeps those it would not take yet.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};

/// Bytes that may wait for a non-blocking sink before bytes are lost.
pub const BACKLOG: usize = 64 * 1024;

pub(super) struct Transmit {
    sink: Box<dyn Write + Send>,
    backlog: VecDeque<u8>,
    lost: u64,
}

/// What became of a run of bytes given to the sink.
enum Sent {
    All,
    /// This many; the sink would block.
    Part(usize),
}

impl Transmit {
    pub(super) fn new(sink: Box<dyn Write + Send>) -> Self {
        Self {
            sink,
            backlog: VecDeque::new(),
            lost: 0,
        }
    }

    pub(super) fn waiting(&self) -> bool {
        !self.backlog.is_empty()
    }

    pub(super) fn lost(&self) -> u64 {
        self.lost
    }

    /// Sends what waits; `true` if nothing waits any more.
    pub(super) fn send_backlog(&mut self) -> bool {
        let Sent::Part(count) = send(
            &mut self.sink,
            &mut self.lost,
            self.backlog.make_contiguous(),
        ) else {
            self.backlog = VecDeque::new();
            return true;
        };
        self.backlog.drain(..count.min(self.backlog.len()));
        false
    }

    fn queue(&mut self, bytes: &[u8]) {
        let room = BACKLOG.saturating_sub(self.backlog.len());
        let kept = bytes.len().min(room);
        self.backlog.extend(bytes.iter().take(kept));
        count_lost(&mut self.lost, bytes.len().saturating_sub(kept));
    }
}

/// Bytes a failing sink refused count as lost and as sent: waiting would not bring them back.
fn send(sink: &mut dyn Write, lost: &mut u64, bytes: &[u8]) -> Sent {
    let mut rest = bytes;
    while !rest.is_empty() {
        match sink.write(rest) {
            Ok(0) => {
                count_lost(lost, rest.len());
                return Sent::All;
            }
            Ok(count) => rest = rest.get(count..).unwrap_or_default(),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                return Sent::Part(bytes.len().saturating_sub(rest.len()));
            }
            Err(e) => {
                if *lost == 0 {
                    log::warn!("serial: the console's sink fails, its output is lost: {e}");
                }
                count_lost(lost, rest.len());
                return Sent::All;
            }
        }
    }
    Sent::All
}

fn count_lost(lost: &mut u64, bytes: usize) {
    *lost = lost.saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX));
}

impl Write for Transmit {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.waiting() {
            self.queue(bytes);
        } else if let Sent::Part(count) = send(&mut self.sink, &mut self.lost, bytes) {
            self.queue(bytes.get(count..).unwrap_or_default());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        // A sink that buffers is the VMM's own; an error shows at its next write.
        match self.sink.flush() {
            Err(e) if e.kind() != ErrorKind::WouldBlock => {
                log::debug!("serial: flush: {e}");
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
