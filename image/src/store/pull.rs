//! From a source to an image that can be used.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::files::Temporary;
use super::record::{Record, rootfs_key, uuid};
use super::{Image, Store, StoreError};
use crate::config::{ConfigError, ImageConfig, Parsed};
use crate::digest::Digest;
use crate::layers::{Layer, Limits, UnpackError, unpack};
use crate::manifest::{DOCUMENT_MAX, Descriptor, Manifest};
use crate::platform::Platform;
use crate::reference::Reference;
use crate::registry::{RegistryError, RegistryOptions, Repository, Resolved, Step};
use crate::rootfs::Rootfs;
use crate::source::Source;
use crate::source::archive::Section;
use crate::source::local::{LocalError, LocalImage};

/// When to ask a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PullPolicy {
    /// When the store has nothing of that name.
    #[default]
    Missing,
    /// Each time: a tag may have moved.
    Always,
    /// Not at all.
    Never,
}

/// How to pull.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which variant of an image.
    pub platform: Platform,
    /// When to ask a registry.
    pub policy: PullPolicy,
    /// What an image may cost.
    pub limits: Limits,
    /// How registries are spoken to.
    pub registry: RegistryOptions,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            platform: Platform::host(),
            policy: PullPolicy::default(),
            limits: Limits::default(),
            registry: RegistryOptions::default(),
        }
    }
}

/// What a pull does.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Another process is pulling the same; this waits for it.
    Waiting,
    /// The image is known.
    Resolved {
        /// Its manifest's digest.
        digest: Digest,
        /// How many layers it has.
        layers: usize,
        /// Bytes to download, at most.
        bytes: u64,
    },
    /// A layer is being downloaded; the last such event of a layer has `done == total`.
    Downloading {
        /// Which.
        digest: Digest,
        /// Bytes there are.
        done: u64,
        /// Bytes there will be.
        total: u64,
    },
    /// A download was cut and will be continued.
    Retrying {
        /// Which.
        digest: Digest,
        /// How many attempts were made.
        attempts: u32,
        /// What went wrong.
        why: String,
    },
    /// A layer is being unpacked.
    Unpacking {
        /// Which, from 0.
        layer: usize,
        /// Of how many.
        layers: usize,
        /// Bytes of it so far.
        bytes: u64,
    },
}

/// Hears of what a pull does, on the thread that pulls.
pub trait Progress {
    /// Called often: some hundred times a second at most.
    fn event(&mut self, event: Event);
}

impl<F: FnMut(Event)> Progress for F {
    fn event(&mut self, event: Event) {
        self(event);
    }
}

/// Does not care.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn event(&mut self, _: Event) {}
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The registry.
    #[error("`{name}` cannot be pulled")]
    Registry {
        /// What was asked for.
        name: String,
        /// Why not.
        source: Box<RegistryError>,
    },
    /// A layout or an archive.
    #[error("{path} cannot be used as an image")]
    Local {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: Box<LocalError>,
    },
    /// A root file system.
    #[error("{path} cannot be used as a root file system")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The layers.
    #[error("{name} cannot be unpacked")]
    Unpack {
        /// Which image.
        name: String,
        /// Why not.
        source: Box<UnpackError>,
    },
    /// The configuration.
    #[error("{name} has a configuration that cannot be used")]
    Config {
        /// Which image.
        name: String,
        /// Why not.
        source: ConfigError,
    },
    /// For other machines, and there is nothing to choose.
    #[error("{name} is an image for {found}, not for {wanted}")]
    Platform {
        /// Which image.
        name: String,
        /// What it is for.
        found: Box<Platform>,
        /// What was asked for.
        wanted: Box<Platform>,
    },
    /// Not there, and may not be fetched.
    #[error("the store has no image `{0}`, and pulling is not allowed (--pull never)")]
    NotStored(String),
}

/// A layer to unpack, or why it cannot be read.
type Opener<'o> = &'o mut dyn FnMut(usize) -> io::Result<Box<dyn Read + Send>>;

