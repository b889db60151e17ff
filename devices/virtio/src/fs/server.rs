//! The FUSE server: one request in, one answer out.
//!
//! ```text
//!   chain ─▶ header, arguments (copied) ─▶ operation ─▶ answer ─▶ chain
//!              │                              │
//!              │ INIT, DESTROY: the session   ├─ names.rs   lookups, and what adds and removes names
//!              │ begins and ends              ├─ attr.rs    attributes, statfs, extended attributes
//!              ▼                              ├─ file.rs    open files
//!     before INIT everything else is refused  ├─ dir.rs     open directories
//!                                             └─ mapping.rs the DAX window
//! ```
//! A [`Server`] is shared by the threads of all queues. Its locks are held to look something up,
//! never across a system call; what they give out are counted references, so a file that one
//! request closes stays open for another that is using it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::Statx;
use rustix::io::Errno;
use testudo_memory::{HostWindow, RamView};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::handle::Handle;
use super::host::{Export, Identity, Piece};
use super::mapping::{Mappings, Mended};
use super::node::{Node, Nodes};
use super::request::Args;
use super::table::Table;
use super::wire::{self, InHeader, OutHeader, opcode};
use super::{Caching, FsOptions};
use crate::queue::Chain;
use crate::timer::Timer;

/// Room for the arguments of a request: an extended attribute of 64 KiB, its name, and its
/// structure. WRITE's data is not copied here.
const ARGS_MAX: usize = (64 << 10) + 512;
/// What all other requests fit in: two names, or a name and the target of a link.
const ARGS_USUAL: usize = 8 << 10;
/// The structure in front of WRITE's data.
const WRITE_ARGS: usize = 40;
/// The most bytes of an answer that are built here first: directory entries.
pub(super) const ANSWER_MAX: u32 = 128 << 10;

/// What a thread works with, kept from one request to the next.
pub(super) struct Desk {
    args: Vec<u8>,
    pub(super) answer: Vec<u8>,
    pub(super) pieces: Pieces,
}

/// An I/O vector, kept so that it need not be allocated for each request.
#[derive(Default)]
pub(super) struct Pieces(pub(super) Vec<Piece>);

#[expect(unsafe_code, reason = "iovec has a pointer")]
mod send {
    // SAFETY: the pointers in it are filled in, used and forgotten within one request.
    unsafe impl Send for super::Pieces {}
}

impl Desk {
    pub(super) fn new() -> Self {
        Self {
            args: vec![0; ARGS_MAX],
            answer: Vec::new(),
            pieces: Pieces::default(),
        }
    }
}

/// A request at work.
pub(super) struct Call<'a> {
    pub(super) header: InHeader,
    pub(super) args: Args<'a>,
    /// Sixteen bytes to be the header, then the answer.
    pub(super) answer: &'a mut Vec<u8>,
    pub(super) pieces: &'a mut Pieces,
    pub(super) ram: &'a RamView,
    pub(super) chain: &'a Chain,
    pub(super) identity: &'a Identity,
}

/// How an operation was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// With what is in [`Call::answer`].
    Built,
    /// With so many bytes, which are in guest RAM behind the header already.
    InPlace(u32),
    /// Not at all.
    None,
}

pub(super) type Answered = Result<Answer, Errno>;

impl Call<'_> {
    /// Appends a structure to the answer.
    pub(super) fn put(&mut self, value: &(impl IntoBytes + Immutable)) -> Answer {
        self.answer.extend_from_slice(value.as_bytes());
        Answer::Built
    }

    /// Bytes the driver left for what follows the header.
    pub(super) fn room(&self) -> u32 {
        self.chain.writable_len().saturating_sub(wire::OUT_HEADER)
    }
}

/// A served request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Served {
    /// Bytes written to the chain.
    pub(super) written: u32,
    /// The host could not do what should have worked.
    pub(super) failed: bool,
}

