//! Images on this machine: OCI layouts and archives. All give the same: a manifest, a configuration,
//! and layers to read.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::archive::{Files, Section, rewind};
use crate::config::{ConfigError, ImageConfig};
use crate::digest::Digest;
use crate::layers::unpacked;
use crate::manifest::{DOCUMENT_MAX, Descriptor, Document, Index, Manifest, ManifestError};
use crate::platform::Platform;
use crate::tar::TarError;

/// An index in an index, at most.
const NESTED_MAX: usize = 4;
const REF_NAME: &str = "org.opencontainers.image.ref.name";
const FULL_NAME: &str = "io.containerd.image.name";

/// Why an image on this machine cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// A file of it.
    #[error("`{name}` cannot be read")]
    Read {
        /// Which.
        name: String,
        /// Why not.
        source: io::Error,
    },
    /// The archive.
    #[error("it cannot be read as an archive")]
    Archive(#[from] TarError),
    /// An archive of something else.
    #[error(
        "it is an archive of neither an OCI layout (no file `index.json`) nor by `docker save` (no file `manifest.json`)"
    )]
    Foreign,
    /// Not what its name says.
    #[error("`{wanted}` has the digest {found}: it is damaged")]
    Digest {
        /// The name.
        wanted: Digest,
        /// The truth.
        found: Digest,
    },
    /// A manifest that is none.
    #[error("the manifest {name}")]
    Manifest {
        /// Which.
        name: String,
        /// Why.
        source: ManifestError,
    },
    /// A configuration that is none.
    #[error("the configuration {name}")]
    Config {
        /// Which.
        name: String,
        /// Why.
        source: ConfigError,
    },
    /// Several to choose from.
    #[error("there is no single image to take: {0}")]
    Choice(String),
}

/// An image that was found.
pub(crate) struct LocalImage {
    pub(crate) digest: Digest,
    /// The bytes the digest is of.
    pub(crate) raw: Vec<u8>,
    pub(crate) manifest: Manifest,
    pub(crate) config: Vec<u8>,
    store: Files2,
    /// Where in it each layer is.
    layers: Vec<String>,
}

/// A folder, or an archive of one.
enum Files2 {
    Folder(PathBuf),
    Archive(Files),
}

impl LocalImage {
    /// Finds an image in an OCI layout.
    pub(crate) fn in_layout(
        path: &Path,
        tag: Option<&str>,
        wanted: &Platform,
    ) -> Result<Self, LocalError> {
        in_layout(Files2::Folder(path.into()), tag, wanted)
    }

    /// Finds an image in an archive. `scratch` gives a file for one that is compressed.
    pub(crate) fn in_archive(
        path: &Path,
        tag: Option<&str>,
        wanted: &Platform,
        scratch: &mut dyn FnMut() -> io::Result<File>,
    ) -> Result<Self, LocalError> {
        let wrong = |source| LocalError::Read {
            name: path.display().to_string(),
            source,
        };
        let file = File::open(path).map_err(wrong)?;
        let file = plain(file, scratch).map_err(wrong)?;
        let files = Files::index(file)?;
        if files.has("index.json") && files.has("oci-layout") {
            in_layout(Files2::Archive(files), tag, wanted)
        } else if files.has("manifest.json") {
            saved(files, tag)
        } else {
            Err(LocalError::Foreign)
        }
    }

    /// The bytes of a layer.
    pub(crate) fn layer(&self, index: usize) -> io::Result<Box<dyn Read + Send>> {
        let name = self.layers.get(index).ok_or(io::ErrorKind::NotFound)?;
        Ok(self.store.open(name)?.0)
    }
}

impl Files2 {
    fn open(&self, name: &str) -> io::Result<(Box<dyn Read + Send>, u64)> {
        match self {
            Self::Folder(path) => {
                let file = File::open(path.join(name))?;
                let len = file.metadata()?.len();
                Ok((Box::new(file), len))
            }
            Self::Archive(files) => {
                let (section, len): (Section, u64) = files.open(name)?;
                Ok((Box::new(section), len))
            }
        }
    }

    fn small(&self, name: &str) -> Result<Vec<u8>, LocalError> {
        let wrong = |source| LocalError::Read {
            name: name.to_owned(),
            source,
        };
        let (input, len) = self.open(name).map_err(wrong)?;
        if len > DOCUMENT_MAX {
            return Err(wrong(io::Error::other(format!(
                "it has {len} bytes, more than {DOCUMENT_MAX}"
            ))));
        }
        let mut bytes = Vec::new();
        input
            .take(DOCUMENT_MAX)
            .read_to_end(&mut bytes)
            .map_err(wrong)?;
        Ok(bytes)
    }

    /// A document of which the digest is known.
    fn blob(&self, digest: &Digest) -> Result<Vec<u8>, LocalError> {
        let bytes = self.small(&blob_name(digest))?;
        let mut hasher = crate::digest::Hasher::new(digest.algorithm());
        hasher.update(&bytes);
        let found = hasher.finish();
        match found == *digest {
            true => Ok(bytes),
            false => Err(LocalError::Digest {
                wanted: digest.clone(),
                found,
            }),
        }
    }
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().name(), digest.hex())
}