/// An image of which all but the layers is here.
struct Known<'k> {
    name: String,
    digest: &'k Digest,
    raw: &'k [u8],
    manifest: &'k Manifest,
    config: &'k [u8],
    parsed: Parsed,
    /// Layers among the blobs.
    downloaded: Vec<Digest>,
}

impl Store {
    /// Makes an image usable: fetches and unpacks what is not there yet. If it fails, the store is as it
    /// was before.
    pub fn pull(
        &self,
        source: &Source,
        options: &Options,
        progress: &mut dyn Progress,
    ) -> Result<Image, PullError> {
        match source {
            Source::Directory(path) => directory(path),
            Source::Registry(reference) => self.pull_remote(reference, options, progress),
            Source::Layout { path, tag } => {
                let found = LocalImage::in_layout(path, tag.as_deref(), &options.platform);
                let found = found.map_err(|source| PullError::Local {
                    path: path.clone(),
                    source: Box::new(source),
                })?;
                self.pull_local(source, &found, options, progress)
            }
            Source::Archive { path, tag } => {
                let mut scratch = || {
                    let temporary = self.files.temporary().map_err(io::Error::other)?;
                    // Without a name it is gone when it is closed.
                    temporary.file.try_clone()
                };
                let found =
                    LocalImage::in_archive(path, tag.as_deref(), &options.platform, &mut scratch);
                let found = found.map_err(|source| PullError::Local {
                    path: path.clone(),
                    source: Box::new(source),
                })?;
                self.pull_local(source, &found, options, progress)
            }
        }
    }

    fn pull_local(
        &self,
        source: &Source,
        found: &LocalImage,
        options: &Options,
        progress: &mut dyn Progress,
    ) -> Result<Image, PullError> {
        // By its whole path, wherever it was named from.
        let name = match source {
            Source::Layout { path, tag } => Source::Layout {
                path: whole(path),
                tag: tag.clone(),
            },
            Source::Archive { path, tag } => Source::Archive {
                path: whole(path),
                tag: tag.clone(),
            },
            other => other.clone(),
        };
        let name = name.to_string();
        if let Some(image) = self.reuse(&found.digest, &name)? {
            return Ok(image);
        }
        let known = known(
            name,
            &found.digest,
            &found.raw,
            &found.manifest,
            &found.config,
            Vec::new(),
            &options.platform,
        )?;
        progress.event(resolved(&known));
        let key = rootfs_key(&known.parsed.diff_ids);
        let _lock = self
            .files
            .lock_key(&key, &mut || progress.event(Event::Waiting))?;
        self.install(
            &known,
            &key,
            &mut |index| found.layer(index),
            options,
            progress,
        )
    }

    fn pull_remote(
        &self,
        reference: &Reference,
        options: &Options,
        progress: &mut dyn Progress,
    ) -> Result<Image, PullError> {
        let name = reference.to_string();
        let wrong = |source: RegistryError| PullError::Registry {
            name: reference.to_string(),
            source: source.into(),
        };
        if options.policy != PullPolicy::Always
            && let Some(image) = self.stored(reference, &name, &options.platform)?
        {
            return Ok(image);
        }
        if options.policy == PullPolicy::Never {
            return Err(PullError::NotStored(name));
        }
        let mut repository = Repository::new(reference, &options.registry).map_err(wrong)?;
        let Resolved {
            digest,
            raw,
            manifest,
        } = repository.resolve(&options.platform).map_err(wrong)?;
        if let Some(image) = self.reuse(&digest, &name)? {
            return Ok(image);
        }
        if manifest.config.size > DOCUMENT_MAX {
            let registry = reference.registry().to_owned();
            let digest = manifest.config.digest.clone();
            return Err(wrong(RegistryError::Size {
                registry,
                digest,
                size: DOCUMENT_MAX,
            }));
        }
        let scratch = self.files.temporary()?;
        let config = repository
            .fetch(&manifest.config, &scratch.file)
            .map_err(wrong)?;
        drop(scratch);
        let layers = manifest.layers.iter().map(|l| l.digest.clone()).collect();
        let known = known(
            name,
            &digest,
            &raw,
            &manifest,
            &config,
            layers,
            &options.platform,
        )?;
        progress.event(resolved(&known));
        let key = rootfs_key(&known.parsed.diff_ids);
        let _lock = self
            .files
            .lock_key(&key, &mut || progress.event(Event::Waiting))?;
        let files = match self.files.rootfs(&key).exists() {
            true => Vec::new(),
            false => self.download(&repository, reference, &manifest, progress)?,
        };
        let mut open = |index: usize| {
            let file = files.get(index).ok_or(io::ErrorKind::NotFound)?;
            // Each with a place of its own, for a file may be several layers.
            Ok(Box::new(Section::whole(file)?) as Box<dyn Read + Send>)
        };
        self.install(&known, &key, &mut open, options, progress)
    }

