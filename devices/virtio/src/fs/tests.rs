//! A client for tests: requests written into memory by hand, served without a queue.

mod dax;
mod escapes;
mod hostile;
mod operations;

use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::io::Errno;
use tempfile::TempDir;
use testudo_memory::{HostWindow, RamView};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::host::{self, Identity};
use super::server::{Desk, Server};
use super::wire::{self, EntryOut, InHeader, OpenOut, OutHeader, init, opcode};
use super::*;
use crate::conformance::{Subject, conformance};
use crate::queue::{Buffer, Chain};

const RAM: usize = 4 << 20;
const REQUEST: u64 = 0x1000;
const ANSWER: u64 = 0x20_0000;
const ANSWER_LEN: u32 = 0x10_0000;

pub(crate) fn options() -> FsOptions {
    FsOptions {
        tag: "share".into(),
        readonly: false,
        caching: Caching::Auto,
        writeback: false,
        xattr: true,
        acl: false,
        descriptors: 4096,
    }
}

pub(crate) fn open_dir(path: &std::path::Path) -> OwnedFd {
    fs::File::open(path).unwrap().into()
}

/// A guest's kernel with the export `outside/share`.
pub(crate) struct Client {
    outside: TempDir,
    pub(crate) server: Server,
    desk: Desk,
    identity: Identity,
    ram: RamView,
    uid: u32,
    gid: u32,
}

impl Client {
    pub(crate) fn new(options: FsOptions) -> Self {
        Self::with_window(options, None)
    }

    pub(crate) fn with_window(options: FsOptions, window: Option<Arc<HostWindow>>) -> Self {
        let outside = tempfile::tempdir().unwrap();
        let share = outside.path().join("share");
        fs::create_dir(&share).unwrap();
        let export = Arc::new(Export::new(&open_dir(&share)).unwrap());
        let (uid, gid) = (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        );
        let mut client = Self {
            outside,
            server: Server::new(export, options, window).unwrap(),
            desk: Desk::new(),
            identity: host::prepare_thread().unwrap(),
            ram: RamView::from_ranges(&[(GuestAddress(0), RAM)]).unwrap(),
            uid,
            gid,
        };
        client.init(!0).unwrap();
        client
    }

    pub(crate) fn share(&self) -> PathBuf {
        self.outside.path().join("share")
    }

    pub(crate) fn outside(&self) -> PathBuf {
        self.outside.path().to_path_buf()
    }

    pub(crate) fn init(&mut self, features: u64) -> Result<wire::InitOut, Errno> {
        let flags = u32::try_from(features & 0xffff_ffff).unwrap();
        let more = u32::try_from(features >> 32).unwrap() & 0xff;
        let mut args = [0_u32; 16];
        args[..5].copy_from_slice(&[7, 38, 0x2_0000, flags, more]);
        let answer = self.ask(opcode::INIT, 0, &[args.as_bytes()])?;
        Ok(wire::InitOut::read_from_bytes(&answer).unwrap())
    }

    /// Sends a request; its answer without the header.
    pub(crate) fn ask(&mut self, op: u32, nodeid: u64, args: &[&[u8]]) -> Result<Vec<u8>, Errno> {
        let args = args.concat();
        let header = InHeader {
            len: u32::try_from(40 + args.len()).unwrap(),
            opcode: op,
            unique: 0x1234_5678_9abc,
            nodeid,
            uid: self.uid,
            gid: self.gid,
            ..InHeader::default()
        };
        let request = [header.as_bytes(), &args].concat();
        let answer = self.raw(&request, ANSWER_LEN);
        let Some((header, rest)) = OutHeader::read_from_prefix(&answer).ok() else {
            return Ok(Vec::new());
        };
        assert_eq!(header.len as usize, answer.len());
        assert_eq!(header.unique, 0x1234_5678_9abc);
        match header.error {
            0 => Ok(rest.to_vec()),
            error => {
                assert!(rest.is_empty() && error < 0);
                Err(Errno::from_raw_os_error(-error))
            }
        }
    }

    /// Sends bytes, in buffers that end at odd places; returns the bytes that came back.
    pub(crate) fn raw(&mut self, request: &[u8], room: u32) -> Vec<u8> {
        self.ram
            .write_slice(request, GuestAddress(REQUEST))
            .unwrap();
        let buffers = |at: u64, len: usize, cuts: &[usize]| {
            let mut all = Vec::new();
            let mut from = 0;
            for to in cuts.iter().copied().filter(|c| *c < len).chain([len]) {
                if to > from {
                    all.push(Buffer {
                        address: GuestAddress(at + from as u64),
                        len: u32::try_from(to - from).unwrap(),
                    });
                }
                from = to;
            }
            all
        };
        let chain = Chain::of_buffers(
            &buffers(REQUEST, request.len(), &[40, 41, 77, 80, 5000]),
            &buffers(ANSWER, room as usize, &[16, 17, 144, 4112]),
        );
        let Self {
            server,
            desk,
            identity,
            ram,
            ..
        } = self;
        let served = server.serve(desk, identity, ram, &chain);
        assert!(served.written <= room);
        let mut answer = vec![0; served.written as usize];
        self.ram
            .read_slice(&mut answer, GuestAddress(ANSWER))
            .unwrap();
        answer
    }

    pub(crate) fn get<T: FromBytes>(
        &mut self,
        op: u32,
        nodeid: u64,
        args: &[&[u8]],
    ) -> Result<T, Errno> {
        let answer = self.ask(op, nodeid, args)?;
        Ok(T::read_from_bytes(&answer[..size_of::<T>()]).unwrap())
    }