/// What the server counts.
#[derive(Debug, Default)]
pub(super) struct Gauges {
    pub(super) nodes: Arc<AtomicU64>,
    pub(super) handles: Arc<AtomicU64>,
    pub(super) mapped: Arc<AtomicU64>,
    pub(super) mended: Arc<AtomicU64>,
}

/// One export and the session of its guest.
pub(super) struct Server {
    pub(super) export: Arc<Export>,
    pub(super) options: FsOptions,
    pub(super) window: Option<Arc<HostWindow>>,
    /// What was agreed in INIT, with [`READY`]; 0 before.
    session: AtomicU64,
    nodes: Mutex<Nodes>,
    handles: Mutex<Table<Arc<Handle>>>,
    pub(super) mappings: Mutex<Mappings>,
    pub(super) mended: Mended,
    /// Says when mapped files are to be looked at; there is one with a window.
    pub(super) look: Option<Timer>,
    pub(super) gauges: Gauges,
}

/// A bit that no feature of INIT has.
const READY: u64 = 1 << 63;

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn count(gauge: &AtomicU64, now: usize) {
    gauge.store(u64::try_from(now).unwrap_or(u64::MAX), Ordering::Relaxed);
}

impl Server {
    pub(super) fn new(
        export: Arc<Export>,
        options: FsOptions,
        window: Option<Arc<HostWindow>>,
    ) -> std::io::Result<Self> {
        let root = export.root()?;
        // Half of the descriptors for what the guest knows, half for what it has open.
        let limit = options.descriptors / 2;
        let look = window.as_ref().map(|_| Timer::new()).transpose()?;
        Ok(Self {
            export,
            options,
            window,
            session: AtomicU64::new(0),
            nodes: Mutex::new(Nodes::new(root, limit)),
            handles: Mutex::new(Table::new(limit)),
            mappings: Mutex::default(),
            mended: Mended::default(),
            look,
            gauges: Gauges::default(),
        })
    }

    /// Serves one request.
    pub(super) fn serve(
        &self,
        desk: &mut Desk,
        identity: &Identity,
        ram: &RamView,
        chain: &Chain,
    ) -> Served {
        let mut header = [0; wire::IN_HEADER as usize];
        let read = chain.read(ram, 0, &mut header);
        let Ok(header) = InHeader::read_from_bytes(&header) else {
            return Served::default();
        };
        if !matches!(read, Ok(n) if n == size_of::<InHeader>()) {
            return Served::default();
        }
        let silent = matches!(header.opcode, opcode::FORGET | opcode::BATCH_FORGET);
        if !silent && chain.writable_len() < wire::OUT_HEADER {
            return Served::default();
        }
        desk.answer.clear();
        desk.answer.resize(wire::OUT_HEADER as usize, 0);
        let answered = arguments(&mut desk.args, &header, ram, chain).and_then(|args| {
            let mut call = Call {
                header,
                args,
                answer: &mut desk.answer,
                pieces: &mut desk.pieces,
                ram,
                chain,
                identity,
            };
            self.dispatch(&mut call)
        });
        if silent {
            return Served::default();
        }
        finish(&mut desk.answer, answered, header.unique, ram, chain)
    }

    fn dispatch(&self, call: &mut Call<'_>) -> Answered {
        let op = call.header.opcode;
        if self.session() == 0 && op != opcode::INIT {
            return Err(Errno::IO);
        }
        match op {
            opcode::INIT => self.init(call),
            opcode::DESTROY => {
                self.forget_session();
                Ok(Answer::Built)
            }
            opcode::LOOKUP => self.lookup(call),
            opcode::FORGET => self.forget(call),
            opcode::BATCH_FORGET => self.batch_forget(call),
            opcode::GETATTR => self.getattr(call),
            opcode::READ => self.read(call),
            opcode::READDIR => self.readdir(call, false),
            opcode::READDIRPLUS => self.readdir(call, true),
            opcode::OPEN => self.open(call),
            opcode::OPENDIR => self.opendir(call),
            opcode::RELEASE | opcode::RELEASEDIR => self.release(call),
            opcode::READLINK => self.readlink(call),
            opcode::STATFS => self.statfs(call),
            opcode::FSYNC | opcode::FSYNCDIR => self.fsync(call),
            opcode::GETXATTR => self.getxattr(call),
            opcode::LISTXATTR => self.listxattr(call),
            opcode::LSEEK => self.lseek(call),
            opcode::SETUPMAPPING => self.setup_mapping(call),
            opcode::REMOVEMAPPING => self.remove_mapping(call),
            opcode::SYNCFS => self.syncfs(call),
            _ => self.change(call),
        }
    }

