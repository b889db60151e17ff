//! What a store knows of its images: a record each, and names.

use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::StoreError;
use super::files::{Files, digests_in, remove};
use crate::digest::{Algorithm, Digest, Hasher};

/// Raised when the same layers give another EROFS file.
const FORMAT: &str = "testudo erofs 1";

/// An image that is unpacked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Of the manifest.
    pub(super) digest: Digest,
    /// Of the configuration, among the blobs.
    pub(super) config: Digest,
    /// Names the EROFS file.
    pub(super) rootfs: Digest,
    /// Of that file.
    pub(super) size: u64,
    /// Of the layers as they were downloaded.
    pub(super) layers: Vec<Digest>,
}

#[derive(Serialize, Deserialize)]
struct Named {
    name: String,
    image: Digest,
}

/// What an EROFS file is named by: its layers and the way we write it.
pub(super) fn rootfs_key(diff_ids: &[Digest]) -> Digest {
    let mut hasher = Hasher::new(Algorithm::Sha256);
    hasher.update(FORMAT.as_bytes());
    for id in diff_ids {
        hasher.update(b"\n");
        hasher.update(id.to_string().as_bytes());
    }
    hasher.finish()
}

/// The file system's UUID: the same image, the same file (RFC 9562, version 8).
pub(super) fn uuid(key: &Digest) -> [u8; 16] {
    let hash = Sha256::digest(key.hex());
    let mut uuid = [0; 16];
    for (to, from) in uuid.iter_mut().zip(hash) {
        *to = from;
    }
    if let Some(version) = uuid.get_mut(6) {
        *version = (*version & 0x0f) | 0x80;
    }
    if let Some(variant) = uuid.get_mut(8) {
        *variant = (*variant & 0x3f) | 0x80;
    }
    uuid
}

impl Files {
    pub(super) fn record(&self, digest: &Digest) -> Result<Option<Record>, StoreError> {
        read(&self.record_path(digest))
    }

    pub(super) fn put_record(&self, record: &Record) -> Result<(), StoreError> {
        self.put(&self.record_path(&record.digest), &json(record))
    }

    pub(super) fn remove_record(&self, digest: &Digest) -> Result<(), StoreError> {
        remove(&self.record_path(digest)).map(|_| ())
    }

    pub(super) fn records(&self) -> Result<Vec<Record>, StoreError> {
        let found = digests_in(&self.folder("images"), ".json")?;
        let records = found.iter().map(|(_, path)| read(path));
        records.filter_map(Result::transpose).collect()
    }

    pub(super) fn named(&self, name: &str) -> Result<Option<Digest>, StoreError> {
        let found: Option<Named> = read(&self.name_path(name))?;
        Ok(found.map(|n| n.image))
    }

    pub(super) fn put_name(&self, name: &str, image: &Digest) -> Result<(), StoreError> {
        if self.named(name)?.as_ref() == Some(image) {
            return Ok(());
        }
        let named = Named {
            name: name.to_owned(),
            image: image.clone(),
        };
        self.put(&self.name_path(name), &json(&named))
    }

    pub(super) fn remove_name(&self, name: &str) -> Result<(), StoreError> {
        remove(&self.name_path(name)).map(|_| ())
    }

    /// Names and what they name, by name.
    pub(super) fn names(&self) -> Result<Vec<(String, Digest)>, StoreError> {
        let mut names = Vec::new();
        for (_, path) in digests_in(&self.folder("names"), ".json")? {
            if let Some(named) = read::<Named>(&path)? {
                names.push((named.name, named.image));
            }
        }
        names.sort();
        Ok(names)
    }

    fn record_path(&self, digest: &Digest) -> std::path::PathBuf {
        self.folder("images").join(format!("{}.json", digest.hex()))
    }

    fn name_path(&self, name: &str) -> std::path::PathBuf {
        let hex = Digest::of(name.as_bytes());
        self.folder("names").join(format!("{}.json", hex.hex()))
    }
}

fn json<T: Serialize>(value: &T) -> Vec<u8> {
    // Neither has a map with keys that are no strings: it cannot fail.
    serde_json::to_vec(value).unwrap_or_default()
}

/// `None` if there is none.
fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>, StoreError> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(StoreError::at(path)(e)),
    };
    match serde_json::from_slice(&bytes) {
        Ok(value) => Ok(Some(value)),
        Err(source) => Err(StoreError::Damaged {
            path: path.into(),
            source,
        }),
    }
}