    /// The layers of an image, open. What another image has left is not downloaded again.
    fn download(
        &self,
        repository: &Repository,
        reference: &Reference,
        manifest: &Manifest,
        progress: &mut dyn Progress,
    ) -> Result<Vec<Arc<File>>, PullError> {
        let wrong = |source: RegistryError| PullError::Registry {
            name: reference.to_string(),
            source: source.into(),
        };
        let mut new: Vec<(Descriptor, Temporary)> = Vec::new();
        for layer in &manifest.layers {
            let path = self.files.blob(&layer.digest);
            if !path.exists() && !new.iter().any(|(d, _)| d.digest == layer.digest) {
                new.push((layer.clone(), self.files.temporary()?));
            }
        }
        let wanted: Vec<(Descriptor, &File)> =
            new.iter().map(|(d, t)| (d.clone(), &t.file)).collect();
        let total = |digest: &Digest| {
            wanted
                .iter()
                .find(|(d, _)| d.digest == *digest)
                .map_or(0, |(d, _)| d.size)
        };
        let mut tell = |step: Step<'_>| {
            progress.event(match step {
                Step::Progress(digest, done) => Event::Downloading {
                    digest: digest.clone(),
                    done,
                    total: total(digest),
                },
                Step::Again(digest, attempts, why) => Event::Retrying {
                    digest: digest.clone(),
                    attempts,
                    why,
                },
            });
        };
        repository.download(&wanted, &mut tell).map_err(wrong)?;
        for (descriptor, temporary) in new {
            temporary.keep(&self.files.blob(&descriptor.digest))?;
        }
        let open = |layer: &Descriptor| {
            let path = self.files.blob(&layer.digest);
            File::open(&path)
                .map(Arc::new)
                .map_err(StoreError::at(&path))
        };
        Ok(manifest.layers.iter().map(open).collect::<Result<_, _>>()?)
    }

    /// Unpacks if that was not done, and enters the image. The key is locked.
    fn install(
        &self,
        known: &Known<'_>,
        key: &Digest,
        open: Opener<'_>,
        options: &Options,
        progress: &mut dyn Progress,
    ) -> Result<Image, PullError> {
        let path = self.files.rootfs(key);
        let unpacked = match path.exists() {
            true => None,
            false => Some(self.unpack(known, key, open, options, progress)?),
        };
        let _moment = self.files.lock()?;
        // Between the look and the lock somebody may have removed it: then it is one that nobody wants.
        if let Some(temporary) = unpacked {
            temporary.keep(&path)?;
        }
        let size = std::fs::metadata(&path)
            .map_err(StoreError::at(&path))?
            .len();
        self.files.put(&self.files.blob(known.digest), known.raw)?;
        let config = &known.manifest.config.digest;
        self.files.put(&self.files.blob(config), known.config)?;
        self.files.put_record(&Record {
            digest: known.digest.clone(),
            config: config.clone(),
            rootfs: key.clone(),
            size,
            layers: known.downloaded.clone(),
        })?;
        self.files.put_name(&known.name, known.digest)?;
        let mut names = self.files.names()?;
        names.retain(|(_, image)| image == known.digest);
        Ok(Image {
            digest: Some(known.digest.clone()),
            names: names.into_iter().map(|(name, _)| name).collect(),
            config: known.parsed.config.clone(),
            rootfs: Rootfs::Erofs(path),
            size,
        })
    }

    fn unpack(
        &self,
        known: &Known<'_>,
        key: &Digest,
        open: Opener<'_>,
        options: &Options,
        progress: &mut dyn Progress,
    ) -> Result<Temporary, PullError> {
        let temporary = self.files.temporary()?;
        let layers = known.manifest.layers.len();
        let all = known
            .manifest
            .layers
            .iter()
            .zip(&known.parsed.diff_ids)
            .enumerate();
        let all = all.map(|(index, (layer, diff_id))| {
            let name = format!("{} ({} of {layers})", layer.digest.short(), index + 1);
            let input = open(index).map_err(|source| UnpackError::Open {
                layer: name.clone(),
                source,
            })?;
            Ok(Layer {
                name,
                input,
                diff_id: diff_id.clone(),
            })
        });
        let mut tell = |layer, bytes| {
            progress.event(Event::Unpacking {
                layer,
                layers,
                bytes,
            });
        };
        unpack(all, &temporary.file, uuid(key), options.limits, &mut tell).map_err(|source| {
            PullError::Unpack {
                name: known.name.clone(),
                source: Box::new(source),
            }
        })?;
        Ok(temporary)
    }

    /// What the store has under a name or digest, if it is for the platform.
    fn stored(
        &self,
        reference: &Reference,
        name: &str,
        platform: &Platform,
    ) -> Result<Option<Image>, StoreError> {
        let named = match self.files.named(name)? {
            Some(digest) => Some(digest),
            None => reference.digest().cloned(),
        };
        let Some(digest) = named else {
            return Ok(None);
        };
        let image = self.reuse(&digest, name)?;
        Ok(image.filter(|i| i.config.platform.as_ref().is_none_or(|p| platform.runs(p))))
    }

    /// An image that is whole gets one more name.
    fn reuse(&self, digest: &Digest, name: &str) -> Result<Option<Image>, StoreError> {
        let _moment = self.files.lock()?;
        let Some(record) = self.files.record(digest)? else {
            return Ok(None);
        };
        if self.image(&record, &[])?.is_none() {
            return Ok(None);
        }
        self.files.put_name(name, digest)?;
        self.image(&record, &self.files.names()?)
    }
}

