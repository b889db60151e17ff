//! Looking names up, adding them and taking them away.

use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, Statx};
use rustix::io::Errno;

use super::handle::Handle;
use super::hints::Tag;
use super::host::FdName;
use super::node::{Key, Node};
use super::request::Name;
use super::server::{Answer, Answered, Call, Server};
use super::wire::{
    ATTR_SUBMOUNT, BatchForgetIn, CreateIn, EntryOut, ForgetIn, ForgetOne, LinkIn, MkdirIn,
    MknodIn, OpenOut, Rename2In, RenameIn, init,
};

/// A file mode mask, put back when dropped.
struct Mask;

impl Mask {
    fn set(mask: u32) -> Self {
        rustix::process::umask(Mode::from_raw_mode(mask & 0o777));
        Self
    }
}

impl Drop for Mask {
    fn drop(&mut self) {
        rustix::process::umask(Mode::empty());
    }
}

fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}

impl Server {
    /// The node of `name` in `parent`, with one more lookup counted.
    ///
    /// With `expected`, it is taken to be known already; then its descriptor need not be had
    /// to find out which it is.
    pub(super) fn enter(
        &self,
        parent: &Node,
        name: Name<'_>,
        expected: bool,
    ) -> Result<(u64, Statx), Errno> {
        if expected {
            let stat = self.export.stat_at(parent, name)?;
            let known = self.with_nodes(|nodes| nodes.look_up(Key::of(&stat)));
            if let Some(nodeid) = known {
                return Ok((nodeid, stat));
            }
        }
        let (node, stat) = self.export.find(parent, name)?;
        Ok((self.add_node(node)?, stat))
    }

    fn add_node(&self, node: Node) -> Result<u64, Errno> {
        self.with_nodes(|nodes| nodes.add(node)).ok_or(Errno::NFILE)
    }

    /// What the guest is told of a node it has looked up.
    pub(super) fn entry(&self, parent: &Node, nodeid: u64, stat: &Statx) -> EntryOut {
        let mut attr = self.attr(stat);
        let is_dir = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Directory;
        if is_dir && self.agreed(init::SUBMOUNTS) && !parent.key.same_mount(Key::of(stat)) {
            attr.flags |= ATTR_SUBMOUNT;
        }
        EntryOut {
            nodeid,
            generation: 0,
            entry_valid: self.validity(),
            attr_valid: self.validity(),
            entry_valid_nsec: 0,
            attr_valid_nsec: 0,
            attr,
        }
    }

    pub(super) fn lookup(&self, call: &mut Call<'_>) -> Answered {
        let parent = self.node(call.header.nodeid)?;
        let name = call.args.name()?;
        let tag = Tag::of(call.header.nodeid, name.as_c_str().to_bytes());
        let expected = self.with_nodes(|nodes| nodes.hints.has(tag));
        match self.enter(&parent, name, expected) {
            Ok((nodeid, stat)) => {
                if !expected {
                    self.with_nodes(|nodes| nodes.hints.remember(tag));
                }
                Ok(call.put(&self.entry(&parent, nodeid, &stat)))
            }
            // That there is nothing is as good for as long as what there is.
            Err(Errno::NOENT) if self.validity() != 0 => Ok(call.put(&EntryOut {
                entry_valid: self.validity(),
                ..EntryOut::default()
            })),
            Err(e) => Err(e),
        }
    }

    pub(super) fn forget(&self, call: &mut Call<'_>) -> Answered {
        let ForgetIn { nlookup } = call.args.take()?;
        let gone = self.with_nodes(|nodes| nodes.forget(call.header.nodeid, nlookup));
        drop(gone);
        Ok(Answer::None)
    }

    pub(super) fn batch_forget(&self, call: &mut Call<'_>) -> Answered {
        let BatchForgetIn { count, .. } = call.args.take()?;
        for _ in 0..count {
            let one: ForgetOne = call.args.take()?;
            let gone = self.with_nodes(|nodes| nodes.forget(one.nodeid, one.nlookup));
            drop(gone);
        }
        Ok(Answer::None)
    }

