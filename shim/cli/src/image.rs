//! What a person may name as an image, and what comes of it: a root and how it wants to be run.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
use thiserror::Error;

use crate::container::UserLists;
use crate::pod::Root;

/// An image cannot be used.
#[derive(Debug, Error)]
pub enum ImageError {
    /// There is nothing of that name.
    #[error(
        "there is no image {0:?}: write the path of a root file system (a folder, or an EROFS file)"
    )]
    Nothing(String),
    /// It is there, and is none.
    #[error("{} is no image: neither a folder nor an EROFS file", .0.display())]
    Kind(PathBuf),
    /// The host refused.
    #[error("cannot read {}", path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// How an image wants to be run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageConfig {
    /// Comes before the command.
    pub entrypoint: Vec<String>,
    /// If no command is given.
    pub command: Vec<String>,
    /// `NAME=VALUE`.
    pub env: Vec<String>,
    /// Working folder.
    pub cwd: Option<String>,
    /// `USER[:GROUP]`.
    pub user: Option<String>,
    /// A signal's name.
    pub stop_signal: Option<String>,
}

/// An image that can be run.
#[derive(Debug, Clone)]
pub struct Image {
    /// The root.
    pub root: Root,
    /// How.
    pub config: ImageConfig,
    /// Its lists of users.
    pub users: UserLists,
}

/// EROFS has its superblock 1024 bytes in.
const EROFS_AT: usize = 1024;
const EROFS_MAGIC: [u8; 4] = 0xe0f5_e1e2_u32.to_le_bytes();

/// Looks.
pub fn open(name: &str) -> Result<Image, ImageError> {
    let path = Path::new(name);
    let read = |source| ImageError::Read {
        path: path.to_owned(),
        source,
    };
    let path = match path.canonicalize() {
        Ok(path) => path,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(ImageError::Nothing(name.to_owned()));
        }
        Err(e) => return Err(read(e)),
    };
    if path.is_dir() {
        let users = UserLists {
            passwd: text(&path, "etc/passwd"),
            group: text(&path, "etc/group"),
        };
        return Ok(Image {
            root: Root::Directory(path),
            config: ImageConfig::default(),
            users,
        });
    }
    let mut head = Vec::new();
    let file = std::fs::File::open(&path).map_err(read)?;
    file.take(4096).read_to_end(&mut head).map_err(read)?;
    if head
        .get(EROFS_AT..)
        .is_some_and(|rest| rest.starts_with(&EROFS_MAGIC))
    {
        return Ok(Image {
            root: Root::Erofs(path),
            config: ImageConfig::default(),
            users: UserLists::default(),
        });
    }
    Err(ImageError::Kind(path))
}

/// Lists of users have this many bytes at most.
const LIST_MOST: u64 = 4 << 20;

/// A file of a root; links are followed within it. Empty if there is none.
fn text(root: &Path, path: &str) -> String {
    let open = || -> rustix::io::Result<std::fs::File> {
        let root = openat(CWD, root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(openat2(root, path, flags, Mode::empty(), how)?.into())
    };
    let mut bytes = Vec::new();
    if let Ok(file) = open() {
        let _ = file.take(LIST_MOST).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_and_erofs_files_are_images() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(at("root/etc")).unwrap();
        std::fs::write(at("real"), "not ours").unwrap();
        std::fs::write(at("root/etc/passwd"), "me:x:5:5::/:/bin/sh\n").unwrap();
        // A link of the image's must not lead out of it.
        std::os::unix::fs::symlink("../../real", at("root/etc/group")).unwrap();
        let image = open(at("root").to_str().unwrap()).unwrap();
        assert!(image.users.passwd.starts_with("me:") && image.users.group.is_empty());
        let mut erofs = vec![0; 2048];
        erofs[1024..1028].copy_from_slice(&EROFS_MAGIC);
        std::fs::write(at("x.erofs"), erofs).unwrap();
        assert!(matches!(
            open(at("x.erofs").to_str().unwrap()).unwrap().root,
            Root::Erofs(_)
        ));
        assert!(matches!(
            open(at("real").to_str().unwrap()),
            Err(ImageError::Kind(_))
        ));
        assert!(matches!(
            open("/no/such/thing"),
            Err(ImageError::Nothing(_))
        ));
    }
}
