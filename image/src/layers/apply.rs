//! One layer's entries, applied to the tree (OCI image specification, "Image Layer Filesystem
//! Changeset").

use std::collections::BTreeMap;
use std::io::Read;

use super::tree::{Body, Meta, Tree, TreeError};
use super::{Limits, UnpackError};
use crate::erofs::data::DataArea;
use crate::erofs::xattr;
use crate::tar::{Entry, Kind, Reader};

const WHITEOUT: &[u8] = b".wh.";
/// What AUFS kept for itself; all of it but "opaque" means nothing here.
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What an entry costs in memory besides its names.
const ENTRY_COST: u64 = 200;

/// Until the archive ends. `left` goes down.
pub(super) fn apply<R: Read>(
    archive: &mut Reader<R>,
    layer: &str,
    tree: &mut Tree,
    data: &mut DataArea<'_>,
    left: &mut Limits,
    limits: Limits,
) -> Result<(), UnpackError> {
    let tar = |source| UnpackError::Tar {
        layer: layer.to_owned(),
        source,
    };
    while let Some(entry) = archive.next().map_err(tar)? {
        charge(&entry, layer, left, limits)?;
        let path = || {
            String::from_utf8_lossy(&entry.path)
                .chars()
                .take(300)
                .collect::<String>()
        };
        let placed = |source| UnpackError::Entry {
            layer: layer.to_owned(),
            path: path(),
            source,
        };
        let stored = |source| UnpackError::Data {
            layer: layer.to_owned(),
            path: path(),
            source,
        };

        let (parent, name) = split(&entry.path);
        if name == OPAQUE {
            tree.opaque(parent).map_err(placed)?;
        } else if name.starts_with(WHITEOUT_META) {
            continue;
        } else if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            if hidden == b"." || hidden == b".." || hidden.is_empty() {
                return Err(placed(TreeError::BadName));
            }
            tree.whiteout(&[parent, b"/", hidden].concat())
                .map_err(placed)?;
        } else if entry.kind == Kind::HardLink {
            tree.hard_link(&entry.path, &entry.link).map_err(placed)?;
        } else {
            let meta = meta(&entry).ok_or_else(|| UnpackError::Xattrs {
                layer: layer.to_owned(),
                path: path(),
            })?;
            let body = match entry.kind {
                Kind::Directory => Body::Directory(BTreeMap::new()),
                Kind::Symlink => Body::Symlink(entry.link.as_slice().into()),
                Kind::Char => Body::Char(entry.device),
                Kind::Block => Body::Block(entry.device),
                Kind::Fifo => Body::Fifo,
                Kind::File | Kind::HardLink => {
                    let content = data.add(entry.size, entry.sparse.as_deref(), archive);
                    Body::File(content.map_err(stored)?)
                }
            };
            tree.insert(&entry.path, meta, body).map_err(placed)?;
        }
        for content in tree.take_released() {
            data.release(content).map_err(stored)?;
        }
    }
    Ok(())
}

fn charge(
    entry: &Entry,
    layer: &str,
    left: &mut Limits,
    limits: Limits,
) -> Result<(), UnpackError> {
    let exceeded = |what, limit| UnpackError::Limit {
        layer: layer.to_owned(),
        what,
        limit,
    };
    left.entries = left
        .entries
        .checked_sub(1)
        .ok_or_else(|| exceeded("entries", limits.entries))?;
    let xattrs: usize = entry.xattrs.iter().map(|(n, v)| n.len() + v.len()).sum();
    let map = entry.sparse.as_ref().map_or(0, |map| map.len() * 24);
    // A file that is all hole still has an index, which is written but not kept.
    let index = entry
        .sparse
        .as_ref()
        .map_or(0, |_| (entry.size >> 20).min(1 << 16) * 8);
    let cost = ENTRY_COST + index + (entry.path.len() + entry.link.len() + xattrs + map) as u64;
    left.metadata = left
        .metadata
        .checked_sub(cost)
        .ok_or_else(|| exceeded("bytes of names and attributes", limits.metadata))?;
    Ok(())
}

/// Attributes. Those of overlay file systems are left out: they would speak to the guest's overlay; so
/// are those that no EROFS can have. `None` if what is left does not fit.
fn meta(entry: &Entry) -> Option<Meta> {
    let overlay =
        |name: &[u8]| name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.");
    let mut xattrs: Vec<(Vec<u8>, Vec<u8>)> = entry
        .xattrs
        .iter()
        .filter(|(name, _)| !overlay(name) && xattr::split(name).is_some())
        .cloned()
        .collect();
    xattrs.sort();
    xattr::fit(&xattrs).then_some(Meta {
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime,
        xattrs,
    })
}

/// Parent and last part.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    let path = path
        .iter()
        .rposition(|b| *b != b'/')
        .and_then(|end| path.get(..=end))
        .unwrap_or_default();
    match path.iter().rposition(|b| *b == b'/') {
        Some(slash) => (
            path.get(..slash).unwrap_or_default(),
            path.get(slash + 1..).unwrap_or_default(),
        ),
        None => (b"", path),
    }
}
