//! The store: images under a directory of the user's, shared by any number of processes without a
//! daemon. Owns every file below its root.
//!
//! Whatever is there under its final name is whole: files are written elsewhere, synced, and renamed.
//! What a process that was killed has left is removed when somebody opens the store next.

mod clean;
mod files;
mod lock;
mod pull;
mod record;

use std::io;
use std::path::{Path, PathBuf};

use crate::config::{ConfigError, ImageConfig};
use crate::digest::Digest;
use crate::rootfs::Rootfs;
use crate::users::{User, UserError};
pub use clean::{Freed, Pruning};
use files::Files;
pub use pull::{Event, Options, Progress, PullError, PullPolicy, Silent};
use record::Record;

/// Images on this machine.
#[derive(Debug, Clone)]
pub struct Store {
    files: Files,
}

/// An image that can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Of its manifest; none for a directory.
    pub digest: Option<Digest>,
    /// Names it has in the store.
    pub names: Vec<String>,
    /// How it wants to be run.
    pub config: ImageConfig,
    /// Its files.
    pub rootfs: Rootfs,
    /// Bytes of the EROFS file; 0 for a directory.
    pub size: u64,
}

impl Image {
    /// `user[:group]` by the image's own files; empty is root.
    pub fn lookup_user(&self, word: &str) -> Result<User, UserError> {
        self.rootfs.lookup_user(word)
    }
}

/// Why the store cannot do something.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file or folder of it.
    #[error("the image store's {path}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A record that does not parse.
    #[error("the image store's {path} is damaged: remove it, and pull the image again")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// How.
        source: serde_json::Error,
    },
    /// A configuration that does not parse any more.
    #[error("the configuration of {image} in the image store is damaged: pull the image again")]
    Config {
        /// Whose.
        image: Digest,
        /// How.
        source: ConfigError,
    },
    /// Nothing of that name.
    #[error("there is no image `{0}` in the store")]
    NoImage(String),
    /// The beginning of several digests.
    #[error("`{word}` is the beginning of {count} images' digests; give more of it")]
    Ambiguous {
        /// What was given.
        word: String,
        /// How many fit.
        count: usize,
    },
    /// Neither variable nor home.
    #[error("there is no place for images: neither XDG_DATA_HOME nor HOME is set")]
    NoHome,
}

impl StoreError {
    fn at(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}

impl Store {
    /// Opens a store, or makes one.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        Ok(Self {
            files: Files::open(root)?,
        })
    }

    /// Where a user's images are: `$XDG_DATA_HOME/testudo/images`, for root `/var/lib/testudo/images`.
    pub fn default_path() -> Result<PathBuf, StoreError> {
        let variable = |name| {
            std::env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        let data = match variable("XDG_DATA_HOME") {
            Some(path) if path.is_absolute() => path,
            _ if rustix::process::geteuid().is_root() => PathBuf::from("/var/lib"),
            _ => variable("HOME")
                .ok_or(StoreError::NoHome)?
                .join(".local/share"),
        };
        Ok(data.join("testudo/images"))
    }

    /// Where this one is.
    pub fn path(&self) -> &Path {
        self.files.root()
    }

    /// All images, by name.
    pub fn list(&self) -> Result<Vec<Image>, StoreError> {
        let names = self.files.names()?;
        let mut images = Vec::new();
        for record in self.files.records()? {
            // Somebody may be removing it.
            if let Some(image) = self.image(&record, &names)? {
                images.push(image);
            }
        }
        images.sort_by(|a, b| (&a.names, &a.digest).cmp(&(&b.names, &b.digest)));
        Ok(images)
    }

    /// An image by name, digest, or the beginning of its digest.
    pub fn get(&self, word: &str) -> Result<Image, StoreError> {
        let missing = || StoreError::NoImage(word.to_owned());
        let record = self.find(word)?.ok_or_else(missing)?;
        self.image(&record, &self.files.names()?)?
            .ok_or_else(missing)
    }

    fn find(&self, word: &str) -> Result<Option<Record>, StoreError> {
        if let Some(digest) = self.digest_of(word)? {
            return self.files.record(&digest);
        }
        let hex = word.strip_prefix("sha256:").unwrap_or(word);
        let looks = hex.len() >= 4 && hex.bytes().all(|b| b.is_ascii_hexdigit());
        let records = if looks {
            self.files.records()?
        } else {
            Vec::new()
        };
        let mut fitting = records
            .into_iter()
            .filter(|r| r.digest.hex().starts_with(hex));
        match (fitting.next(), fitting.count()) {
            (first, 0) => Ok(first),
            (_, more) => Err(StoreError::Ambiguous {
                word: word.to_owned(),
                count: more + 1,
            }),
        }
    }

    /// Which image has this name, as it is or as a reference in full.
    fn digest_of(&self, word: &str) -> Result<Option<Digest>, StoreError> {
        for name in names_of(word) {
            if let Some(digest) = self.files.named(&name)? {
                return Ok(Some(digest));
            }
        }
        Ok(None)
    }

    /// `None` if files of it are missing.
    fn image(
        &self,
        record: &Record,
        names: &[(String, Digest)],
    ) -> Result<Option<Image>, StoreError> {
        let path = self.files.blob(&record.config);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(StoreError::at(&path)(e)),
        };
        let damaged = |source| StoreError::Config {
            image: record.digest.clone(),
            source,
        };
        let config = ImageConfig::parse(&bytes).map_err(damaged)?.config;
        let rootfs = self.files.rootfs(&record.rootfs);
        if !rootfs.exists() {
            return Ok(None);
        }
        let names = names.iter().filter(|(_, image)| *image == record.digest);
        Ok(Some(Image {
            digest: Some(record.digest.clone()),
            names: names.map(|(name, _)| name.clone()).collect(),
            config,
            rootfs: Rootfs::Erofs(rootfs),
            size: record.size,
        }))
    }
}

/// A word as a name in the store: itself, or what it is in full.
fn names_of(word: &str) -> Vec<String> {
    let full = word.parse::<crate::reference::Reference>();
    let full = full.ok().map(|r| r.to_string());
    std::iter::once(word.to_owned()).chain(full).collect()
}
