//! The watchdog's timer on the `io` thread.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use testudo_bus::Mailbox;
use testudo_legacy::{I6300Esb, WatchdogHandle};
use virtio_devices::{Attachment, IoHandle};

/// The guard of the timer's events.
pub(crate) type WatchdogTimer = Attachment<Timer>;

pub(crate) struct Timer(WatchdogHandle);

/// A watchdog that tells `mailbox`, its timer served in `io`'s thread.
pub(crate) fn watchdog(
    mailbox: Arc<dyn Mailbox>,
    timed_out: &Arc<AtomicBool>,
    io: &IoHandle,
) -> io::Result<(I6300Esb, WatchdogTimer)> {
    let made = I6300Esb::new(mailbox, Arc::clone(timed_out));
    let (device, handle) = made.map_err(io::Error::other)?;
    let timer = io.attach(Timer(handle)).map_err(io::Error::other)?;
    Ok((device, timer))
}

impl MutEventSubscriber for Timer {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(e) = ops.add(Events::new(&self.0, EventSet::IN)) {
            log::error!("the watchdog does not work: {e}");
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.0.expired();
    }
}
