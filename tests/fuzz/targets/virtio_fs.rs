//! Any FUSE messages through a queue of a virtio-fs device, with whatever room for answers.
//!
//! Input: messages, each of them opcode, node (a number the guest has been given, by place), room
//! for the answer in steps of 64 bytes, length of what follows the header, and that. The export is
//! a folder beside a file that nobody may touch; it is looked at now and then.
#![no_main]

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

use libfuzzer_sys::fuzz_target;
use testudo_bus::Access;
use testudo_fuzz::Host;
use testudo_memory::{HostWindow, RamHandle, RamView};
use testudo_pci::PciFunction;
use virtio_devices::{Caching, Export, Fs, FsOptions, IoThread, VirtioPci, Wiring};
use vm_memory::{Bytes, GuestAddress};

const RAM: usize = 256 << 10;
const QUEUE: u16 = 1;
/// Areas of the queues, 16 KiB each; then a request and its answer.
const AREAS: u64 = 0x1_0000;
const REQUEST: u64 = 0x2_0000;
const ANSWER: u64 = 0x3_0000;
const SIZE: u16 = 16;
const MESSAGES: usize = 40;
const INIT: u32 = 26;
const DESTROY: u32 = 38;

/// A device with its driver's half.
struct Machine {
    function: VirtioPci,
    ram: RamView,
    root: PathBuf,
    canary: (u64, i64, i64, u32),
    turns: u32,
    sent: u16,
    _io: IoThread,
}

fn about(path: &PathBuf) -> (u64, i64, i64, u32) {
    let about = fs::symlink_metadata(path).expect("the canary lives");
    (
        about.size(),
        about.mtime_nsec(),
        about.ctime_nsec(),
        about.mode(),
    )
}

