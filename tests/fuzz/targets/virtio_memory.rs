//! Any rings, descriptors, requests and register accesses against the memory devices: pmem, mem and
//! balloon, served by their workers as in a VM.
//!
//! Input: a byte that chooses device and features, the number of accesses, the accesses (12 bytes
//! each), and what is in guest RAM from its beginning at 4 KiB on.
#![no_main]

use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use testudo_bus::Access;
use testudo_fuzz::{Host, Nothing};
use testudo_memory::{RamHandle, RamView};
use testudo_pci::PciFunction;
use virtio_devices::{
    Balloon, BalloonLink, BalloonOptions, IoHandle, IoThread, Mem, MemChange, MemLink, MemRegion,
    Pmem, PmemRegion, VirtioModel, VirtioPci, Wiring,
};
use vm_memory::{Bytes, GuestAddress};

const RAM: usize = 64 << 10;
const RAM_START: u64 = 0x1000;
const STEP: usize = 12;
const REGION: MemRegion = MemRegion {
    start: 1 << 32,
    size: 64 << 20,
    block: 2 << 20,
    slack: 4 << 20,
};

fn model(how: u8, io: &IoHandle) -> (Box<dyn VirtioModel>, Option<MemLink>) {
    match how & 3 {
        0 => {
            let region = PmemRegion {
                start: 1 << 32,
                size: 2 << 20,
                shown: Box::new(Nothing::new()),
            };
            (Box::new(Pmem::new(region, None, io.clone())), None)
        }
        1 => {
            let link = MemLink::new(REGION, 32 << 20, Box::new(|| {})).expect("a link");
            (Box::new(Mem::new(link.clone(), io.clone())), Some(link))
        }
        _ => {
            let options = BalloonOptions {
                deflate_on_oom: true,
                stats: (how & 4 != 0).then_some(Duration::from_micros(50)),
                reporting: how & 8 != 0,
                page: if how & 16 != 0 { 4096 } else { 2 << 20 },
            };
            let link = BalloonLink::new(1 << 20).expect("a link");
            let balloon = Balloon::new(options, link, io.clone()).expect("a balloon");
            (Box::new(balloon), None)
        }
    }
}

/// Every block there is, plugged or not, lies in the region, and nothing is plugged twice.
fn attend(link: &MemLink) {
    link.attend(|change| {
        match change {
            MemChange::Plug { gpa, size } | MemChange::Unplug { gpa, size } => {
                assert!(gpa >= REGION.start && size > 0);
                assert!(gpa + size <= REGION.start + REGION.size);
                assert_eq!((gpa | size) % REGION.block, 0);
            }
            MemChange::UnplugAll => {}
        }
        true
    });
    let levels = link.levels();
    assert!(levels.plugged <= 32 << 20 && levels.usable <= REGION.size);
}

/// What a driver does, with the rings of each queue at a place of its own.
fn set_up(function: &mut VirtioPci, how: u8) {
    let mut put =
        |offset: u64, data: &[u8]| function.bar_write(VirtioPci::BAR, Access { offset }, data);
    for status in [0_u8, 1, 3] {
        put(20, &[status]);
    }
    // All of the device's own features, and of the rings' what the input says.
    let rings = u32::from(how >> 6) << 28;
    let own = match how & 3 {
        0 => 0,
        1 => 2,
        _ => 0x36 & if how & 4 != 0 { !0 } else { !2 } & if how & 8 != 0 { !0 } else { !0x30 },
    };
    put(8, &0u32.to_le_bytes());
    put(12, &(own | rings).to_le_bytes());
    put(8, &1u32.to_le_bytes());
    put(12, &1u32.to_le_bytes());
    put(20, &[0xb]);
    for queue in 0..4u16 {
        let base = RAM_START + u64::from(queue) * 0x2000;
        put(22, &queue.to_le_bytes());
        put(24, &16u16.to_le_bytes());
        put(32, &base.to_le_bytes());
        put(40, &(base + 0x800).to_le_bytes());
        put(48, &(base + 0x1000).to_le_bytes());
        put(28, &1u16.to_le_bytes());
    }
    put(20, &[0xf]);
}

fuzz_target!(|data: &[u8]| {
    let [how, steps, rest @ ..] = data else {
        return;
    };
    let (steps, rest) = rest.split_at((usize::from(*steps) * STEP).min(rest.len()));
    let ram = RamView::from_ranges(&[(GuestAddress(RAM_START), RAM)]).expect("64 KiB of memory");
    let contents = &rest[..rest.len().min(RAM)];
    ram.write_slice(contents, GuestAddress(RAM_START))
        .expect("it fits");
    let io = IoThread::spawn("io", || Ok(())).expect("a thread");
    let (model, link) = model(*how, &io.handle());
    let wiring = Wiring {
        ram: RamHandle::new(ram),
        msi: &Host,
        doorbells: Arc::new(Host),
        windows: Arc::new(Host),
    };
    let mut function = VirtioPci::new(model, wiring).expect("a device");
    function.config_write(4, &[6, 0]);
    set_up(&mut function, *how);
    for queue in 0..4_u64 {
        let at = Access {
            offset: 0x3000 + queue * 4,
        };
        function.bar_write(VirtioPci::BAR, at, &[0, 0]);
    }
    for step in steps.as_chunks::<STEP>().0 {
        let [kind, width, low, high, value @ ..] = *step;
        let at = Access {
            offset: u64::from(u16::from_le_bytes([low, high])) & (VirtioPci::BAR_SIZE - 1),
        };
        let width = 1usize << (width & 3);
        if at.offset + width as u64 > VirtioPci::BAR_SIZE {
            continue;
        }
        let mut data = value;
        match kind & 7 {
            0..4 => function.bar_write(VirtioPci::BAR, at, &data[..width]),
            4 => function.bar_read(VirtioPci::BAR, at, &mut data[..width]),
            5 => function.pause(),
            6 => function.resume(),
            _ => link.iter().for_each(attend),
        }
    }
    link.iter().for_each(attend);
    // Back with its queues, whatever they hold.
    function.pause();
    function.resume();
    link.iter().for_each(attend);
    function.bar_write(VirtioPci::BAR, Access { offset: 20 }, &[0]);
});
