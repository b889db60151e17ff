//! Whatever a vhost-user back-end says, and whatever is in the rings when it goes, against a device
//! that is opened, started, written to, paused, resumed and reset.
//!
//! Input: a byte of choices, a byte for the rings, and all that the back-end ever says. It speaks
//! without listening and then hangs up, so nothing here waits for it.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use testudo_memory::{RamHandle, RamRange, RamView};
use virtio_devices::{
    Backend, Interrupts, IoThread, Status, VhostUser, VhostUserKind, VhostUserOptions, VirtioDevice,
};
use vm_memory::{Bytes, FileOffset, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const RAM: u64 = 64 << 10;
const QUEUE_SIZE: u16 = 8;

struct Silent(EventFd);

impl Interrupts for Silent {
    fn queue(&self, _index: u16) {}
    fn config(&self) {}
    fn queue_event(&self, _index: u16) -> Option<&EventFd> {
        Some(&self.0)
    }
}

fn options(choices: u8) -> VhostUserOptions {
    let kind = match choices & 3 {
        0 => VhostUserKind::Net { mac: [2; 6] },
        1 => VhostUserKind::Blk,
        _ => VhostUserKind::Fs { tag: "f".into() },
    };
    VhostUserOptions {
        kind,
        queues: 1 + u16::from(choices >> 2 & 1),
        queue_size: QUEUE_SIZE,
        reconnect: false,
    }
}

fn set_up(device: &mut VirtioDevice, choices: u8) {
    device.write_status(0, |_| unreachable!());
    for status in [Status::ACKNOWLEDGE, Status::ACKNOWLEDGE | Status::DRIVER] {
        device.write_status(status, |_| unreachable!());
    }
    for page in 0..2 {
        device.select_device_features(page);
        device.select_driver_features(page);
        device.accept_features(device.device_features());
    }
    let ready = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK;
    device.write_status(ready, |_| unreachable!());
    for index in 0..device.queue_count() {
        device.select_queue(index);
        if let Some(queue) = device.queue_mut() {
            let base = 0x1000 + u64::from(index) * 0x1000;
            queue.size = QUEUE_SIZE;
            queue.enabled = choices & 8 == 0 || index != 0;
            (queue.descriptors, queue.driver, queue.device) = (base, base + 0x400, base + 0x800);
        }
    }
    let interrupts = Arc::new(Silent(EventFd::new(EFD_NONBLOCK).expect("an eventfd")));
    device.write_status(ready | Status::DRIVER_OK, |_| interrupts);
}

fuzz_target!(|data: &[u8]| {
    let Some(([choices, rings], words)) = data.split_first_chunk::<2>() else {
        return;
    };
    let (ours, mut theirs) = UnixStream::pair().expect("a pair of sockets");
    // The buffer is larger than any input.
    theirs.write_all(words).expect("room for all words");
    theirs
        .shutdown(std::net::Shutdown::Write)
        .expect("a socket");
    let io = IoThread::spawn("fuzz", || Ok(())).expect("a thread");
    let opened = VhostUser::open(
        Backend::Socket(ours.into()),
        options(*choices),
        &io.handle(),
    );
    let Ok(opened) = opened else {
        return;
    };
    let name = c"fuzz";
    // SAFETY: the name ends with a zero, and the descriptor is new.
    let file = unsafe {
        use std::os::fd::FromRawFd;
        File::from_raw_fd(libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC))
    };
    file.set_len(RAM).expect("memory");
    let file = FileOffset::new(file, 0);
    let range = RamRange {
        gpa: 1 << 32,
        size: RAM,
        host: 0,
        file: Some(Arc::clone(file.arc())),
    };
    let len = usize::try_from(RAM).expect("a small one");
    let ram = RamView::from_ranges_with_files([(GuestAddress(0), len, Some(file))]);
    let ram = ram.expect("a mapping");
    let fill = vec![*rings; len];
    ram.write_slice(&fill, GuestAddress(0)).expect("RAM");
    let mut listener = opened.ram_listener();
    let handle = RamHandle::new(ram);
    let mut device = VirtioDevice::new(opened.model(), handle).expect("eventfds");
    set_up(&mut device, *choices);
    let _ = listener.added(&range);
    device.write_config(32, &[1]);
    device.read_config(0, &mut [0; 8]);
    device.pause();
    device.resume();
    let _ = listener.removed(&range);
    device.reset();
    assert_eq!(device.status(), 0);
    set_up(&mut device, *choices);
});
