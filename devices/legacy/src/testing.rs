//! What the tests of this crate share: a mailbox and an interrupt line that remember.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use testudo_bus::{Access, Device, GuestEvent, IrqLine, Mailbox};

#[derive(Default)]
pub(crate) struct Letters(Mutex<Vec<GuestEvent>>);

impl Letters {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn take(&self) -> Vec<GuestEvent> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

impl Mailbox for Letters {
    fn post(&self, event: GuestEvent) {
        self.0.lock().unwrap().push(event);
    }
}

#[derive(Default)]
pub(crate) struct Edges(AtomicUsize);

impl Edges {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl IrqLine for Edges {
    fn trigger(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

pub(crate) fn read(device: &mut impl Device, offset: u64) -> u8 {
    let mut data = [0];
    device.read(Access { offset }, &mut data);
    data[0]
}

pub(crate) fn write(device: &mut impl Device, offset: u64, value: u8) {
    device.write(Access { offset }, &[value]);
}