impl Machine {
    fn new() -> Self {
        let base = std::env::temp_dir();
        let root = base.join(format!("testudo-fuzz-fs-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        fs::create_dir_all(root.join("share/dir")).expect("a folder");
        let canary = root.join("canary");
        fs::write(&canary, "canary").expect("a file");
        fs::write(root.join("share/a"), "inside").expect("a file");
        symlink(&canary, root.join("share/out")).expect("a link");
        symlink("..", root.join("share/up")).expect("a link");
        let dir = fs::File::open(root.join("share")).expect("a folder").into();
        let options = FsOptions {
            tag: "fuzz".into(),
            readonly: false,
            caching: Caching::Auto,
            writeback: false,
            xattr: true,
            acl: false,
            descriptors: 100,
        };
        let io = IoThread::spawn("fs-fuzz", || Ok(())).expect("a thread");
        let window = Arc::new(HostWindow::reserve(4 << 20).expect("a window"));
        let export = Arc::new(Export::new(&dir).expect("an export"));
        let fs = Fs::new(export, options, Some(window), vec![io.handle()]).expect("a model");
        let ram = RamView::from_ranges(&[(GuestAddress(0), RAM)]).expect("memory");
        let wiring = Wiring {
            ram: RamHandle::new(ram.clone()),
            msi: &Host,
            doorbells: Arc::new(Host),
            windows: Arc::new(Host),
        };
        let mut function = VirtioPci::new(Box::new(fs), wiring).expect("a device");
        function.config_write(4, &[6, 0]);
        Self {
            function,
            ram,
            canary: about(&canary),
            root,
            turns: 0,
            sent: 0,
            _io: io,
        }
    }

    fn put(&mut self, offset: u64, data: &[u8]) {
        self.function
            .bar_write(VirtioPci::BAR, Access { offset }, data);
    }

    fn start(&mut self) {
        self.put(20, &[0]);
        self.put(20, &[1]);
        self.put(20, &[3]);
        self.put(8, &1u32.to_le_bytes());
        self.put(12, &1u32.to_le_bytes());
        self.put(20, &[0xb]);
        for queue in 0..=QUEUE {
            let base = AREAS + u64::from(queue) * 0x4000;
            self.ram
                .write_slice(&[0; 0x4000], GuestAddress(base))
                .expect("RAM");
            self.put(22, &queue.to_le_bytes());
            self.put(24, &SIZE.to_le_bytes());
            self.put(32, &base.to_le_bytes());
            self.put(40, &(base + 0x1000).to_le_bytes());
            self.put(48, &(base + 0x2000).to_le_bytes());
            self.put(28, &1u16.to_le_bytes());
        }
        self.put(20, &[0xf]);
        self.sent = 0;
    }

    /// Sends one message and waits for its answer.
    fn ask(&mut self, message: &[u8], room: u32) -> Vec<u8> {
        let base = AREAS + u64::from(QUEUE) * 0x4000;
        let write = |at: u64, data: &[u8]| {
            self.ram.write_slice(data, GuestAddress(at)).expect("RAM");
        };
        write(REQUEST, message);
        let describe = |at: u64, len: u32, flags: u16| {
            let mut bytes = at.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(1u16.to_le_bytes());
            bytes
        };
        write(base, &describe(REQUEST, message.len() as u32, 1));
        write(base + 16, &describe(ANSWER, room, 2));
        write(base + 0x1004 + u64::from(self.sent % SIZE) * 2, &[0, 0]);
        self.sent = self.sent.wrapping_add(1);
        write(base + 0x1002, &self.sent.to_le_bytes());
        self.put(0x3000 + u64::from(QUEUE) * 4, &QUEUE.to_le_bytes());
        let used = || {
            let at = GuestAddress(base + 0x2002);
            self.ram.read_obj::<u16>(at).expect("RAM")
        };
        while used() != self.sent {
            std::thread::yield_now();
        }
        let slot = base + 0x2004 + u64::from(self.sent.wrapping_sub(1) % SIZE) * 8;
        let len = self
            .ram
            .read_obj::<u32>(GuestAddress(slot + 4))
            .expect("RAM");
        assert!(len <= room);
        let mut answer = vec![0; len as usize];
        self.ram
            .read_slice(&mut answer, GuestAddress(ANSWER))
            .expect("RAM");
        answer
    }

    fn run(&mut self, data: &[u8]) {
        self.start();
        self.ask(
            &message(
                INIT,
                0,
                &[7, 0, 0, 0, 38, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff],
            ),
            512,
        );
        let mut given = vec![1u64];
        let mut rest = data;
        for _ in 0..MESSAGES {
            let [op, node, room, len, after @ ..] = rest else {
                break;
            };
            let (body, after) = after.split_at(usize::from(*len).min(after.len()));
            rest = after;
            if u32::from(*op) == DESTROY {
                continue;
            }
            let node = given[usize::from(*node) % given.len()];
            let mut body = body.to_vec();
            // A structure that begins with 0xff is about the last thing given.
            if body.len() >= 8 && body[0] == 0xff {
                body[..8].copy_from_slice(&given[given.len() - 1].to_le_bytes());
            }
            let answer = self.ask(
                &message((*op).into(), node, &body),
                1 + u32::from(*room) * 64,
            );
            for at in [16, 144] {
                if let Some(number) = answer.get(at..at + 8) {
                    given.push(u64::from_le_bytes(number.try_into().expect("eight bytes")));
                }
            }
        }
        self.turns += 1;
        if self.turns % 64 == 0 {
            assert_eq!(
                about(&self.root.join("canary")),
                self.canary,
                "outside was touched"
            );
            assert_eq!(
                fs::read_dir(&self.root).expect("a folder").count(),
                2,
                "outside has grown"
            );
            for entry in fs::read_dir(self.root.join("share"))
                .expect("a folder")
                .flatten()
            {
                let path = entry.path();
                let _ = fs::remove_file(&path);
                let _ = fs::remove_dir_all(&path);
            }
            let _ = fs::create_dir(self.root.join("share/dir"));
            let _ = fs::write(self.root.join("share/a"), "inside");
            let _ = symlink("..", self.root.join("share/up"));
        }
    }
}

fn message(op: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = (40 + body.len() as u32).to_ne_bytes().to_vec();
    bytes.extend(op.to_ne_bytes());
    bytes.extend(7u64.to_ne_bytes());
    bytes.extend(node.to_ne_bytes());
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes
}

fuzz_target!(|data: &[u8]| {
    static MACHINE: OnceLock<Mutex<Machine>> = OnceLock::new();
    let machine = MACHINE.get_or_init(|| Mutex::new(Machine::new()));
    machine.lock().expect("one thread").run(data);
});
