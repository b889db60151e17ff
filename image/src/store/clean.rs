//! Removing: names, images, and what no image needs.

use std::collections::HashSet;

use super::files::{digests_in, remove};
use super::{Store, StoreError, names_of};
use crate::digest::Digest;

/// What became free.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Freed {
    /// Names that are no more.
    pub names: Vec<String>,
    /// Images that are no more.
    pub images: Vec<Digest>,
    /// Bytes on the disk.
    pub bytes: u64,
}

/// What to remove besides what nothing refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pruning {
    /// Images with names too: all there are, but those whose digest is kept.
    pub all: bool,
    /// Downloaded layers of images that are unpacked. They save downloads when another image has the same
    /// layers; nothing else needs them.
    pub layers: bool,
}

impl Store {
    /// Removes a name, and the image when it was its last; or by digest an image with all its names. A VM
    /// that has it open keeps it until it ends.
    pub fn remove(&self, word: &str) -> Result<Freed, StoreError> {
        let _moment = self.files.lock()?;
        let record = self
            .find(word)?
            .ok_or_else(|| StoreError::NoImage(word.to_owned()))?;
        let names = self.files.names()?;
        let of_image = names.iter().filter(|(_, image)| *image == record.digest);
        let of_image: Vec<&String> = of_image.map(|(name, _)| name).collect();
        let meant = names_of(word);
        let by_name: Vec<&String> = of_image
            .iter()
            .copied()
            .filter(|n| meant.contains(n))
            .collect();
        let going = if by_name.is_empty() {
            of_image.clone()
        } else {
            by_name
        };
        let mut freed = Freed::default();
        for name in &going {
            self.files.remove_name(name)?;
            freed.names.push((*name).clone());
        }
        if going.len() == of_image.len() {
            self.files.remove_record(&record.digest)?;
            freed.images.push(record.digest);
            freed.bytes = self.sweep(false)?;
        }
        Ok(freed)
    }

    /// Removes images without a name (and more, if asked), and all that no image refers to. `keep` are
    /// digests of images in use.
    pub fn prune(&self, what: Pruning, keep: &[Digest]) -> Result<Freed, StoreError> {
        let _moment = self.files.lock()?;
        let names = self.files.names()?;
        let mut freed = Freed::default();
        for record in self.files.records()? {
            let has_name = names.iter().any(|(_, image)| *image == record.digest);
            if keep.contains(&record.digest) || (has_name && !what.all) {
                continue;
            }
            for (name, _) in names.iter().filter(|(_, image)| *image == record.digest) {
                self.files.remove_name(name)?;
                freed.names.push(name.clone());
            }
            self.files.remove_record(&record.digest)?;
            freed.images.push(record.digest);
        }
        freed.bytes = self.sweep(what.layers)?;
        Ok(freed)
    }

    /// Removes files that no record names; the store is locked. A pull in another process has what it
    /// needs open, or under a name that is not looked at here.
    fn sweep(&self, layers: bool) -> Result<u64, StoreError> {
        let records = self.files.records()?;
        let rootfs: HashSet<&Digest> = records.iter().map(|r| &r.rootfs).collect();
        let mut blobs: HashSet<&Digest> = HashSet::new();
        for record in &records {
            blobs.extend([&record.digest, &record.config]);
            if !layers {
                blobs.extend(&record.layers);
            }
        }
        let mut bytes = 0;
        for (key, path) in digests_in(&self.files.folder("rootfs"), ".erofs")? {
            if !rootfs.contains(&key) {
                bytes += remove(&path)?;
            }
        }
        for (digest, path) in digests_in(&self.files.folder("blobs/sha256"), "")? {
            if !blobs.contains(&digest) {
                bytes += remove(&path)?;
            }
        }
        Ok(bytes)
    }
}
