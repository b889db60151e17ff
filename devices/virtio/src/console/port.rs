//! What a port's worker and the host's end of the port share: bytes on their way, and who is there.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::PortSink;

/// Bytes kept of each direction.
const KEPT: usize = 64 * 1024;

/// Wakes the device's worker.
pub(super) type Wake = Arc<EventFd>;

/// The console's size, and whether it is news for the guest.
#[derive(Debug, Clone, Default)]
pub(super) struct Size {
    /// Columns in the upper half, rows in the lower.
    cells: Arc<AtomicU32>,
    news: Arc<AtomicBool>,
}

impl Size {
    pub(super) fn get(&self) -> (u16, u16) {
        let [a, b, c, d] = self.cells.load(Ordering::Relaxed).to_be_bytes();
        (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
    }

    pub(super) fn set(&self, columns: u16, rows: u16) {
        let cells = (u32::from(columns) << 16) | u32::from(rows);
        if self.cells.swap(cells, Ordering::Relaxed) != cells {
            self.news.store(true, Ordering::Release);
        }
    }

    pub(super) fn take_news(&self) -> bool {
        self.news.swap(false, Ordering::AcqRel)
    }
}

struct State {
    sink: PortSink,
    /// Output that the sink has not taken.
    output: VecDeque<u8>,
    /// There is more in the guest's queue: `output` has no room for it, or others had their turn.
    held: bool,
    /// Input that the guest has not taken.
    input: VecDeque<u8>,
    /// Somebody was refused input and waits for room.
    room_wanted: bool,
    /// The host's end is open.
    connected: bool,
    lost: u64,
}

struct Shared {
    state: Mutex<State>,
    room: EventFd,
    wake: Wake,
    size: Size,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Fails only when it is set already.
        let _ = self.wake.write(1);
    }
}

/// The host's end of a port; clones share it.
#[derive(Clone)]
pub struct PortHandle {
    shared: Arc<Shared>,
}

impl PortHandle {
    pub(super) fn new(sink: PortSink, wake: &Wake, size: &Size) -> io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared {
                state: Mutex::new(State {
                    sink,
                    output: VecDeque::new(),
                    held: false,
                    input: VecDeque::new(),
                    room_wanted: false,
                    connected: true,
                    lost: 0,
                }),
                room: EventFd::new(EFD_NONBLOCK)?,
                wake: Arc::clone(wake),
                size: size.clone(),
            }),
        })
    }

    /// Gives the guest as much of `input` as there is room for; returns how many bytes.
    pub fn offer(&self, input: &[u8]) -> usize {
        let mut state = self.shared.lock();
        let room = KEPT.saturating_sub(state.input.len());
        let taken = input.len().min(room);
        state.input.extend(input.iter().take(taken));
        state.room_wanted = taken < input.len();
        drop(state);
        if taken > 0 {
            self.shared.wake();
        }
        taken
    }

    /// Readable once there is room again after a short [`Self::offer`]; non-blocking.
    pub fn room(&self) -> &EventFd {
        &self.shared.room
    }

    /// The sink takes bytes again. `true` once nothing waits any more.
    pub fn output_ready(&self) -> bool {
        let mut state = self.shared.lock();
        state.send();
        let room = state.output.len() < KEPT;
        if state.held && room {
            self.shared.wake();
        }
        state.output.is_empty() && !state.held
    }

    /// `true` while bytes wait for the sink.
    pub fn output_waiting(&self) -> bool {
        let state = self.shared.lock();
        state.held || !state.output.is_empty()
    }

    /// Bytes lost so far, because the sink failed.
    pub fn lost(&self) -> u64 {
        self.shared.lock().lost
    }

    /// The host's end is open, or is not; at first it is.
    pub fn set_connected(&self, connected: bool) {
        let was = std::mem::replace(&mut self.shared.lock().connected, connected);
        if was != connected {
            self.shared.wake();
        }
    }

    /// The console has so many columns and rows now.
    pub fn resize(&self, columns: u16, rows: u16) {
        self.shared.size.set(columns, rows);
        self.shared.wake();
    }

    pub(super) fn connected(&self) -> bool {
        self.shared.lock().connected
    }

    pub(super) fn has_input(&self) -> bool {
        !self.shared.lock().input.is_empty()
    }

    /// Takes up to `most` bytes of input.
    pub(super) fn take_input(&self, most: usize) -> Vec<u8> {
        let mut state = self.shared.lock();
        let count = state.input.len().min(most);
        let taken = state.input.drain(..count).collect();
        if state.input.is_empty() {
            state.input.shrink_to(0);
            if std::mem::take(&mut state.room_wanted) {
                let _ = self.shared.room.write(1);
            }
        }
        taken
    }

    /// Output of the guest's; returns how much is taken. What is not is to be tried again after a
    /// wake.
    pub(super) fn put(&self, bytes: &[u8]) -> usize {
        let mut state = self.shared.lock();
        state.send();
        let mut rest = bytes;
        if state.output.is_empty() {
            let sent = state.write(rest);
            rest = rest.get(sent..).unwrap_or_default();
        }
        let room = KEPT.saturating_sub(state.output.len());
        let kept = rest.len().min(room);
        state.output.extend(rest.iter().take(kept));
        let left = rest.len().saturating_sub(kept);
        bytes.len().saturating_sub(left)
    }

    /// Whether there is more in the guest's queue.
    pub(super) fn hold(&self, held: bool) {
        self.shared.lock().held = held;
    }

    /// The guest that input waits for is gone, and with it what is left in its queue.
    pub(super) fn reset(&self) {
        let mut state = self.shared.lock();
        state.input.clear();
        state.held = false;
        if std::mem::take(&mut state.room_wanted) {
            let _ = self.shared.room.write(1);
        }
    }
}

impl State {
    /// Sends what waits.
    fn send(&mut self) {
        while !self.output.is_empty() {
            let mut output = std::mem::take(&mut self.output);
            let (first, _) = output.as_slices();
            let sent = self.write(first);
            output.drain(..sent.min(output.len()));
            self.output = output;
            if sent == 0 {
                return;
            }
        }
        self.output.shrink_to(0);
    }

    /// What the sink takes of `bytes`. A sink that fails takes everything, and it is lost: waiting
    /// would not bring it back.
    fn write(&mut self, bytes: &[u8]) -> usize {
        loop {
            match self.sink.write(bytes) {
                Ok(count @ 1..) => return count,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return 0,
                Ok(_) | Err(_) => {
                    let lost = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
                    self.lost = self.lost.saturating_add(lost);
                    return bytes.len();
                }
            }
        }
    }
}