    /// Runs `make` so that what it makes belongs to the caller in the guest.
    fn on_behalf<R>(
        &self,
        call: &Call<'_>,
        mask: u32,
        make: impl FnOnce() -> Result<R, Errno>,
    ) -> Result<R, Errno> {
        // Where the guest leaves masks to us, the directory's default ACL decides if there is one.
        let masked = self.agreed(init::DONT_MASK).then(|| Mask::set(mask));
        let assumed = call.identity.assume(call.header.uid, call.header.gid)?;
        let made = make();
        drop((assumed, masked));
        made
    }

    pub(super) fn create(&self, call: &mut Call<'_>) -> Answered {
        let parent = self.node(call.header.nodeid)?;
        let asked: CreateIn = call.args.take()?;
        let name = call.args.name()?;
        let flags = self.open_flags(asked.flags)?;
        let mode = permissions(asked.mode);
        let made = self.on_behalf(call, asked.umask, || {
            self.export.create(&parent, name, flags, mode)
        });
        let exclusive = asked.flags & OFlags::EXCL.bits() != 0;
        let (file, nodeid, stat) = match made {
            Ok(file) => {
                let (node, stat) = self.export.name_again(&file)?;
                (file, self.add_node(node)?, stat)
            }
            // Somebody else made it since the guest looked.
            Err(Errno::EXIST) if !exclusive => {
                let (node, stat) = self.export.find(&parent, name)?;
                if node.is_dir() {
                    return Err(Errno::ISDIR);
                }
                let file = self.export.open(&node, flags)?;
                (file, self.add_node(node)?, stat)
            }
            Err(e) => return Err(e),
        };
        self.entered_open(call, &parent, nodeid, &stat, Handle::file(file))
    }

    pub(super) fn tmpfile(&self, call: &mut Call<'_>) -> Answered {
        let parent = self.node(call.header.nodeid)?;
        let asked: CreateIn = call.args.take()?;
        let flags = self.open_flags(asked.flags)? | OFlags::TMPFILE | OFlags::CLOEXEC;
        let flags = flags | (OFlags::from_bits_retain(asked.flags) & OFlags::EXCL);
        if !parent.is_dir() {
            return Err(Errno::NOTDIR);
        }
        let file = self.on_behalf(call, asked.umask, || {
            rustix::fs::openat(&parent, c".", flags, permissions(asked.mode))
        })?;
        let (node, stat) = self.export.name_again(&file)?;
        let nodeid = self.add_node(node)?;
        self.entered_open(call, &parent, nodeid, &stat, Handle::file(file))
    }

    /// Answers with a node and a handle; without the handle, the node is not the guest's either.
    fn entered_open(
        &self,
        call: &mut Call<'_>,
        parent: &Node,
        nodeid: u64,
        stat: &Statx,
        handle: Handle,
    ) -> Answered {
        let fh = self.add_handle(handle).inspect_err(|_| {
            drop(self.with_nodes(|nodes| nodes.forget(nodeid, 1)));
        })?;
        call.put(&self.entry(parent, nodeid, stat));
        Ok(call.put(&OpenOut {
            fh,
            open_flags: self.file_flags(),
            padding: 0,
        }))
    }

    /// Answers with what is called `name` now.
    fn entered(&self, call: &mut Call<'_>, parent: &Node, name: Name<'_>, known: bool) -> Answered {
        let (nodeid, stat) = self.enter(parent, name, known)?;
        Ok(call.put(&self.entry(parent, nodeid, &stat)))
    }

