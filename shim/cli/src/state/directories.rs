//! Where things are kept.

use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::config::Config;

/// A directory cannot be used.
#[derive(Debug, Error)]
pub enum DirectoriesError {
    /// Not made.
    #[error("cannot make {}; name another with {key} in the configuration", path.display())]
    Make {
        /// The directory.
        path: PathBuf,
        /// The key that names it.
        key: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// Somebody else's, so what is in it cannot be trusted.
    #[error("{} belongs to user {owner}; remove it, or name another with {key} in the configuration", path.display())]
    Stranger {
        /// The directory.
        path: PathBuf,
        /// The key that names it.
        key: &'static str,
        /// Whose it is.
        owner: u32,
    },
    /// Sockets in it would have names that are too long.
    #[error("{} is too long for sockets in it; name one of at most {most} bytes with state.runtime in the configuration", path.display())]
    Long {
        /// The directory.
        path: PathBuf,
        /// Bytes.
        most: usize,
    },
}

/// The two directories, which exist.
#[derive(Debug, Clone)]
pub struct Directories {
    state: PathBuf,
    runtime: PathBuf,
}

/// 107 bytes in all, of which `/`, twelve digits, `/`, `vsock` and `_4294967295` come later.
const RUNTIME_MOST: usize = 76;

impl Directories {
    /// Those that the configuration names, made if they are missing.
    pub fn open(config: &Config) -> Result<Self, DirectoriesError> {
        let uid = rustix::process::geteuid();
        let home = || {
            std::env::var_os("HOME")
                .map(PathBuf::from)
                .filter(|home| home.is_absolute())
        };
        let xdg = |name: &str| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let state = config.state_directory.clone().unwrap_or_else(|| {
            if uid.is_root() {
                return "/var/lib/testudo".into();
            }
            let base =
                xdg("XDG_STATE_HOME").or_else(|| home().map(|home| home.join(".local/state")));
            base.unwrap_or_else(|| format!("/tmp/testudo-state-{}", uid.as_raw()).into())
                .join("testudo")
        });
        let runtime = config.state_runtime.clone().unwrap_or_else(|| {
            if uid.is_root() {
                return "/run/testudo".into();
            }
            match xdg("XDG_RUNTIME_DIR") {
                Some(base) => base.join("testudo"),
                None => format!("/tmp/testudo-{}", uid.as_raw()).into(),
            }
        });
        own(&state, "state.directory")?;
        own(&state.join("pods"), "state.directory")?;
        own(&runtime, "state.runtime")?;
        if runtime.as_os_str().len() > RUNTIME_MOST {
            return Err(DirectoriesError::Long {
                path: runtime,
                most: RUNTIME_MOST,
            });
        }
        Ok(Self { state, runtime })
    }

    /// Directories that are known to exist.
    pub fn at(state: PathBuf, runtime: PathBuf) -> Self {
        Self { state, runtime }
    }

    /// The state directory.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// The runtime directory.
    pub fn runtime(&self) -> &Path {
        &self.runtime
    }

    /// Where pods are.
    pub fn pods(&self) -> PathBuf {
        self.state.join("pods")
    }

    /// A pod's folder.
    pub fn pod(&self, id: &str) -> PathBuf {
        self.pods().join(id)
    }

    /// A pod's sockets.
    pub fn sockets(&self, id: &str) -> PathBuf {
        self.runtime.join(id)
    }

    /// A named volume.
    pub fn volume(&self, name: &str) -> PathBuf {
        self.state.join("volumes").join(name)
    }
}

fn own(path: &Path, key: &'static str) -> Result<(), DirectoriesError> {
    let make = |source| DirectoriesError::Make {
        path: path.to_owned(),
        key,
        source,
    };
    let mut builder = std::fs::DirBuilder::new();
    builder
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(make)?;
    let owner = std::fs::symlink_metadata(path).map_err(make)?.uid();
    if owner != rustix::process::geteuid().as_raw() {
        return Err(DirectoriesError::Stranger {
            path: path.to_owned(),
            key,
            owner,
        });
    }
    Ok(())
}