    pub(crate) fn lookup(&mut self, parent: u64, name: &str) -> Result<EntryOut, Errno> {
        let found: EntryOut = self.get(opcode::LOOKUP, parent, &[&c_str(name)])?;
        if found.nodeid == 0 {
            return Err(Errno::NOENT);
        }
        Ok(found)
    }

    pub(crate) fn node(&mut self, name: &str) -> u64 {
        self.lookup(wire::ROOT, name).unwrap().nodeid
    }

    pub(crate) fn open(&mut self, nodeid: u64, flags: i32) -> Result<u64, Errno> {
        let args = [flags.cast_unsigned(), 0];
        let open: OpenOut = self.get(opcode::OPEN, nodeid, &[args.as_bytes()])?;
        Ok(open.fh)
    }

    pub(crate) fn create(&mut self, name: &str, flags: i32) -> Result<(u64, u64), Errno> {
        let args = [flags.cast_unsigned(), 0o100_644, 0, 0];
        let answer = self.ask(opcode::CREATE, 1, &[args.as_bytes(), &c_str(name)])?;
        let entry = EntryOut::read_from_bytes(&answer[..128]).unwrap();
        let open = OpenOut::read_from_bytes(&answer[128..]).unwrap();
        Ok((entry.nodeid, open.fh))
    }

    pub(crate) fn write(&mut self, fh: u64, offset: u64, data: &[u8]) -> Result<u32, Errno> {
        self.write_flagged(fh, offset, data, 0)
    }

    pub(crate) fn write_flagged(
        &mut self,
        fh: u64,
        offset: u64,
        data: &[u8],
        flags: u32,
    ) -> Result<u32, Errno> {
        let args = wire::WriteIn {
            fh,
            offset,
            size: u32::try_from(data.len()).unwrap(),
            write_flags: flags,
            ..wire::WriteIn::default()
        };
        let wrote: wire::WriteOut = self.get(opcode::WRITE, 1, &[args.as_bytes(), data])?;
        Ok(wrote.size)
    }

    pub(crate) fn read(&mut self, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        self.ask(opcode::READ, 1, &[read_args(fh, offset, size).as_bytes()])
    }

    pub(crate) fn gauge(&self, of: &std::sync::atomic::AtomicU64) -> u64 {
        of.load(Ordering::Relaxed)
    }

    pub(crate) fn nodes(&self) -> u64 {
        self.gauge(&self.server.gauges.nodes)
    }

    pub(crate) fn handles(&self) -> u64 {
        self.gauge(&self.server.gauges.handles)
    }
}

pub(crate) fn read_args(fh: u64, offset: u64, size: u32) -> wire::ReadIn {
    wire::ReadIn {
        fh,
        offset,
        size,
        ..wire::ReadIn::default()
    }
}

pub(crate) fn c_str(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

pub(crate) fn bytes(value: &(impl IntoBytes + Immutable + ?Sized)) -> &[u8] {
    value.as_bytes()
}

fn make(io: &IoHandle) -> Box<dyn VirtioModel> {
    let dir = open_dir(&std::env::temp_dir());
    let export = Arc::new(Export::new(&dir).unwrap());
    let window = Arc::new(HostWindow::reserve(2 << 20).unwrap());
    let threads = vec![io.clone(), io.clone()];
    let readonly = FsOptions {
        readonly: true,
        ..options()
    };
    Box::new(Fs::new(export, readonly, Some(window), threads).unwrap())
}

fn request() -> (Vec<u8>, u32) {
    let header = InHeader {
        len: 104,
        opcode: opcode::INIT,
        ..InHeader::default()
    };
    let init = [7_u32, 38, 0, 0];
    let mut request = [header.as_bytes(), init.as_bytes()].concat();
    request.resize(104, 0);
    (request, 80)
}

const SUBJECT: Subject = Subject {
    make,
    queue: 1,
    request,
};

conformance!(shared_folder, SUBJECT);

#[test]
fn the_configuration_space_has_tag_and_queues() {
    let io = crate::IoThread::spawn("fs-test", || Ok(())).unwrap();
    let mut model = make(&io.handle());
    let mut config = [0xff; 40];
    model.read_config(0, &mut config);
    assert_eq!(config[..6], *b"share\0");
    assert_eq!(config[6..], [[0; 30].as_slice(), &[2, 0, 0, 0]].concat());
    model.write_config(0, b"x");
    let mut first = [0];
    model.read_config(0, &mut first);
    assert_eq!(first, *b"s");
    let shape = model.shape();
    assert_eq!(shape.queues.len(), 3);
    assert_eq!(shape.shared_memory.unwrap().id, 0);
}

/// A driver's reset ends what it knew; a pause does not.
#[test]
fn a_reset_forgets_and_a_pause_does_not() {
    let io = crate::IoThread::spawn("fs-test", || Ok(())).unwrap();
    let export = Arc::new(Export::new(&open_dir(&std::env::temp_dir())).unwrap());
    let mut fs = Fs::new(export, options(), None, vec![io.handle()]).unwrap();
    fs.server.begin_session(init::MAX_PAGES);
    fs.used = true;
    drop(fs.stop());
    assert!(fs.server.agreed(init::MAX_PAGES));
    fs.reset();
    assert!(!fs.server.agreed(init::MAX_PAGES));
}