fn known<'k>(
    name: String,
    digest: &'k Digest,
    raw: &'k [u8],
    manifest: &'k Manifest,
    config: &'k [u8],
    downloaded: Vec<Digest>,
    wanted: &Platform,
) -> Result<Known<'k>, PullError> {
    let wrong = |source| PullError::Config {
        name: name.clone(),
        source,
    };
    let parsed = ImageConfig::parse(config).map_err(wrong)?;
    let (diff_ids, layers) = (parsed.diff_ids.len(), manifest.layers.len());
    if diff_ids != layers {
        return Err(wrong(ConfigError::Layers { diff_ids, layers }));
    }
    if let Some(found) = &parsed.config.platform
        && !wanted.runs(found)
    {
        return Err(PullError::Platform {
            name,
            found: Box::new(found.clone()),
            wanted: Box::new(wanted.clone()),
        });
    }
    Ok(Known {
        name,
        digest,
        raw,
        manifest,
        config,
        parsed,
        downloaded,
    })
}

fn resolved(known: &Known<'_>) -> Event {
    Event::Resolved {
        digest: known.digest.clone(),
        layers: known.manifest.layers.len(),
        bytes: known
            .manifest
            .layers
            .iter()
            .fold(0, |sum: u64, l| sum.saturating_add(l.size)),
    }
}

fn directory(path: &Path) -> Result<Image, PullError> {
    let wrong = |source| PullError::Directory {
        path: path.into(),
        source,
    };
    let whole = path.canonicalize().map_err(wrong)?;
    if !whole.is_dir() {
        return Err(wrong(io::ErrorKind::NotADirectory.into()));
    }
    Ok(Image {
        digest: None,
        names: vec![Source::Directory(whole.clone()).to_string()],
        config: ImageConfig::default(),
        rootfs: Rootfs::Directory(whole),
        size: 0,
    })
}

fn whole(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.into())
}
