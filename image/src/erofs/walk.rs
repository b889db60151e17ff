//! Paths in an image: looked up as the guest would, symlinks included, never leaving the image.

use super::inode::Inode;
use super::read::{FileType, ReadAt, ReadError, Reader};

/// Symlinks on one path (Linux: MAXSYMLINKS), and directories in one another.
const HOPS_MAX: usize = 40;
const DEPTH_MAX: usize = 4096;

/// A path and the file there.
pub type Found = (Vec<u8>, Inode);

impl<S: ReadAt> Reader<S> {
    /// The file a path leads to; `None` if there is none (or a symlink on the way leads nowhere or in
    /// circles).
    pub fn lookup(&self, path: &[u8]) -> Result<Option<Inode>, ReadError> {
        self.resolve(path, true)
    }

    /// The same, but if the last part is a symlink, the symlink.
    pub fn lookup_link(&self, path: &[u8]) -> Result<Option<Inode>, ReadError> {
        self.resolve(path, false)
    }

    fn resolve(&self, path: &[u8], follow_last: bool) -> Result<Option<Inode>, ReadError> {
        let mut pending: Vec<Vec<u8>> = split(path);
        let mut at = vec![self.root()?];
        let mut hops = 0;
        while let Some(part) = pending.pop() {
            match part.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    if at.len() > 1 {
                        at.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let Some(dir) = at.last() else {
                return Ok(None);
            };
            if dir.file_type()? != FileType::Directory {
                return Ok(None);
            }
            let Some(next) = self.child(dir, &part)? else {
                return Ok(None);
            };
            let last = pending.iter().all(Vec::is_empty);
            if next.file_type()? == FileType::Symlink && (follow_last || !last) {
                hops += 1;
                if hops > HOPS_MAX {
                    return Ok(None);
                }
                let text = self.read_link(&next)?;
                if text.first() == Some(&b'/') {
                    at.truncate(1);
                }
                pending.extend(split(&text));
            } else {
                at.push(next);
            }
            if at.len() > DEPTH_MAX {
                return Ok(None);
            }
        }
        Ok(at.pop())
    }

    /// Every file with its path (the root's is empty), directories before what is in them. Calls back
    /// until told to stop by `false`. Directories in a circle, as a damaged image may have, end with an
    /// error.
    pub fn walk(&self, each: &mut dyn FnMut(&[u8], &Inode) -> bool) -> Result<(), ReadError> {
        let mut pending: Vec<(Found, usize)> = vec![((Vec::new(), self.root()?), 0)];
        let mut seen = 0_u64;
        while let Some(((path, inode), depth)) = pending.pop() {
            // Hard links make more names than inodes, but each directory has one.
            seen += 1;
            if !each(&path, &inode) {
                return Ok(());
            }
            if inode.file_type()? != FileType::Directory {
                continue;
            }
            let damaged = ReadError::Damaged {
                what: "the depth",
                nid: inode.nid,
            };
            if depth > DEPTH_MAX || seen > 1 << 26 {
                return Err(damaged);
            }
            let mut names = Vec::new();
            self.read_dir(&inode, &mut |name, nid| {
                names.push((name.to_vec(), nid));
                true
            })?;
            for (name, nid) in names.into_iter().rev() {
                let mut below = path.clone();
                if !below.is_empty() {
                    below.push(b'/');
                }
                below.extend_from_slice(&name);
                pending.push(((below, self.inode(nid)?), depth + 1));
            }
        }
        Ok(())
    }
}

/// Parts, last first.
fn split(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|b| *b == b'/')
        .rev()
        .map(<[u8]>::to_vec)
        .collect()
}