fn in_layout(
    store: Files2,
    tag: Option<&str>,
    wanted: &Platform,
) -> Result<LocalImage, LocalError> {
    let wrong = |name: String| move |source| LocalError::Manifest { name, source };
    let bytes = store.small("index.json")?;
    let index: Index = serde_json::from_slice(&bytes).map_err(|e| LocalError::Manifest {
        name: "index.json".into(),
        source: e.into(),
    })?;
    let mut digest = choose(&index, tag, wanted)?.digest.clone();
    for _ in 0..NESTED_MAX {
        let raw = store.blob(&digest)?;
        match Document::parse(&raw).map_err(wrong(digest.to_string()))? {
            Document::Index(index) => {
                digest = index
                    .select(wanted)
                    .map_err(wrong(digest.to_string()))?
                    .digest
                    .clone();
            }
            Document::Manifest(manifest) => {
                let config = store.blob(&manifest.config.digest)?;
                let layers = manifest
                    .layers
                    .iter()
                    .map(|l| blob_name(&l.digest))
                    .collect();
                return Ok(LocalImage {
                    digest,
                    raw,
                    manifest,
                    config,
                    store,
                    layers,
                });
            }
        }
    }
    Err(LocalError::Choice("its indexes name each other".into()))
}

/// By name, or the only one, or the only one for the platform.
fn choose<'i>(
    index: &'i Index,
    tag: Option<&str>,
    wanted: &Platform,
) -> Result<&'i Descriptor, LocalError> {
    let names = |d: &Descriptor| -> Vec<String> {
        [REF_NAME, FULL_NAME]
            .iter()
            .filter_map(|key| d.annotations.get(*key).cloned())
            .collect()
    };
    let all = || {
        index
            .manifests
            .iter()
            .flat_map(&names)
            .take(20)
            .collect::<Vec<_>>()
            .join(", ")
    };
    let mut fitting: Vec<&Descriptor> = match tag {
        Some(tag) => index
            .manifests
            .iter()
            .filter(|d| names(d).iter().any(|n| n == tag))
            .collect(),
        None => index.manifests.iter().collect(),
    };
    if fitting.len() > 1 {
        fitting.retain(|d| d.platform.as_ref().is_none_or(|p| wanted.runs(p)));
    }
    match (fitting.as_slice(), tag) {
        ([one], _) => Ok(one),
        ([first, rest @ ..], _) if rest.iter().all(|d| d.digest == first.digest) => Ok(first),
        ([], Some(tag)) => Err(LocalError::Choice(format!(
            "none is named `{tag}`; there are: {}",
            all()
        ))),
        ([], None) => Err(LocalError::Choice("its index is empty".into())),
        (several, _) => Err(LocalError::Choice(format!(
            "{} fit, add :TAG; there are: {}",
            several.len(),
            all()
        ))),
    }
}

/// An entry of `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// By `docker save`: there is no manifest as registries have it, so one is made that always comes out the
/// same; its layers are named by what they are unpacked.
fn saved(files: Files, tag: Option<&str>) -> Result<LocalImage, LocalError> {
    let store = Files2::Archive(files);
    let bytes = store.small("manifest.json")?;
    let list: Vec<Saved> = serde_json::from_slice(&bytes).map_err(|e| LocalError::Manifest {
        name: "manifest.json".into(),
        source: e.into(),
    })?;
    let tags = |s: &Saved| s.repo_tags.clone().unwrap_or_default();
    let same = |name: &str, tag: &str| {
        let full = |n: &str| n.parse::<crate::reference::Reference>();
        name == tag || full(name).is_ok_and(|a| full(tag).is_ok_and(|b| a == b))
    };
    let fitting: Vec<&Saved> = list
        .iter()
        .filter(|s| tag.is_none_or(|tag| tags(s).iter().any(|name| same(name, tag))))
        .collect();
    let [image] = fitting.as_slice() else {
        let all: Vec<String> = list.iter().flat_map(&tags).take(20).collect();
        let why = format!(
            "{} fit, add :NAME; there are: {}",
            fitting.len(),
            all.join(", ")
        );
        return Err(LocalError::Choice(why));
    };
    let config = store.small(&image.config)?;
    let parsed = ImageConfig::parse(&config).map_err(|source| LocalError::Config {
        name: image.config.clone(),
        source,
    })?;
    let described = |digest: Digest, size: u64, media_type: &str| Descriptor {
        media_type: media_type.to_owned(),
        digest,
        size,
        platform: None,
        annotations: std::collections::BTreeMap::new(),
    };
    let mut layers = Vec::new();
    for (name, diff_id) in image.layers.iter().zip(parsed.diff_ids) {
        let wrong = |source| LocalError::Read {
            name: name.clone(),
            source,
        };
        let size = store.open(name).map_err(wrong)?.1;
        layers.push(described(
            diff_id,
            size,
            "application/vnd.oci.image.layer.v1.tar",
        ));
    }
    let manifest = Manifest {
        schema_version: 2,
        media_type: "application/vnd.oci.image.manifest.v1+json".into(),
        config: described(
            Digest::of(&config),
            config.len() as u64,
            "application/vnd.oci.image.config.v1+json",
        ),
        layers,
    };
    let raw = serde_json::to_vec(&manifest).map_err(|e| LocalError::Manifest {
        name: "manifest.json".into(),
        source: e.into(),
    })?;
    let layers = image.layers.clone();
    Ok(LocalImage {
        digest: Digest::of(&raw),
        raw,
        manifest,
        config,
        store,
        layers,
    })
}

/// The archive itself, or what it is unpacked.
fn plain(mut file: File, scratch: &mut dyn FnMut() -> io::Result<File>) -> io::Result<File> {
    let mut first = [0; 4];
    let n = file.read(&mut first)?;
    rewind(&mut file)?;
    if !crate::layers::is_packed(first.get(..n).unwrap_or_default()) {
        return Ok(file);
    }
    let mut input = unpacked(Box::new(file))?;
    let mut output = scratch()?;
    io::copy(&mut input, &mut output)?;
    rewind(&mut output)?;
    Ok(output)
}
