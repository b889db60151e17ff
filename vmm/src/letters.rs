//! What other threads tell the control thread: a bounded queue with an eventfd.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use testudo_bus::{GuestEvent, Mailbox};
use testudo_kvm::RunError;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Debug-port bytes kept at most; a guest that writes faster than the control thread reads loses
/// the excess, which is counted.
const DEBUG_BYTES: usize = 256;

/// One letter.
#[derive(Debug)]
pub(crate) enum Letter {
    /// The guest did something that concerns the machine.
    Guest(GuestEvent),
    /// A vCPU cannot go on.
    VcpuFailed { index: u16, error: RunError },
    /// A device asks for what only the control thread may do.
    DeviceAsks,
    /// The user at the terminal asked to end the VM.
    EndRequested,
}

#[derive(Default)]
struct Queue {
    letters: VecDeque<Letter>,
    debug_bytes: usize,
    debug_bytes_lost: u64,
}

struct Shared {
    queue: Mutex<Queue>,
    event: EventFd,
    /// The guest has powered off or reset: it has nothing left to do.
    guest_done: AtomicBool,
}

/// The control thread's post box; clones share it.
#[derive(Clone)]
pub(crate) struct Letters {
    shared: Arc<Shared>,
}

impl Letters {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared {
                queue: Mutex::default(),
                event: EventFd::new(EFD_NONBLOCK)?,
                guest_done: AtomicBool::new(false),
            }),
        })
    }

    /// Delivers `letter`. A guest event that already waits is not queued twice, so the queue is
    /// bounded by the number of kinds of event and [`DEBUG_BYTES`].
    pub(crate) fn send(&self, letter: Letter) {
        let mut queue = self.lock();
        match &letter {
            Letter::Guest(GuestEvent::DebugPort(_)) => {
                if queue.debug_bytes >= DEBUG_BYTES {
                    queue.debug_bytes_lost = queue.debug_bytes_lost.saturating_add(1);
                    return;
                }
                queue.debug_bytes = queue.debug_bytes.saturating_add(1);
            }
            Letter::Guest(event) => {
                if matches!(event, GuestEvent::PowerOff | GuestEvent::Reset) {
                    self.shared.guest_done.store(true, Ordering::Release);
                }
                let same = |l: &Letter| matches!(l, Letter::Guest(e) if e == event);
                if queue.letters.iter().any(same) {
                    return;
                }
            }
            Letter::DeviceAsks => {
                if queue
                    .letters
                    .iter()
                    .any(|l| matches!(l, Letter::DeviceAsks))
                {
                    return;
                }
            }
            Letter::VcpuFailed { .. } | Letter::EndRequested => {}
        }
        queue.letters.push_back(letter);
        drop(queue);
        let _ = self.shared.event.write(1);
    }

    /// Readable while letters wait.
    pub(crate) fn event(&self) -> &EventFd {
        &self.shared.event
    }

    /// Takes all letters that wait.
    pub(crate) fn take(&self) -> VecDeque<Letter> {
        let _ = self.shared.event.read();
        let mut queue = self.lock();
        queue.debug_bytes = 0;
        std::mem::take(&mut queue.letters)
    }

    /// Whether the guest has powered off or reset: a vCPU that finds it so stays out of the guest,
    /// which would only poll for the end that the control thread is about to bring.
    pub(crate) fn guest_done(&self) -> bool {
        self.shared.guest_done.load(Ordering::Acquire)
    }

    /// Forgets what waits: letters of a guest that has been taken down.
    pub(crate) fn clear(&self) {
        self.shared.guest_done.store(false, Ordering::Release);
        drop(self.take());
    }

    /// Debug-port bytes the guest wrote faster than they were read.
    pub(crate) fn debug_bytes_lost(&self) -> u64 {
        self.lock().debug_bytes_lost
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.shared
            .queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Mailbox for Letters {
    fn post(&self, event: GuestEvent) {
        self.send(Letter::Guest(event));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_make_the_queue_grow() {
        let letters = Letters::new().unwrap();
        for n in 0..100_000_u32 {
            letters.post(GuestEvent::Reset);
            letters.send(Letter::DeviceAsks);
            letters.post(GuestEvent::DebugPort(n.to_le_bytes()[0]));
        }
        letters.post(GuestEvent::PowerOff);
        let got = letters.take();
        assert_eq!(got.len(), DEBUG_BYTES + 3);
        assert!(matches!(
            got.back(),
            Some(Letter::Guest(GuestEvent::PowerOff))
        ));
        assert_eq!(letters.debug_bytes_lost(), 100_000 - DEBUG_BYTES as u64);
        assert!(letters.take().is_empty());
    }
}
