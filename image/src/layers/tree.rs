//! The tree that layers add up to, in memory: names, attributes, and which content a file has. Nothing
//! of it is a path on this machine, so nothing in a layer can lead out of it.

use std::collections::BTreeMap;

use crate::erofs::NAME_MAX;
use crate::erofs::data::ContentId;

/// Directories in one another.
const DEPTH_MAX: usize = 2048;
/// Symlinks on the way to one entry (Linux: MAXSYMLINKS).
const HOPS_MAX: usize = 40;

/// Of a [`Tree`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(u32);

/// Attributes of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits and above them set-id and sticky bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Sorted; only such as EROFS has a place for.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What a file is.
#[derive(Debug)]
pub enum Body {
    /// Names in it.
    Directory(BTreeMap<Box<[u8]>, Name>),
    /// Its content.
    File(ContentId),
    /// Its text.
    Symlink(Box<[u8]>),
    /// Character device: major, minor.
    Char((u32, u32)),
    /// Block device.
    Block((u32, u32)),
    /// Named pipe.
    Fifo,
}

/// What a name stands for.
#[derive(Debug, Clone, Copy)]
pub struct Name {
    /// The file.
    pub node: NodeId,
    /// The layer that said so last.
    layer: u32,
}

/// A file.
#[derive(Debug)]
pub struct Node {
    /// Attributes.
    pub meta: Meta,
    /// What it is.
    pub body: Body,
    /// Names it has.
    pub links: u32,
}

/// What an entry cannot do to a tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// Leads above the root, or would.
    #[error("it has `..` in its name")]
    Escapes,
    /// No file can have it.
    #[error(
        "its name has a part that no file can have (longer than {NAME_MAX} bytes, or with a NUL)"
    )]
    BadName,
    /// Something on the way is a file.
    #[error("a part of its path is a file, not a directory")]
    NotADirectory,
    /// The root can only be a directory.
    #[error("it would replace the root directory")]
    ReplacesRoot,
    /// A hard link to nothing.
    #[error("it is a hard link to `{0}`, which is not there")]
    NoTarget(String),
    /// A hard link to a directory.
    #[error("it is a hard link to the directory `{0}`")]
    LinksDirectory(String),
    /// Symlinks in a circle.
    #[error("there are more than {HOPS_MAX} symlinks on its path")]
    Loop,
    /// Deeper than any path reaches.
    #[error("it is more than {DEPTH_MAX} directories deep")]
    TooDeep,
    /// Four billion.
    #[error("there are too many files")]
    TooMany,
}

/// Names and attributes of all layers so far.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    layer: u32,
    released: Vec<ContentId>,
}

/// The root of every tree.
pub const ROOT: NodeId = NodeId(0);

impl Tree {
    /// An empty root, 0755.
    pub fn new() -> Self {
        let root = Node {
            meta: Meta {
                mode: 0o755,
                ..Meta::default()
            },
            body: Body::Directory(BTreeMap::new()),
            links: 1,
        };
        Self {
            nodes: vec![root],
            layer: 0,
            released: Vec::new(),
        }
    }

    /// What comes now lies above all that came before.
    pub fn next_layer(&mut self) {
        self.layer += 1;
    }

