//! Open directories.

use std::ffi::CStr;

use rustix::fs::{OFlags, SeekFrom};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::Caching;
use super::handle::Handle;
use super::host;
use super::node::Node;
use super::request::Name;
use super::server::{ANSWER_MAX, Answer, Answered, Call, Server, lock};
use super::wire::{self, Attr, Dirent, EntryOut, OpenIn, OpenOut, ReadIn, fopen};

/// Entries are had from the host in pieces of this many bytes.
const PIECE: usize = 8 << 10;

/// Where a directory is being read: what the host has told and the guest has not been told yet.
#[derive(Debug, Default)]
pub(super) struct Listing {
    entries: Vec<u8>,
    /// Where in `entries` the next one begins.
    next: usize,
    /// The offset that leads to the next one; 0 is the directory's beginning.
    offset: u64,
}

/// An entry as the host tells it.
struct Entry<'a> {
    inode: u64,
    /// Leads to the one behind it.
    offset: u64,
    kind: u8,
    name: &'a CStr,
    /// Bytes it takes in the listing.
    len: usize,
}

/// The entry that `bytes` begin with (`struct linux_dirent64`, getdents64(2)).
fn entry(bytes: &[u8]) -> Option<Entry<'_>> {
    let (inode, rest) = bytes.split_first_chunk()?;
    let (offset, rest) = rest.split_first_chunk()?;
    let (len, rest) = rest.split_first_chunk()?;
    let (kind, _) = rest.split_first()?;
    let len = usize::from(u16::from_ne_bytes(*len));
    let name = bytes.get(19..len)?;
    Some(Entry {
        inode: u64::from_ne_bytes(*inode),
        offset: u64::from_ne_bytes(*offset),
        kind: *kind,
        name: CStr::from_bytes_until_nul(name).ok()?,
        len,
    })
}

impl Listing {
    /// Goes to where the guest wants to read on.
    fn seek(&mut self, dir: &Handle, offset: u64) -> Result<(), Errno> {
        if offset == self.offset && offset != 0 {
            return Ok(());
        }
        self.entries.clear();
        self.next = 0;
        rustix::fs::seek(dir, SeekFrom::Start(offset))?;
        self.offset = offset;
        Ok(())
    }

    /// The next entry, had from the host if need be.
    fn peek(&mut self, dir: &Handle) -> Result<Option<Entry<'_>>, Errno> {
        if self.next >= self.entries.len() {
            self.next = 0;
            self.entries.resize(PIECE, 0);
            let filled = host::read_entries(dir, &mut self.entries);
            self.entries.truncate(*filled.as_ref().unwrap_or(&0));
            if filled? == 0 {
                // Read to its end, mostly not to be read again.
                self.entries = Vec::new();
                return Ok(None);
            }
        }
        Ok(self.entries.get(self.next..).and_then(entry))
    }

    fn advance(&mut self, offset: u64, len: usize) {
        self.next = self.next.saturating_add(len);
        self.offset = offset;
    }
}

impl Server {
    pub(super) fn opendir(&self, call: &mut Call<'_>) -> Answered {
        let OpenIn { .. } = call.args.take()?;
        let node = self.node(call.header.nodeid)?;
        if !node.is_dir() {
            return Err(Errno::NOTDIR);
        }
        let dir = self.export.open(&node, OFlags::RDONLY)?;
        let fh = self.add_handle(Handle::directory(dir))?;
        Ok(call.put(&OpenOut {
            fh,
            open_flags: match self.options.caching {
                Caching::None | Caching::Auto => 0,
                Caching::Always => fopen::KEEP_CACHE | fopen::CACHE_DIR,
            },
            padding: 0,
        }))
    }

    /// Tells entries of a directory; with `plus`, together with a lookup of each.
    pub(super) fn readdir(&self, call: &mut Call<'_>, plus: bool) -> Answered {
        let asked: ReadIn = call.args.take()?;
        let dir = self.handle(asked.fh)?;
        let listing = dir.listing.as_ref().ok_or(Errno::NOTDIR)?;
        let parent = self.node(call.header.nodeid)?;
        let size = asked.size.min(call.room()).min(ANSWER_MAX);
        let end = usize::try_from(size.saturating_add(wire::OUT_HEADER)).unwrap_or(0);
        let mut listing = lock(listing);
        listing.seek(&dir, asked.offset)?;
        let before = call.answer.len();
        loop {
            let told = call.answer.len();
            let entry = match listing.peek(&dir) {
                Ok(Some(entry)) => entry,
                Ok(None) => break,
                Err(e) if told == before => return Err(e),
                Err(_) => break,
            };
            let name = entry.name.to_bytes();
            let plain = size_of::<Dirent>().saturating_add(name.len().next_multiple_of(8));
            let more = if plus { size_of::<EntryOut>() } else { 0 };
            if told.saturating_add(plain).saturating_add(more) > end {
                if told == before {
                    return Err(Errno::INVAL);
                }
                break;
            }
            if plus {
                let found = self.found(&parent, &entry);
                call.answer.extend_from_slice(found.as_bytes());
            }
            call.put(&Dirent {
                ino: entry.inode,
                off: entry.offset,
                namelen: u32::try_from(name.len()).unwrap_or(0),
                kind: entry.kind.into(),
            });
            call.answer.extend_from_slice(name);
            let padded = call.answer.len().next_multiple_of(8);
            call.answer.resize(padded, 0);
            let (offset, len) = (entry.offset, entry.len);
            listing.advance(offset, len);
        }
        Ok(Answer::Built)
    }

    /// What a lookup of an entry finds. The directory itself and its parent are not looked up; nor
    /// is what cannot be: number 0 tells the guest to look again when it needs to.
    fn found(&self, parent: &Node, entry: &Entry<'_>) -> EntryOut {
        let unknown = EntryOut {
            attr: Attr {
                ino: entry.inode,
                mode: u32::from(entry.kind) << 12,
                ..Attr::default()
            },
            ..EntryOut::default()
        };
        let Ok(name) = Name::new(entry.name) else {
            return unknown;
        };
        let key = parent.key.sibling(entry.inode);
        let expected = self.with_nodes(|nodes| nodes.knows(key));
        match self.enter(parent, name, expected) {
            Ok((nodeid, stat)) => self.entry(parent, nodeid, &stat),
            Err(_) => unknown,
        }
    }
}
