//! A home for a device that can be closed.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{Access, Device, Target, fill_absent};

/// A lock around a device that can be closed once.
///
/// ```text
///   open ──close()──▶ closed        close() waits for the access in flight, then
///    │ access: locked, served       hands the device back; an access to a closed
///    ▼                              slot reads all-ones and drops writes.
/// ```
pub struct Slot<D: ?Sized> {
    device: Mutex<Option<Box<D>>>,
}

impl<D: ?Sized> Slot<D> {
    /// An open slot holding `device`.
    pub fn new(device: Box<D>) -> Self {
        Self {
            device: Mutex::new(Some(device)),
        }
    }

    /// Runs `f` on the device with the lock held, or returns `None` if the slot is closed.
    pub fn with<R>(&self, f: impl FnOnce(&mut D) -> R) -> Option<R> {
        self.lock().as_deref_mut().map(f)
    }

    /// Closes the slot: waits for an access in flight and returns the device, `None` if it was
    /// closed before. Must not be called from inside an access to the same slot.
    pub fn close(&self) -> Option<Box<D>> {
        self.lock().take()
    }

    // A panic inside a device aborts the VMM in release builds; in tests, the device's state is
    // whatever the panic left, which is no reason to hide the first failure behind a second one.
    fn lock(&self) -> MutexGuard<'_, Option<Box<D>>> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: Device + ?Sized> Target for Slot<D> {
    fn read(&self, at: Access, data: &mut [u8]) {
        if self.with(|d| d.read(at, data)).is_none() {
            fill_absent(data);
        }
    }

    fn write(&self, at: Access, data: &[u8]) {
        self.with(|d| d.write(at, data));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};
    use std::time::Duration;

    use super::*;

    struct Echo(u8);

    impl Device for Echo {
        fn read(&mut self, _at: Access, data: &mut [u8]) {
            data.fill(self.0);
        }
        fn write(&mut self, _at: Access, data: &[u8]) {
            self.0 = data.first().copied().unwrap_or(0);
        }
    }

    #[test]
    fn closed_slot_reads_all_ones_and_swallows_writes() {
        let slot: Slot<dyn Device> = Slot::new(Box::new(Echo(0)));
        let at = Access { offset: 0 };
        let mut data = [0; 2];
        slot.write(at, &[0x5a]);
        slot.read(at, &mut data);
        assert_eq!(data, [0x5a; 2]);

        let mut back = slot.close().unwrap();
        back.read(at, &mut data);
        assert_eq!(data, [0x5a; 2], "close hands back the device as it was");
        assert!(slot.close().is_none());
        slot.write(at, &[1]);
        slot.read(at, &mut data);
        assert_eq!(data, [0xff; 2]);
    }

    #[test]
    fn close_waits_for_the_access_in_flight() {
        struct Slow(mpsc::Sender<()>, mpsc::Receiver<()>);
        impl Device for Slow {
            fn read(&mut self, _at: Access, data: &mut [u8]) {
                self.0.send(()).unwrap();
                self.1.recv().unwrap();
                data.fill(7);
            }
            fn write(&mut self, _at: Access, _data: &[u8]) {}
        }
        let (entered_tx, entered) = mpsc::channel();
        let (go, go_rx) = mpsc::channel();
        let slot: Arc<Slot<dyn Device>> = Arc::new(Slot::new(Box::new(Slow(entered_tx, go_rx))));
        let reader = {
            let slot = Arc::clone(&slot);
            std::thread::spawn(move || {
                let mut data = [0];
                slot.read(Access { offset: 0 }, &mut data);
                data[0]
            })
        };
        entered.recv().unwrap();
        let (closed_tx, closed) = mpsc::channel();
        let closer = {
            let slot = Arc::clone(&slot);
            std::thread::spawn(move || {
                let device = slot.close();
                closed_tx.send(()).unwrap();
                device.is_some()
            })
        };
        assert!(closed.recv_timeout(Duration::from_millis(50)).is_err());
        go.send(()).unwrap();
        assert!(closer.join().unwrap());
        assert_eq!(reader.join().unwrap(), 7);
    }
}
