//! Any accesses to the watchdog's configuration space and registers, with time-outs, pauses and resets
//! of the guest between them.
//!
//! Input: steps of 8 bytes each: what, where (2 bytes), width, value (4 bytes).
#![no_main]

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use libfuzzer_sys::fuzz_target;
use testudo_bus::{Access, GuestEvent, Mailbox};
use testudo_legacy::I6300Esb;
use testudo_pci::PciFunction;

const STEP: usize = 8;
const LOCK: u16 = 0x68;
const RELOAD: u64 = 0xc;
const TIMED_OUT: u16 = 1 << 9;

/// Counts what it is told.
#[derive(Default)]
struct Letters(AtomicU64);

impl Mailbox for Letters {
    fn post(&self, event: GuestEvent) {
        assert!(matches!(event, GuestEvent::Watchdog), "{event:?}");
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn unlocked(device: &mut I6300Esb, offset: u64, value: u32) {
    for word in [0x80_u16, 0x86] {
        device.bar_write(0, Access { offset: RELOAD }, &word.to_le_bytes());
    }
    device.bar_write(0, Access { offset }, &value.to_le_bytes());
}

fuzz_target!(|data: &[u8]| {
    let letters = Arc::new(Letters::default());
    let timed_out = Arc::new(AtomicBool::new(false));
    let make = || I6300Esb::new(letters.clone(), Arc::clone(&timed_out)).expect("a timer");
    let (mut device, mut handle) = make();
    let mut looks = 0;
    for [what, low, high, width, value @ ..] in data.as_chunks::<STEP>().0 {
        let place = u16::from_le_bytes([*low, *high]);
        let width = 1usize << (width & 3).min(2);
        let offset = u64::from(place) & (I6300Esb::BAR_SIZE - 1);
        let inside = offset + width as u64 <= I6300Esb::BAR_SIZE;
        let mut value = *value;
        match what & 7 {
            0 if inside => device.bar_write(0, Access { offset }, &value[..width]),
            1 if inside => device.bar_read(0, Access { offset }, &mut value[..width]),
            2 => {
                // Where the device's own registers are, or anywhere.
                let near = 0x60 + (place & 0xf);
                let place = if what & 8 == 0 { near } else { place & 0xfff };
                if usize::from(place) + width <= 4096 {
                    let locked = |device: &mut I6300Esb| {
                        let mut control = [0];
                        device.config_read(LOCK, &mut control);
                        control[0]
                    };
                    let before = locked(&mut device);
                    device.config_write(place, &value[..width]);
                    assert!(
                        before & 1 == 0 || locked(&mut device) == before,
                        "it is locked"
                    );
                }
            }
            3 if usize::from(place & 0xfff) + width <= 4096 => {
                device.config_read(place & 0xfff, &mut value[..width]);
            }
            4 => unlocked(&mut device, offset & !3, u32::from_le_bytes(value)),
            5 => {
                device.pause();
                device.resume();
            }
            6 => {
                // The shortest there is, and the thread that watches it comes by.
                looks += 1;
                handle.expired();
            }
            7 if what & 0x78 == 0 => {
                let (again, its) = make();
                (device, handle) = (again, its);
            }
            _ => {}
        }
    }
    assert!(handle.as_raw_fd() >= 0);
    assert!(
        letters.0.load(Ordering::Relaxed) <= looks,
        "told of nothing"
    );
    // A guest that was given up is known in its next life, until it says so.
    let mut reload = [0; 2];
    device.bar_read(0, Access { offset: RELOAD }, &mut reload);
    let known = u16::from_le_bytes(reload) & TIMED_OUT != 0;
    assert_eq!(known, timed_out.load(Ordering::Relaxed));
    unlocked(&mut device, RELOAD, u32::from(TIMED_OUT));
    assert!(!timed_out.load(Ordering::Relaxed));
});
