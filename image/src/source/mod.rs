//! Where an image comes from: what a person may write in the place of IMAGE.

pub(crate) mod archive;
pub(crate) mod local;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::reference::{Reference, ReferenceError};

/// What a word was understood as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A directory in the OCI image layout, and which image in it.
    Layout {
        /// The directory.
        path: PathBuf,
        /// Its name there (`org.opencontainers.image.ref.name`).
        tag: Option<String>,
    },
    /// A tar archive (perhaps compressed) of an OCI layout or by `docker save`; which, is seen when it
    /// is read.
    Archive {
        /// The file.
        path: PathBuf,
        /// Which image in it: a tag, or a reference.
        tag: Option<String>,
    },
    /// A root file system that somebody unpacked.
    Directory(PathBuf),
    /// In a registry.
    Registry(Reference),
}

/// Why a word is no image.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Not there.
    #[error("{path} cannot be looked at")]
    Path {
        /// What was named.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A directory that should be a layout.
    #[error("{0} is not in the OCI image layout: it has no file `oci-layout`")]
    NoLayout(PathBuf),
    /// Something else than asked for.
    #[error("{0} is neither a file nor a directory")]
    Kind(PathBuf),
    /// Neither a path nor a name.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
}

const LAYOUT: &[&str] = &["oci:"];
const ARCHIVE: &[&str] = &["oci-archive:", "docker-archive:"];
const ROOTFS: &str = "rootfs:";
const REGISTRY: &str = "docker://";

impl Source {
    /// Prefixes decide: `oci:PATH[:TAG]`, `oci-archive:PATH[:TAG]`, `docker-archive:PATH[:NAME]`,
    /// `rootfs:PATH`, `docker://NAME`. Without: a path if it begins with `/`, `./`, `../`, or if it
    /// is a layout or an archive that exists; else a name in a registry.
    pub fn parse(word: &str) -> Result<Self, SourceError> {
        if let Some(rest) = prefixed(word, LAYOUT) {
            let (path, tag) = with_tag(rest);
            return match path.join("oci-layout").exists() {
                true => Ok(Self::Layout { path, tag }),
                false => Err(SourceError::NoLayout(path)),
            };
        }
        if let Some(rest) = prefixed(word, ARCHIVE) {
            let (path, tag) = with_tag(rest);
            kind(&path)?;
            return Ok(Self::Archive { path, tag });
        }
        if let Some(path) = word.strip_prefix(ROOTFS) {
            kind(Path::new(path))?;
            return Ok(Self::Directory(path.into()));
        }
        if let Some(name) = word.strip_prefix(REGISTRY) {
            return Ok(Self::Registry(name.parse()?));
        }
        let (path, tag) = with_tag(word);
        let says_path = word.starts_with('/')
            || word.starts_with("./")
            || word.starts_with("../")
            || word == "."
            || word == "..";
        match kind(&path) {
            Ok(Kind::Layout) => Ok(Self::Layout { path, tag }),
            Ok(Kind::File) if says_path || looks_archived(&path) => Ok(Self::Archive { path, tag }),
            Ok(Kind::Directory) if says_path => Ok(Self::Directory(path)),
            Err(error) if says_path => Err(error),
            _ => Ok(Self::Registry(word.parse()?)),
        }
    }
}

/// What it is called in lists and messages; parses to itself.
impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tagged = |f: &mut fmt::Formatter<'_>, prefix, path: &Path, tag: &Option<String>| {
            write!(f, "{prefix}{}", path.display())?;
            tag.as_ref().map_or(Ok(()), |tag| write!(f, ":{tag}"))
        };
        match self {
            Self::Layout { path, tag } => tagged(f, "oci:", path, tag),
            Self::Archive { path, tag } => tagged(f, "oci-archive:", path, tag),
            Self::Directory(path) => write!(f, "rootfs:{}", path.display()),
            Self::Registry(reference) => write!(f, "{reference}"),
        }
    }
}

enum Kind {
    Layout,
    Directory,
    File,
}

fn kind(path: &Path) -> Result<Kind, SourceError> {
    let meta = std::fs::metadata(path).map_err(|source| SourceError::Path {
        path: path.into(),
        source,
    })?;
    match () {
        () if meta.is_dir() && path.join("oci-layout").exists() => Ok(Kind::Layout),
        () if meta.is_dir() => Ok(Kind::Directory),
        () if meta.is_file() => Ok(Kind::File),
        () => Err(SourceError::Kind(path.into())),
    }
}

fn prefixed<'w>(word: &'w str, prefixes: &[&str]) -> Option<&'w str> {
    prefixes.iter().find_map(|prefix| word.strip_prefix(prefix))
}

/// Whatever exists as it is written is a path; else what follows a colon is a tag.
fn with_tag(word: &str) -> (PathBuf, Option<String>) {
    if Path::new(word).exists() {
        return (word.into(), None);
    }
    // A tag may be a reference with a port and a tag of its own: the first colon after which something
    // exists before it.
    let mut colons = word.match_indices(':').map(|(at, _)| word.split_at(at));
    let found = colons.find(|(path, _)| Path::new(path).exists());
    match found {
        Some((path, tag)) => (path.into(), tag.strip_prefix(':').map(str::to_owned)),
        None => (word.into(), None),
    }
}

fn looks_archived(path: &Path) -> bool {
    let name = path.to_string_lossy().to_lowercase();
    [".tar", ".tar.gz", ".tgz", ".tar.zst"]
        .iter()
        .any(|end| name.ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_names_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let layout = dir.path().join("layout");
        std::fs::create_dir(&layout).unwrap();
        std::fs::write(layout.join("oci-layout"), "{}").unwrap();
        let archive = dir.path().join("a:b.tar");
        std::fs::write(&archive, "").unwrap();
        let word = |path: &Path| path.display().to_string();

        let tag = Some("v1".to_owned());
        let tagged = Source::Layout {
            path: layout.clone(),
            tag: tag.clone(),
        };
        for text in [
            format!("{}:v1", word(&layout)),
            format!("oci:{}:v1", word(&layout)),
        ] {
            assert_eq!(Source::parse(&text).unwrap(), tagged);
        }
        assert_eq!(Source::parse(&tagged.to_string()).unwrap(), tagged);
        assert_eq!(
            Source::parse(&word(&archive)).unwrap(),
            Source::Archive {
                path: archive.clone(),
                tag: None
            }
        );
        let named = format!("docker-archive:{}:localhost:5000/x:1", word(&archive));
        let name = Some("localhost:5000/x:1".to_owned());
        assert_eq!(
            Source::parse(&named).unwrap(),
            Source::Archive {
                path: archive,
                tag: name
            }
        );
        assert_eq!(
            Source::parse(&word(dir.path())).unwrap(),
            Source::Directory(dir.path().into())
        );
        assert_eq!(
            Source::parse("nginx").unwrap(),
            Source::Registry("nginx".parse().unwrap())
        );
        assert_eq!(
            Source::parse("docker://a/b").unwrap(),
            Source::Registry("a/b".parse().unwrap())
        );
        assert!(matches!(
            Source::parse("/not/there"),
            Err(SourceError::Path { .. })
        ));
        assert!(matches!(
            Source::parse(&format!("oci:{}", dir.path().display())),
            Err(SourceError::NoLayout(_))
        ));
        assert!(matches!(
            Source::parse("NGINX"),
            Err(SourceError::Reference(_))
        ));
    }
}