    /// A file.
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(usize::try_from(id.0).ok()?)
    }

    /// Names in a directory.
    pub fn children(&self, id: NodeId) -> Option<&BTreeMap<Box<[u8]>, Name>> {
        match &self.node(id)?.body {
            Body::Directory(names) => Some(names),
            _ => None,
        }
    }

    /// Contents that no file has any more, since the last time.
    pub fn take_released(&mut self) -> Vec<ContentId> {
        std::mem::take(&mut self.released)
    }

    /// Puts a file in its place. A directory on a directory gives it attributes and keeps what is in it;
    /// everything else replaces what was there.
    pub fn insert(&mut self, path: &[u8], meta: Meta, body: Body) -> Result<(), TreeError> {
        let parts = parts(path)?;
        let Some((name, parents)) = parts.split_last() else {
            let Body::Directory(_) = body else {
                return Err(TreeError::ReplacesRoot);
            };
            self.set_meta(ROOT, meta);
            return Ok(());
        };
        let Some(dir) = self.walk(parents, Some(meta.mtime))? else {
            return Err(TreeError::NotADirectory);
        };
        let layer = self.layer;
        if let Some(old) = self.child_mut(dir, name) {
            let node = old.node;
            let both = matches!(body, Body::Directory(_));
            if both && self.children(node).is_some() {
                if let Some(old) = self.child_mut(dir, name) {
                    old.layer = layer;
                }
                self.set_meta(node, meta);
                return Ok(());
            }
            self.remove(dir, name);
        }
        let node = self.add(Node {
            meta,
            body,
            links: 1,
        })?;
        self.name(dir, name, Name { node, layer });
        Ok(())
    }

    /// Another name for a file that is there.
    pub fn hard_link(&mut self, path: &[u8], target: &[u8]) -> Result<(), TreeError> {
        let shown = || {
            String::from_utf8_lossy(target)
                .chars()
                .take(300)
                .collect::<String>()
        };
        let target_parts = parts(target)?;
        let Some((target_name, target_parents)) = target_parts.split_last() else {
            return Err(TreeError::LinksDirectory(shown()));
        };
        let found = self.walk(target_parents, None)?;
        let found = found.and_then(|dir| self.child(dir, target_name));
        let Some(node) = found.map(|name| name.node) else {
            return Err(TreeError::NoTarget(shown()));
        };
        if self.children(node).is_some() {
            return Err(TreeError::LinksDirectory(shown()));
        }
        let parts = parts(path)?;
        let Some((name, parents)) = parts.split_last() else {
            return Err(TreeError::ReplacesRoot);
        };
        let mtime = self.node(node).map(|n| n.meta.mtime);
        let Some(dir) = self.walk(parents, mtime.or(Some((0, 0))))? else {
            return Err(TreeError::NotADirectory);
        };
        let layer = self.layer;
        if let Some(old) = self.child_mut(dir, name)
            && old.node == node
        {
            old.layer = layer;
            return Ok(());
        }
        if let Some(target) = self.node_mut(node) {
            target.links = target.links.checked_add(1).ok_or(TreeError::TooMany)?;
        }
        self.remove(dir, name);
        self.name(dir, name, Name { node, layer });
        Ok(())
    }

    /// Hides what layers below have under this path.
    pub fn whiteout(&mut self, path: &[u8]) -> Result<(), TreeError> {
        let parts = parts(path)?;
        let Some((name, parents)) = parts.split_last() else {
            return Ok(());
        };
        if let Some(dir) = self.walk(parents, None)? {
            self.hide_lower(dir, name);
        }
        Ok(())
    }

    /// Hides what layers below have in this directory.
    pub fn opaque(&mut self, path: &[u8]) -> Result<(), TreeError> {
        let parts = parts(path)?;
        if let Some(dir) = self.walk(&parts, None)? {
            let names: Vec<Box<[u8]>> = self
                .children(dir)
                .map(|names| names.keys().cloned().collect())
                .unwrap_or_default();
            for name in names {
                self.hide_lower(dir, &name);
            }
        }
        Ok(())
    }

    /// The directory these parts lead to, through symlinks, which stay inside. With a time, what is
    /// missing is made.
    fn walk(
        &mut self,
        parts: &[&[u8]],
        make: Option<(i64, u32)>,
    ) -> Result<Option<NodeId>, TreeError> {
        let mut pending: Vec<Vec<u8>> = parts.iter().rev().map(|p| p.to_vec()).collect();
        let mut path = vec![ROOT];
        let mut hops = 0;
        while let Some(part) = pending.pop() {
            match part.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    if path.len() > 1 {
                        path.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let dir = path.last().copied().unwrap_or(ROOT);
            let found = self.child(dir, &part);
            let next = match (found, make) {
                (Some(name), _) => name.node,
                (None, None) => return Ok(None),
                (None, Some(mtime)) => {
                    if part.len() > NAME_MAX {
                        return Err(TreeError::BadName);
                    }
                    let meta = Meta {
                        mode: 0o755,
                        mtime,
                        ..Meta::default()
                    };
                    let body = Body::Directory(BTreeMap::new());
                    let node = self.add(Node {
                        meta,
                        body,
                        links: 1,
                    })?;
                    self.name(
                        dir,
                        &part,
                        Name {
                            node,
                            layer: self.layer,
                        },
                    );
                    node
                }
            };
            match self.node(next).map(|n| &n.body) {
                Some(Body::Directory(_)) => path.push(next),
                Some(Body::Symlink(text)) => {
                    hops += 1;
                    if hops > HOPS_MAX {
                        return Err(TreeError::Loop);
                    }
                    if text.first() == Some(&b'/') {
                        path.truncate(1);
                    }
                    pending.extend(text.split(|b| *b == b'/').rev().map(<[u8]>::to_vec));
                }
                _ if make.is_none() => return Ok(None),
                _ => return Err(TreeError::NotADirectory),
            }
            if path.len() > DEPTH_MAX {
                return Err(TreeError::TooDeep);
            }
        }
        Ok(path.last().copied())
    }

    /// Takes away what older layers have under a name, and keeps what this layer has put there.
    fn hide_lower(&mut self, dir: NodeId, name: &[u8]) {
        let Some(top) = self.child(dir, name) else {
            return;
        };
        let mut found = vec![(dir, Box::<[u8]>::from(name), top)];
        let mut next = 0;
        while let Some((_, _, at)) = found.get(next) {
            let node = at.node;
            if let Some(names) = self.children(node) {
                found.extend(names.iter().map(|(name, at)| (node, name.clone(), *at)));
            }
            next += 1;
        }
        // What is in a directory comes after it: backwards it comes before.
        for (dir, name, at) in found.into_iter().rev() {
            let empty = self.children(at.node).is_none_or(BTreeMap::is_empty);
            if at.layer < self.layer && empty {
                self.remove(dir, &name);
            }
        }
    }

    /// Takes away a name and whatever has no name then.
    fn remove(&mut self, dir: NodeId, name: &[u8]) {
        let removed = match self.node_mut(dir).map(|n| &mut n.body) {
            Some(Body::Directory(names)) => names.remove(name),
            _ => None,
        };
        let mut gone: Vec<NodeId> = removed.into_iter().map(|n| n.node).collect();
        while let Some(id) = gone.pop() {
            let Some(node) = self.node_mut(id) else {
                continue;
            };
            node.links = node.links.saturating_sub(1);
            if node.links > 0 {
                continue;
            }
            node.meta.xattrs = Vec::new();
            match std::mem::replace(&mut node.body, Body::Fifo) {
                Body::Directory(names) => gone.extend(names.values().map(|n| n.node)),
                Body::File(content) => self.released.push(content),
                _ => {}
            }
        }
    }

    fn add(&mut self, node: Node) -> Result<NodeId, TreeError> {
        let id = u32::try_from(self.nodes.len()).map_err(|_| TreeError::TooMany)?;
        self.nodes.push(node);
        Ok(NodeId(id))
    }

    fn name(&mut self, dir: NodeId, name: &[u8], at: Name) {
        if let Some(Body::Directory(names)) = self.node_mut(dir).map(|n| &mut n.body) {
            names.insert(name.into(), at);
        }
    }

    fn child(&self, dir: NodeId, name: &[u8]) -> Option<Name> {
        self.children(dir)?.get(name).copied()
    }

    fn child_mut(&mut self, dir: NodeId, name: &[u8]) -> Option<&mut Name> {
        match &mut self.node_mut(dir)?.body {
            Body::Directory(names) => names.get_mut(name),
            _ => None,
        }
    }

    fn node_mut(&mut self, id: NodeId) -> Option<&mut Node> {
        self.nodes.get_mut(usize::try_from(id.0).ok()?)
    }

    fn set_meta(&mut self, id: NodeId, meta: Meta) {
        if let Some(node) = self.node_mut(id) {
            node.meta = meta;
        }
    }
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

/// A path's parts. A leading slash means nothing: all paths begin at the root.
fn parts(path: &[u8]) -> Result<Vec<&[u8]>, TreeError> {
    let parts: Vec<&[u8]> = path
        .split(|b| *b == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .collect();
    for part in &parts {
        if *part == b".." {
            return Err(TreeError::Escapes);
        }
        if part.len() > NAME_MAX || part.contains(&0) {
            return Err(TreeError::BadName);
        }
    }
    Ok(parts)
}
