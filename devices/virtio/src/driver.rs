//! A driver for tests: guest RAM in this process, rings written by hand, registers reached the way
//! a guest reaches them.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use testudo_bus::{
    Access, Doorbell, DoorbellAddress, Doorbells, IrqError, Msi, MsiMessage, MsiVector,
};
use testudo_memory::{GuestWindows, HostWindow, RamHandle, RamView, WindowGuard};
use testudo_pci::PciFunction;
use vm_memory::{Bytes, FileOffset, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{IoHandle, IoThread, Status, VirtioModel, VirtioPci, Wiring, features};

pub(crate) const RAM_SIZE: usize = 1 << 20;
/// Where request buffers go; rings are below.
pub(crate) const BUFFERS: u64 = 0x8_0000;
/// Where indirect tables go.
pub(crate) const TABLES: u64 = 0x7_0000;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

pub(crate) const NOTIFY: u64 = 0x3000;

/// Offsets of the common configuration.
pub(crate) mod reg {
    pub(crate) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(crate) const DEVICE_FEATURE: u64 = 0x04;
    pub(crate) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(crate) const DRIVER_FEATURE: u64 = 0x0c;
    pub(crate) const CONFIG_VECTOR: u64 = 0x10;
    pub(crate) const NUM_QUEUES: u64 = 0x12;
    pub(crate) const STATUS: u64 = 0x14;
    pub(crate) const QUEUE_SELECT: u64 = 0x16;
    pub(crate) const QUEUE_SIZE: u64 = 0x18;
    pub(crate) const QUEUE_VECTOR: u64 = 0x1a;
    pub(crate) const QUEUE_ENABLE: u64 = 0x1c;
    pub(crate) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub(crate) const QUEUE_DESC: u64 = 0x20;
    pub(crate) const QUEUE_DRIVER: u64 = 0x28;
    pub(crate) const QUEUE_DEVICE: u64 = 0x30;
}

#[derive(Default)]
pub(crate) struct FakeMsi {
    pub(crate) events: Mutex<Vec<EventFd>>,
}

struct FakeVector(EventFd);

impl Msi for FakeMsi {
    fn vector(&self) -> Result<Box<dyn MsiVector>, IrqError> {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        self.events.lock().unwrap().push(event.try_clone().unwrap());
        Ok(Box::new(FakeVector(event)))
    }
}

impl MsiVector for FakeVector {
    fn enable(&self, _message: MsiMessage) -> Result<(), IrqError> {
        Ok(())
    }
    fn disable(&self) {}
    fn eventfd(&self) -> &EventFd {
        &self.0
    }
}

/// Remembers which addresses are bound.
#[derive(Default, Clone)]
pub(crate) struct FakeDoorbells {
    bound: Arc<Mutex<BTreeMap<u64, Arc<EventFd>>>>,
    refuse: Arc<Mutex<bool>>,
}

struct FakeDoorbell(FakeDoorbells, u64);

impl FakeDoorbells {
    pub(crate) fn addresses(&self) -> Vec<u64> {
        self.bound.lock().unwrap().keys().copied().collect()
    }

    pub(crate) fn refuse(&self) {
        *self.refuse.lock().unwrap() = true;
    }
}

impl Doorbells for FakeDoorbells {
    fn bind(&self, at: DoorbellAddress, event: &Arc<EventFd>) -> io::Result<Box<dyn Doorbell>> {
        let DoorbellAddress::Mmio(at) = at else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        if *self.refuse.lock().unwrap() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let old = self.bound.lock().unwrap().insert(at, Arc::clone(event));
        assert!(old.is_none(), "{at:#x} is bound twice");
        Ok(Box::new(FakeDoorbell(self.clone(), at)))
    }
}

impl Doorbell for FakeDoorbell {}

impl Drop for FakeDoorbell {
    fn drop(&mut self) {
        self.0.bound.lock().unwrap().remove(&self.1);
    }
}

/// Remembers where windows are shown.
#[derive(Default, Clone)]
pub(crate) struct FakeWindows {
    shown: Arc<Mutex<BTreeMap<u64, u64>>>,
}

struct FakeWindow(FakeWindows, u64);

impl FakeWindows {
    /// Address and length of each.
    pub(crate) fn shown(&self) -> Vec<(u64, u64)> {
        let shown = self.shown.lock().unwrap();
        shown.iter().map(|(at, len)| (*at, *len)).collect()
    }
}

impl GuestWindows for FakeWindows {
    fn show(
        &self,
        gpa: u64,
        window: &Arc<HostWindow>,
        _readonly: bool,
    ) -> io::Result<Box<dyn WindowGuard>> {
        let old = self.shown.lock().unwrap().insert(gpa, window.len());
        assert!(old.is_none(), "{gpa:#x} is shown twice");
        Ok(Box::new(FakeWindow(self.clone(), gpa)))
    }
}

impl WindowGuard for FakeWindow {}

impl Drop for FakeWindow {
    fn drop(&mut self) {
        self.0.shown.lock().unwrap().remove(&self.1);
    }
}

/// One descriptor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Desc {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Desc {
    pub(crate) fn new(addr: u64, len: u32, flags: u16, next: u16) -> Self {
        Self {
            addr,
            len,
            flags,
            next,
        }
    }
}

