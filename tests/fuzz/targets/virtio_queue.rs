//! Any rings and descriptors in guest RAM, and any register accesses around them, against a
//! virtio-pci device that takes, fills and returns every chain it is given.
//!
//! Input: a byte of choices, the number of accesses, the accesses (16 bytes each), and what is in
//! guest RAM from its beginning at 4 KiB on.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use testudo_bus::Access;
use testudo_fuzz::Host;
use testudo_memory::{RamHandle, RamView};
use testudo_pci::PciFunction;
use virtio_devices::{
    ActivateError, Activated, ActiveQueue, QueueFault, Queues, SavedState, Shape, VirtioModel,
    VirtioPci, Wiring,
};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

const RAM: usize = 64 << 10;
const RAM_START: u64 = 0x1000;
const STEP: usize = 16;
/// Chains served per queue and start.
const CHAINS: usize = 64;
const FEATURE_INDIRECT: u32 = 1 << 28;
const FEATURE_EVENT_IDX: u32 = 1 << 29;

/// Serves its queues once, when it starts.
#[derive(Default)]
struct Eager {
    queues: Queues,
}

impl VirtioModel for Eager {
    fn shape(&self) -> Shape {
        Shape {
            name: "eager",
            device_type: 1,
            features: 0,
            queues: vec![16, 256],
            config_len: 8,
            ..Shape::default()
        }
    }
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0x5a);
    }
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    fn start(&mut self, on: Activated) -> Result<(), ActivateError> {
        let ram = on.ram.memory();
        self.queues = on.queues;
        for queue in &mut self.queues {
            // A queue that is beyond repair stops being served, as in any model.
            let _ = serve(queue, &ram);
            assert_eq!(queue.queue.in_flight(), 0);
        }
        Ok(())
    }
    fn stop(&mut self) -> Queues {
        std::mem::take(&mut self.queues)
    }
    fn saved_state(&self) -> SavedState {
        SavedState::QueuesOnly
    }
}

fn serve(queue: &mut ActiveQueue, ram: &RamView) -> Result<(), QueueFault> {
    let rings = &mut queue.queue;
    rings.pause_kicks(ram)?;
    for turn in 0..CHAINS {
        let Some(chain) = rings.pop(ram)? else {
            break;
        };
        let mut data = [0; 300];
        let got = chain.read(ram, 0, &mut data).unwrap_or(0);
        assert!(got <= data.len() && got as u64 <= u64::from(chain.readable_len()));
        let put = chain.write(ram, 0, &data).unwrap_or(0);
        assert!(put as u64 <= u64::from(chain.writable_len()));
        if turn % 5 == 4 {
            rings.undo_pop(chain);
            break;
        }
        rings.push(ram, chain, put as u32)?;
    }
    rings.notify(ram)?;
    rings.resume_kicks(ram)?;
    Ok(())
}

fn access(function: &mut VirtioPci, step: &[u8; STEP]) {
    let [kind, width, low, high, value @ ..] = *step;
    let at = Access {
        offset: u64::from(u16::from_le_bytes([low, high])) & (VirtioPci::BAR_SIZE - 1),
    };
    let width = 1usize << (width & 3);
    let mut data: [u8; 8] = value[..8].try_into().expect("eight bytes");
    if at.offset + width as u64 > VirtioPci::BAR_SIZE {
        return;
    }
    match kind & 7 {
        0..4 => function.bar_write(VirtioPci::BAR, at, &data[..width]),
        4 | 5 => function.bar_read(VirtioPci::BAR, at, &mut data[..width]),
        6 => function.config_write(at.offset as u16 & 0xff8, &data[..width]),
        _ => function.config_read(at.offset as u16 & 0xff8, &mut data[..width]),
    }
}

/// What a driver does, with the rings of each queue at a place of its own.
fn set_up(function: &mut VirtioPci, how: u8) {
    let mut put =
        |offset: u64, data: &[u8]| function.bar_write(VirtioPci::BAR, Access { offset }, data);
    put(20, &[0]);
    put(20, &[1]);
    put(20, &[3]);
    let mut features = 0;
    features |= if how & 1 != 0 { FEATURE_INDIRECT } else { 0 };
    features |= if how & 2 != 0 { FEATURE_EVENT_IDX } else { 0 };
    put(8, &0u32.to_le_bytes());
    put(12, &features.to_le_bytes());
    put(8, &1u32.to_le_bytes());
    put(12, &1u32.to_le_bytes());
    put(20, &[0xb]);
    for queue in 0..2u16 {
        let base = RAM_START + u64::from(queue) * 0x4000;
        put(22, &queue.to_le_bytes());
        put(24, &(1u16 << (how >> 2 & 7)).to_le_bytes());
        put(32, &base.to_le_bytes());
        put(40, &(base + 0x1000).to_le_bytes());
        put(48, &(base + 0x2000).to_le_bytes());
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
    let model = Box::<Eager>::default();
    let wiring = Wiring {
        ram: RamHandle::new(ram),
        msi: &Host,
        doorbells: Arc::new(Host),
        windows: Arc::new(Host),
    };
    let mut function = VirtioPci::new(model, wiring).expect("a device");
    function.config_write(4, &[6, 0]);
    let steps = steps.as_chunks::<STEP>().0;
    let (before, after) = steps.split_at(steps.len() / 2);
    before.iter().for_each(|step| access(&mut function, step));
    set_up(&mut function, *how);
    after.iter().for_each(|step| access(&mut function, step));
});