    /// What a read-only export refuses.
    fn change(&self, call: &mut Call<'_>) -> Answered {
        type Operation = fn(&Server, &mut Call<'_>) -> Answered;
        let operation: Operation = match call.header.opcode {
            opcode::WRITE => Self::write,
            opcode::CREATE => Self::create,
            opcode::SETATTR => Self::setattr,
            opcode::MKNOD => Self::mknod,
            opcode::MKDIR => Self::mkdir,
            opcode::SYMLINK => Self::symlink,
            opcode::LINK => Self::link,
            opcode::UNLINK => Self::unlink,
            opcode::RMDIR => Self::rmdir,
            opcode::RENAME => Self::rename,
            opcode::RENAME2 => Self::rename2,
            opcode::SETXATTR => Self::setxattr,
            opcode::REMOVEXATTR => Self::removexattr,
            opcode::FALLOCATE => Self::fallocate,
            opcode::COPY_FILE_RANGE => Self::copy_file_range,
            opcode::TMPFILE => Self::tmpfile,
            // FLUSH: closing writes nothing here, so that a client need not ask. Locks: the
            // client's kernel keeps them. ACCESS: the client checks permissions itself.
            opcode::INTERRUPT => return Ok(Answer::Built),
            _ => return Err(Errno::NOSYS),
        };
        if self.options.readonly {
            return Err(Errno::ROFS);
        }
        let answered = operation(self, call);
        // Before the guest hears that a file is longer, it can see all of it.
        self.show_grown();
        answered
    }

    /// Whether this was agreed in INIT.
    pub(super) fn agreed(&self, feature: u64) -> bool {
        self.session() & feature != 0
    }

    fn session(&self) -> u64 {
        self.session.load(Ordering::Acquire)
    }

    pub(super) fn begin_session(&self, agreed: u64) {
        self.session.store(agreed | READY, Ordering::Release);
    }

    /// Forgets all the guest had: what it knows, has open and has mapped.
    pub(super) fn forget_session(&self) {
        self.session.store(0, Ordering::Release);
        let handles = std::mem::replace(
            &mut *lock(&self.handles),
            Table::new(self.options.descriptors / 2),
        );
        count(&self.gauges.handles, 0);
        let nodes = lock(&self.nodes).clear();
        count(&self.gauges.nodes, 0);
        self.remove_all_mappings();
        drop((handles, nodes));
    }

    /// The node a request is about.
    pub(super) fn node(&self, nodeid: u64) -> Result<Arc<Node>, Errno> {
        lock(&self.nodes).get(nodeid).ok_or(Errno::STALE)
    }

    pub(super) fn with_nodes<R>(&self, f: impl FnOnce(&mut Nodes) -> R) -> R {
        let mut nodes = lock(&self.nodes);
        let result = f(&mut nodes);
        count(&self.gauges.nodes, nodes.len());
        result
    }

    pub(super) fn handle(&self, fh: u64) -> Result<Arc<Handle>, Errno> {
        let handles = lock(&self.handles);
        handles.get(fh).map(Arc::clone).ok_or(Errno::BADF)
    }

    pub(super) fn add_handle(&self, handle: Handle) -> Result<u64, Errno> {
        let mut handles = lock(&self.handles);
        let fh = handles.insert(Arc::new(handle)).ok_or(Errno::NFILE)?;
        count(&self.gauges.handles, handles.len());
        Ok(fh)
    }

    pub(super) fn remove_handle(&self, fh: u64) -> Option<Arc<Handle>> {
        let mut handles = lock(&self.handles);
        let handle = handles.remove(fh);
        count(&self.gauges.handles, handles.len());
        handle
    }

    /// For how many seconds the guest may take names and attributes for granted.
    pub(super) fn validity(&self) -> u64 {
        match self.options.caching {
            Caching::None => 0,
            Caching::Auto => 1,
            Caching::Always => 86_400,
        }
    }

    /// Attributes as the guest sees them.
    pub(super) fn attr(&self, stat: &Statx) -> wire::Attr {
        wire::Attr {
            ino: stat.stx_ino,
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            atime: stat.stx_atime.tv_sec,
            mtime: stat.stx_mtime.tv_sec,
            ctime: stat.stx_ctime.tv_sec,
            atimensec: stat.stx_atime.tv_nsec,
            mtimensec: stat.stx_mtime.tv_nsec,
            ctimensec: stat.stx_ctime.tv_nsec,
            mode: stat.stx_mode.into(),
            nlink: stat.stx_nlink,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            rdev: encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
            blksize: stat.stx_blksize,
            flags: 0,
        }
    }
}

/// A device number as FUSE has it (`new_encode_dev` of Linux).
fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xf_ff00) << 12)
}

