//! What the guest knows by number: an `O_PATH` descriptor for each file it has looked up.
//!
//! A node lives from the first LOOKUP to the FORGET that takes back the last one. Its descriptor
//! pins the inode, so the pair of device and inode number that finds it again cannot come to mean
//! another file meanwhile.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, Statx};

use super::hints::Hints;
use super::table::Table;
use super::wire;

/// Which file a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key {
    device: (u32, u32),
    inode: u64,
    /// A file seen through two mounts is two nodes: one mount may be read-only.
    mount: u64,
}

impl Key {
    pub(super) fn of(stat: &Statx) -> Self {
        Self {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            mount: stat.stx_mnt_id,
        }
    }

    /// The key of the entry `inode` of the directory that this is the key of.
    pub(super) fn sibling(self, inode: u64) -> Self {
        Self { inode, ..self }
    }

    pub(super) fn same_mount(self, other: Self) -> bool {
        self.mount == other.mount && self.device == other.device
    }
}

/// A file of the export. Its descriptor can name it and nothing else: to read or write it, it is
/// opened again, which only regular files and directories are.
#[derive(Debug)]
pub(super) struct Node {
    path: OwnedFd,
    pub(super) key: Key,
    pub(super) kind: FileType,
}

impl Node {
    pub(super) fn new(path: OwnedFd, stat: &Statx) -> Self {
        Self {
            path,
            key: Key::of(stat),
            kind: FileType::from_raw_mode(stat.stx_mode.into()),
        }
    }

    pub(super) fn is_dir(&self) -> bool {
        self.kind == FileType::Directory
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.path.as_fd()
    }
}

struct Known {
    node: Arc<Node>,
    lookups: u64,
}

/// All nodes of a session.
pub(super) struct Nodes {
    root: Arc<Node>,
    table: Table<Known>,
    by_key: HashMap<Key, u64>,
    /// What lookups found.
    pub(super) hints: Hints,
    limit: usize,
}

impl Nodes {
    pub(super) fn new(root: Node, limit: usize) -> Self {
        Self {
            root: Arc::new(root),
            table: Table::new(limit),
            by_key: HashMap::new(),
            hints: Hints::new(),
            limit,
        }
    }

    /// Nodes beside the root.
    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    pub(super) fn get(&self, nodeid: u64) -> Option<Arc<Node>> {
        if nodeid == wire::ROOT {
            return Some(Arc::clone(&self.root));
        }
        self.table.get(nodeid).map(|known| Arc::clone(&known.node))
    }

    /// Whether there is a node of this key.
    pub(super) fn knows(&self, key: Key) -> bool {
        self.by_key.contains_key(&key)
    }

    /// Counts a lookup of a file that is known already; its number.
    pub(super) fn look_up(&mut self, key: Key) -> Option<u64> {
        if key == self.root.key {
            return Some(wire::ROOT);
        }
        let nodeid = *self.by_key.get(&key)?;
        let known = self.table.get_mut(nodeid)?;
        known.lookups = known.lookups.saturating_add(1);
        Some(nodeid)
    }

    /// Counts a lookup of `node`, which another thread may have added meanwhile; its number, or
    /// `None` if there are too many nodes.
    pub(super) fn add(&mut self, node: Node) -> Option<u64> {
        let key = node.key;
        if let Some(nodeid) = self.look_up(key) {
            return Some(nodeid);
        }
        let nodeid = self.table.insert(Known {
            node: Arc::new(node),
            lookups: 1,
        })?;
        self.by_key.insert(key, nodeid);
        Some(nodeid)
    }

    /// Takes `count` lookups back. The node, when none is left, is for the caller to drop once
    /// the lock is released.
    #[must_use]
    pub(super) fn forget(&mut self, nodeid: u64, count: u64) -> Option<Arc<Node>> {
        let known = self.table.get_mut(nodeid)?;
        known.lookups = known.lookups.saturating_sub(count);
        if known.lookups != 0 {
            return None;
        }
        let gone = self.table.remove(nodeid)?;
        self.by_key.remove(&gone.node.key);
        if self.by_key.len() < self.by_key.capacity() / 8 {
            self.by_key.shrink_to_fit();
        }
        Some(gone.node)
    }

    /// Everything but the root, to be dropped.
    #[must_use]
    pub(super) fn clear(&mut self) -> impl Sized + use<> {
        self.hints = Hints::new();
        // With the same hasher: a new one would ask the kernel for randomness.
        self.by_key = HashMap::with_hasher(self.by_key.hasher().clone());
        std::mem::replace(&mut self.table, Table::new(self.limit))
    }
}