    pub(super) fn mknod(&self, call: &mut Call<'_>) -> Answered {
        let parent = self.node(call.header.nodeid)?;
        let asked: MknodIn = call.args.take()?;
        let name = call.args.name()?;
        let kind = match FileType::from_raw_mode(asked.mode) {
            // The mode of a plain mknod(2).
            FileType::Unknown => FileType::RegularFile,
            kind @ (FileType::RegularFile | FileType::Fifo | FileType::Socket) => kind,
            // Device 0:0 is a whiteout of overlayfs. All others would be the host's devices to
            // whoever can reach the export there.
            FileType::CharacterDevice if asked.rdev == 0 => FileType::CharacterDevice,
            _ => return Err(Errno::PERM),
        };
        self.on_behalf(call, asked.umask, || {
            rustix::fs::mknodat(&parent, name.as_c_str(), kind, permissions(asked.mode), 0)
        })?;
        self.entered(call, &parent, name, false)
    }

    pub(super) fn mkdir(&self, call: &mut Call<'_>) -> Answered {
        let parent = self.node(call.header.nodeid)?;
        let asked: MkdirIn = call.args.take()?;
        let name = call.args.name()?;
        self.on_behalf(call, asked.umask, || {
            rustix::fs::mkdirat(&parent, name.as_c_str(), permissions(asked.mode))
        })?;
        self.entered(call, &parent, name, false)
    }

    /// The target is the guest's affair: the server never follows a link.
    pub(super) fn symlink(&self, call: &mut Call<'_>) -> Answered {
        let parent = self.node(call.header.nodeid)?;
        let name = call.args.name()?;
        let target = call.args.string()?;
        self.on_behalf(call, 0, || {
            rustix::fs::symlinkat(target, &parent, name.as_c_str())
        })?;
        self.entered(call, &parent, name, false)
    }

    pub(super) fn link(&self, call: &mut Call<'_>) -> Answered {
        let parent = self.node(call.header.nodeid)?;
        let LinkIn { oldnodeid } = call.args.take()?;
        let name = call.args.name()?;
        let old = self.node(oldnodeid)?;
        let path = FdName::of(&*old);
        // The link that is followed is the one in /proc, which leads to the node itself.
        let flags = AtFlags::SYMLINK_FOLLOW;
        let from = self.export.descriptors();
        rustix::fs::linkat(from, path.as_c_str(), &parent, name.as_c_str(), flags)?;
        self.entered(call, &parent, name, true)
    }

    pub(super) fn unlink(&self, call: &mut Call<'_>) -> Answered {
        self.remove(call, AtFlags::empty())
    }

    pub(super) fn rmdir(&self, call: &mut Call<'_>) -> Answered {
        self.remove(call, AtFlags::REMOVEDIR)
    }

    fn remove(&self, call: &mut Call<'_>, flags: AtFlags) -> Answered {
        let parent = self.node(call.header.nodeid)?;
        let name = call.args.name()?;
        rustix::fs::unlinkat(&parent, name.as_c_str(), flags)?;
        let tag = Tag::of(call.header.nodeid, name.as_c_str().to_bytes());
        self.with_nodes(|nodes| nodes.hints.forget(tag));
        Ok(Answer::Built)
    }

    pub(super) fn rename(&self, call: &mut Call<'_>) -> Answered {
        let RenameIn { newdir } = call.args.take()?;
        self.move_name(call, newdir, RenameFlags::empty())
    }

    pub(super) fn rename2(&self, call: &mut Call<'_>) -> Answered {
        let asked: Rename2In = call.args.take()?;
        let flags = RenameFlags::from_bits_retain(asked.flags);
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        if !known.contains(flags) {
            return Err(Errno::INVAL);
        }
        self.move_name(call, asked.newdir, flags)
    }

    fn move_name(&self, call: &mut Call<'_>, newdir: u64, flags: RenameFlags) -> Answered {
        let from = self.node(call.header.nodeid)?;
        let to: Arc<Node> = self.node(newdir)?;
        let (old, new) = (call.args.name()?, call.args.name()?);
        rustix::fs::renameat_with(&from, old.as_c_str(), &to, new.as_c_str(), flags)?;
        Ok(Answer::Built)
    }
}