/// Copies a request's arguments.
fn arguments<'a>(
    into: &'a mut [u8],
    header: &InHeader,
    ram: &RamView,
    chain: &Chain,
) -> Result<Args<'a>, Errno> {
    let given = chain.readable_len();
    if header.len > given {
        return Err(Errno::INVAL);
    }
    let len = header
        .len
        .checked_sub(wire::IN_HEADER)
        .ok_or(Errno::INVAL)?;
    let most = match header.opcode {
        opcode::WRITE => WRITE_ARGS,
        opcode::SETXATTR | opcode::BATCH_FORGET => ARGS_MAX,
        _ => ARGS_USUAL,
    };
    let len = usize::try_from(len).map_err(|_| Errno::INVAL)?.min(most);
    let into = into.get_mut(..len).ok_or(Errno::INVAL)?;
    match chain.read(ram, wire::IN_HEADER, into) {
        Ok(read) if read == into.len() => Ok(Args::new(into)),
        _ => Err(Errno::FAULT),
    }
}

/// Writes the header, and the answer if it is not in place yet.
fn finish(
    answer: &mut Vec<u8>,
    answered: Answered,
    unique: u64,
    ram: &RamView,
    chain: &Chain,
) -> Served {
    let room = chain.writable_len();
    let built = u32::try_from(answer.len()).unwrap_or(u32::MAX);
    let result = match answered {
        Ok(Answer::None) => return Served::default(),
        Ok(Answer::Built) if built <= room => Ok(built),
        Ok(Answer::Built) => Err(Errno::IO),
        Ok(Answer::InPlace(len)) => Ok(wire::OUT_HEADER.saturating_add(len)),
        Err(e) => Err(e),
    };
    let in_place = matches!(answered, Ok(Answer::InPlace(_)));
    if result.is_err() || in_place {
        answer.truncate(wire::OUT_HEADER as usize);
    }
    let header = OutHeader {
        len: result.unwrap_or(wire::OUT_HEADER),
        error: result
            .err()
            .map_or(0, |e| e.raw_os_error().saturating_neg()),
        unique,
    };
    if let Some(front) = answer.first_chunk_mut::<{ wire::OUT_HEADER as usize }>() {
        front.copy_from_slice(header.as_bytes());
    }
    let wrote = chain.write(ram, 0, answer).is_ok();
    let serious = [Errno::IO, Errno::NFILE, Errno::MFILE, Errno::NOMEM];
    Served {
        written: if wrote { header.len } else { 0 },
        failed: !wrote || result.is_err_and(|e| serious.contains(&e)),
    }
}