/// Where one queue's areas are.
#[derive(Clone, Copy)]
pub(crate) struct Areas {
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    pub(crate) size: u16,
}

impl Areas {
    pub(crate) fn of(queue: u16, size: u16) -> Self {
        let base = 0x1_0000 + u64::from(queue) * 0x4000;
        Self {
            desc: base,
            avail: base + 0x2000,
            used: base + 0x3000,
            size,
        }
    }
}

pub(crate) fn write_desc(ram: &RamView, table: u64, index: u16, desc: Desc) {
    let mut bytes = Vec::new();
    bytes.extend(desc.addr.to_le_bytes());
    bytes.extend(desc.len.to_le_bytes());
    bytes.extend(desc.flags.to_le_bytes());
    bytes.extend(desc.next.to_le_bytes());
    let at = table + u64::from(index) * 16;
    ram.write_slice(&bytes, GuestAddress(at)).unwrap();
}

pub(crate) fn get_u16(ram: &RamView, at: u64) -> u16 {
    ram.read_obj::<u16>(GuestAddress(at)).unwrap()
}

pub(crate) fn put_u16(ram: &RamView, at: u64, value: u16) {
    ram.write_obj(value, GuestAddress(at)).unwrap();
}

/// Makes `head` available.
pub(crate) fn offer(ram: &RamView, areas: &Areas, head: u16) {
    let index = get_u16(ram, areas.avail + 2);
    let slot = areas.avail + 4 + u64::from(index % areas.size) * 2;
    put_u16(ram, slot, head);
    put_u16(ram, areas.avail + 2, index.wrapping_add(1));
}

/// The used ring's entries from position `from` on.
pub(crate) fn used_from(ram: &RamView, areas: &Areas, from: u16) -> Vec<(u32, u32)> {
    let end = get_u16(ram, areas.used + 2);
    (0..end.wrapping_sub(from))
        .map(|n| {
            let slot = u64::from(from.wrapping_add(n) % areas.size) * 8;
            let at = areas.used + 4 + slot;
            let id = ram.read_obj::<u32>(GuestAddress(at)).unwrap();
            (id, ram.read_obj::<u32>(GuestAddress(at + 4)).unwrap())
        })
        .collect()
}

/// RAM that can be shared with a back-end.
pub(crate) fn ram() -> RamView {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = std::fs::File::from(rustix::fs::memfd_create("ram", flags).unwrap());
    file.set_len(RAM_SIZE as u64).unwrap();
    let file = Some(FileOffset::new(file, 0));
    RamView::from_ranges_with_files([(GuestAddress(0), RAM_SIZE, file)]).unwrap()
}

