//! What the tests of this crate share: a function with BARs of plain memory, and fake vectors.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use testudo_bus::{Access, IrqError, Msi, MsiMessage, MsiVector};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{Bar, ClassCode, ConfigSpace, Identity, PciFunction};

pub(crate) const IDENTITY: Identity = Identity {
    vendor: 0x1234,
    device: 0x5678,
    revision: 9,
    class: ClassCode {
        base: 0xff,
        sub: 0x01,
        interface: 0x02,
    },
    subsystem_vendor: 0xabcd,
    subsystem: 0xef01,
};

pub(crate) type Moves = Arc<Mutex<Vec<(u8, Option<u64>)>>>;

/// Every BAR reads as its tag.
pub(crate) struct Tagged {
    pub(crate) config: ConfigSpace,
    pub(crate) tag: u8,
    pub(crate) moves: Moves,
}

impl Tagged {
    pub(crate) fn new(tag: u8, bars: &[Bar]) -> Self {
        let mut config = ConfigSpace::new(&IDENTITY);
        for bar in bars {
            config.add_bar(*bar).unwrap();
        }
        Self {
            config,
            tag,
            moves: Moves::default(),
        }
    }
}

impl PciFunction for Tagged {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }
    fn bar_read(&mut self, _bar: u8, _at: Access, data: &mut [u8]) {
        data.fill(self.tag);
    }
    fn bar_write(&mut self, _bar: u8, _at: Access, data: &[u8]) {
        self.tag = data[0];
    }
    fn bar_moved(&mut self, bar: u8, base: Option<u64>) {
        self.moves.lock().unwrap().push((bar, base));
    }
}

/// A vector that remembers its route.
pub(crate) struct FakeVector {
    event: EventFd,
    route: Arc<Mutex<Option<MsiMessage>>>,
    calls: Arc<AtomicUsize>,
}

#[derive(Default)]
pub(crate) struct FakeMsi {
    pub(crate) routes: Mutex<Vec<Arc<Mutex<Option<MsiMessage>>>>>,
    pub(crate) calls: Arc<AtomicUsize>,
}

impl FakeMsi {
    pub(crate) fn route(&self, index: usize) -> Option<MsiMessage> {
        *self.routes.lock().unwrap()[index].lock().unwrap()
    }
}

impl Msi for FakeMsi {
    fn vector(&self) -> Result<Box<dyn MsiVector>, IrqError> {
        let route = Arc::default();
        self.routes.lock().unwrap().push(Arc::clone(&route));
        Ok(Box::new(FakeVector {
            event: EventFd::new(EFD_NONBLOCK).unwrap(),
            route,
            calls: Arc::clone(&self.calls),
        }))
    }
}

impl MsiVector for FakeVector {
    fn enable(&self, message: MsiMessage) -> Result<(), IrqError> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        *self.route.lock().unwrap() = Some(message);
        Ok(())
    }
    fn disable(&self) {
        self.calls.fetch_add(1, Ordering::SeqCst);
        *self.route.lock().unwrap() = None;
    }
    fn eventfd(&self) -> &EventFd {
        &self.event
    }
}
