//! The folders of a store, and how a file comes into them: whole or not at all.
//!
//! ```text
//! <root>/lock                    held for moments: by whoever makes or removes entries
//! <root>/tmp.lock                held while a file of tmp gets its lock
//! <root>/tmp/*                   being written; locked by the writer, so what is not locked is left over
//! <root>/locks/<key>             held while an image of that key is fetched and unpacked
//! <root>/blobs/sha256/<hex>      manifests, configurations, downloaded layers
//! <root>/rootfs/<key>.erofs      unpacked images, by their layers
//! <root>/images/<hex>.json       what there is, by the manifest's digest
//! <root>/names/<hex>.json        names of images
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::StoreError;
use super::lock::{Lock, try_lock};
use crate::digest::{Algorithm, Digest};

const FOLDERS: &[&str] = &[
    "tmp",
    "locks",
    "rootfs",
    "images",
    "names",
    "blobs",
    "blobs/sha256",
    "blobs/sha512",
];

/// The folders, made.
#[derive(Debug, Clone)]
pub(super) struct Files {
    root: PathBuf,
}

impl Files {
    /// Makes what is missing, readable by its owner only: images may hold secrets.
    pub(super) fn open(root: &Path) -> Result<Self, StoreError> {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        for folder in FOLDERS {
            let path = root.join(folder);
            builder.create(&path).map_err(StoreError::at(&path))?;
        }
        let files = Self { root: root.into() };
        files.collect()?;
        Ok(files)
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn folder(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub(super) fn blob(&self, digest: &Digest) -> PathBuf {
        self.root
            .join("blobs")
            .join(digest.algorithm().name())
            .join(digest.hex())
    }

    pub(super) fn rootfs(&self, key: &Digest) -> PathBuf {
        self.root
            .join("rootfs")
            .join(format!("{}.erofs", key.hex()))
    }

    /// For moments, in which files may be made with [`temporary`](Self::temporary).
    pub(super) fn lock(&self) -> Result<Lock, StoreError> {
        let path = self.root.join("lock");
        Lock::take(&path, &mut || {}).map_err(StoreError::at(&path))
    }

    /// For as long as it takes to make what has this key.
    pub(super) fn lock_key(
        &self,
        key: &Digest,
        waiting: &mut dyn FnMut(),
    ) -> Result<Lock, StoreError> {
        let path = self.root.join("locks").join(key.hex());
        Lock::take(&path, waiting).map_err(StoreError::at(&path))
    }

    /// An empty file of our own, gone again unless it is kept.
    pub(super) fn temporary(&self) -> Result<Temporary, StoreError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let _moment = self.lock_temporaries()?;
        loop {
            let n = COUNT.fetch_add(1, Ordering::Relaxed);
            let path = self
                .root
                .join("tmp")
                .join(format!("{}-{n}", std::process::id()));
            let made = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&path);
            let file = match made {
                Ok(file) => file,
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(StoreError::at(&path)(e)),
            };
            try_lock(&file).map_err(StoreError::at(&path))?;
            return Ok(Temporary {
                path,
                file,
                kept: false,
            });
        }
    }

    /// A whole small file, in one step.
    pub(super) fn put(&self, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
        let temporary = self.temporary()?;
        (&temporary.file)
            .write_all(bytes)
            .map_err(StoreError::at(&temporary.path))?;
        temporary.keep(path)
    }

    fn lock_temporaries(&self) -> Result<Lock, StoreError> {
        let path = self.root.join("tmp.lock");
        Lock::take(&path, &mut || {}).map_err(StoreError::at(&path))
    }

    /// Removes what dead processes were writing.
    fn collect(&self) -> Result<(), StoreError> {
        let _moment = self.lock_temporaries()?;
        let dir = self.root.join("tmp");
        for entry in fs::read_dir(&dir).map_err(StoreError::at(&dir))? {
            let path = entry.map_err(StoreError::at(&dir))?.path();
            // Whoever writes it may be done with it meanwhile.
            let Ok(file) = File::open(&path) else {
                continue;
            };
            if try_lock(&file).map_err(StoreError::at(&path))? {
                log::info!("{}: left over, removed", path.display());
                remove(&path)?;
            }
        }
        Ok(())
    }
}

/// Is nobody's until it is kept.
#[derive(Debug)]
pub(super) struct Temporary {
    pub(super) path: PathBuf,
    pub(super) file: File,
    kept: bool,
}

impl Temporary {
    /// Gives it its place: on the disk before it has its name, and its name on the disk before this
    /// returns.
    pub(super) fn keep(mut self, path: &Path) -> Result<(), StoreError> {
        self.file.sync_all().map_err(StoreError::at(&self.path))?;
        fs::rename(&self.path, path).map_err(StoreError::at(path))?;
        self.kept = true;
        sync_parent(path)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.kept {
            // If it cannot be removed now, the next start tries again.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn sync_parent(path: &Path) -> Result<(), StoreError> {
    let parent = path.parent().unwrap_or(Path::new("."));
    let dir = File::open(parent).map_err(StoreError::at(parent))?;
    dir.sync_all().map_err(StoreError::at(parent))
}

/// Whether it was there or not.
pub(super) fn remove(path: &Path) -> Result<u64, StoreError> {
    use std::os::unix::fs::MetadataExt as _;
    let used = fs::symlink_metadata(path).map_or(0, |m| m.blocks() * 512);
    match fs::remove_file(path) {
        Ok(()) => Ok(used),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(e) => Err(StoreError::at(path)(e)),
    }
}

/// Files in a folder that are named by SHA-256, with the end that follows.
pub(super) fn digests_in(dir: &Path, end: &str) -> Result<Vec<(Digest, PathBuf)>, StoreError> {
    let mut out = Vec::new();
    for entry in fs::read_dir(dir).map_err(StoreError::at(dir))? {
        let path = entry.map_err(StoreError::at(dir))?.path();
        let name = path
            .file_name()
            .and_then(|n| n.to_str())
            .and_then(|n| n.strip_suffix(end));
        let digest = name.map(|hex| format!("{}:{hex}", Algorithm::Sha256.name()).parse());
        if let Some(Ok(digest)) = digest {
            out.push((digest, path));
        }
    }
    out.sort();
    Ok(out)
}