/// A machine with one virtio-pci function and a driver for it.
pub(crate) struct Driver {
    pub(crate) ram: RamView,
    pub(crate) function: VirtioPci,
    pub(crate) msi: FakeMsi,
    pub(crate) doorbells: FakeDoorbells,
    pub(crate) windows: FakeWindows,
    pub(crate) seen: BTreeMap<u16, u16>,
    features: u64,
    pub(crate) io: IoThread,
}

impl Driver {
    pub(crate) fn new(make: impl FnOnce(&IoHandle) -> Box<dyn VirtioModel>) -> Self {
        let io = IoThread::spawn("io-test", || Ok(())).unwrap();
        let ram = ram();
        let msi = FakeMsi::default();
        let doorbells = FakeDoorbells::default();
        let windows = FakeWindows::default();
        let function = VirtioPci::new(
            make(&io.handle()),
            Wiring {
                ram: RamHandle::new(ram.clone()),
                msi: &msi,
                doorbells: Arc::new(doorbells.clone()),
                windows: Arc::new(windows.clone()),
            },
        )
        .unwrap();
        Self {
            ram,
            function,
            msi,
            doorbells,
            windows,
            seen: BTreeMap::new(),
            features: 0,
            io,
        }
    }

    pub(crate) fn read<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.function
            .bar_read(VirtioPci::BAR, Access { offset }, &mut data);
        data
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        self.function
            .bar_write(VirtioPci::BAR, Access { offset }, data);
    }

    pub(crate) fn u16(&mut self, offset: u64) -> u16 {
        u16::from_le_bytes(self.read(offset))
    }

    pub(crate) fn u64(&mut self, offset: u64) -> u64 {
        u64::from_le_bytes(self.read(offset))
    }

    pub(crate) fn put_u16(&mut self, offset: u64, value: u16) {
        self.write(offset, &value.to_le_bytes());
    }

    pub(crate) fn put_u32(&mut self, offset: u64, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    pub(crate) fn put_u64(&mut self, offset: u64, value: u64) {
        self.write(offset, &value.to_le_bytes());
    }

    pub(crate) fn status(&mut self) -> u8 {
        let [status] = self.read(reg::STATUS);
        status
    }

    pub(crate) fn set_status(&mut self, status: u8) {
        self.write(reg::STATUS, &[status]);
    }

    pub(crate) fn offered(&mut self) -> u64 {
        let mut features = 0;
        for page in [1, 0] {
            self.put_u32(reg::DEVICE_FEATURE_SELECT, page);
            let bits = u32::from_le_bytes(self.read(reg::DEVICE_FEATURE));
            features = (features << 32) | u64::from(bits);
        }
        features
    }

    /// Up to FEATURES_OK; returns whether the device took the features.
    pub(crate) fn negotiate(&mut self, features: u64) -> bool {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.seen.clear();
        self.set_status(Status::ACKNOWLEDGE);
        self.set_status(Status::ACKNOWLEDGE | Status::DRIVER);
        for (page, bits) in [(0, features), (1, features >> 32)] {
            self.put_u32(reg::DRIVER_FEATURE_SELECT, page);
            let bits = u32::try_from(bits & 0xffff_ffff).unwrap();
            self.put_u32(reg::DRIVER_FEATURE, bits);
        }
        self.features = features;
        self.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK);
        self.status() & Status::FEATURES_OK != 0
    }

    /// Clears the rings and sets the queue's registers.
    pub(crate) fn set_up(&mut self, queue: u16, areas: &Areas) {
        let zero = vec![0; 0x4000];
        self.ram
            .write_slice(&zero, GuestAddress(Areas::of(queue, 1).desc))
            .unwrap();
        self.put_u16(reg::QUEUE_SELECT, queue);
        self.put_u16(reg::QUEUE_SIZE, areas.size);
        self.put_u64(reg::QUEUE_DESC, areas.desc);
        self.put_u64(reg::QUEUE_DRIVER, areas.avail);
        self.put_u64(reg::QUEUE_DEVICE, areas.used);
        self.put_u16(reg::QUEUE_VECTOR, queue + 1);
        self.put_u16(reg::QUEUE_ENABLE, 1);
    }

    pub(crate) fn driver_ok(&mut self) {
        self.set_status(0x0f);
    }

    /// From reset to a running device with `features` and every queue of 16 descriptors.
    pub(crate) fn start(&mut self, features: u64) {
        assert!(self.negotiate(features));
        self.put_u16(reg::CONFIG_VECTOR, 0);
        for queue in 0..self.u16(reg::NUM_QUEUES) {
            self.set_up(queue, &Areas::of(queue, 16));
        }
        self.driver_ok();
        assert_eq!(self.status(), 0x0f);
    }

    /// Like [`start_full`](Self::start_full), for a device that may find out that it cannot.
    pub(crate) fn start_full_or_broken(&mut self) {
        let offered = self.offered();
        assert!(self.negotiate(offered));
        self.put_u16(reg::CONFIG_VECTOR, 0);
        for queue in 0..self.u16(reg::NUM_QUEUES) {
            self.set_up(queue, &Areas::of(queue, 16));
        }
        self.driver_ok();
    }

    /// Like [`start`](Self::start), with everything that is offered.
    pub(crate) fn start_full(&mut self) {
        let offered = self.offered();
        assert_eq!(offered & features::COMMON, features::COMMON);
        self.start(offered);
    }

    /// Writes `descs` from descriptor 0 on, offers 0 and kicks if the device wants it.
    pub(crate) fn submit(&mut self, queue: u16, descs: &[Desc]) {
        let areas = Areas::of(queue, 16);
        for (index, desc) in (0..).zip(descs) {
            write_desc(&self.ram, areas.desc, index, *desc);
        }
        self.offer_one(queue, 0);
    }

    /// Makes `head` available and kicks if the device wants it.
    pub(crate) fn offer_one(&mut self, queue: u16, head: u16) {
        let areas = Areas::of(queue, 16);
        offer(&self.ram, &areas, head);
        if self.kick_wanted(&areas) {
            self.kick(queue);
        }
    }

    /// As a driver decides after it made one chain available (virtio 1.2 §2.7.13.4).
    fn kick_wanted(&self, areas: &Areas) -> bool {
        fence(Ordering::SeqCst);
        if self.features & features::EVENT_IDX == 0 {
            return get_u16(&self.ram, areas.used) & 1 == 0;
        }
        let new = get_u16(&self.ram, areas.avail + 2);
        let event = get_u16(&self.ram, areas.used + 4 + u64::from(areas.size) * 8);
        new.wrapping_sub(event).wrapping_sub(1) < 1
    }

    pub(crate) fn kick(&mut self, queue: u16) {
        self.put_u16(NOTIFY + u64::from(queue) * 4, queue);
    }

    /// The next entry of the used ring, waited for.
    pub(crate) fn used(&mut self, queue: u16) -> (u32, u32) {
        let from = self.seen.get(&queue).copied().unwrap_or(0);
        let areas = Areas::of(queue, 16);
        let ram = self.ram.clone();
        let entry = wait_for("a used buffer", || {
            used_from(&ram, &areas, from).first().copied()
        });
        self.seen.insert(queue, from.wrapping_add(1));
        entry
    }

    /// How many buffers the device has used, and the driver has seen used, in all.
    pub(crate) fn progress(&self, queue: u16) -> (u16, u16) {
        let areas = Areas::of(queue, 16);
        let seen = self.seen.get(&queue).copied().unwrap_or(0);
        (get_u16(&self.ram, areas.used + 2), seen)
    }

    /// Waits for an interrupt on `vector`.
    pub(crate) fn interrupt(&self, vector: usize) {
        wait_for("an interrupt", || {
            self.msi.events.lock().unwrap()[vector].read().ok()
        });
    }

    pub(crate) fn wait_needs_reset(&mut self) {
        wait_for("DEVICE_NEEDS_RESET", || {
            (self.status() & Status::NEEDS_RESET != 0).then_some(())
        });
    }
}

pub(crate) fn wait_for<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = poll() {
            return found;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "no {what}");
        std::thread::yield_now();
    }
}
