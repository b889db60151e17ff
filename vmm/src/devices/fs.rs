//! Folders shared with the guest.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use testudo_memory::HostWindow;
use thiserror::Error;
use virtio_devices::{
    Caching, Export, ExportError, Fs, FsOptions, IoThread, Mender, SpawnError, VirtioModel,
};

use super::{BadDevice, DeviceError, DeviceSpec, HostContext, OpenDevice, Place, Space};
use crate::options::{Options, OptionsError, parse, switch};
use crate::seccomp::ThreadKind;
use crate::spec::{ByteSize, Source, SourceError, inherited};

/// Bytes of a tag (virtio 1.2 §5.11.4).
const MAX_TAG: usize = 36;
/// Request queues a folder may have.
const MAX_QUEUES: u16 = 64;
/// The smallest DAX window, and the largest.
const WINDOW: std::ops::RangeInclusive<u64> = 2 << 20..=1 << 40;
/// Descriptors that are left to everything else in the process.
const OTHERS: u64 = 256;
/// The most descriptors that exports hold in all.
const DESCRIPTORS_MAX: u64 = 2 << 20;

/// A folder that is shared with the guest, which mounts it by its tag:
/// `mount -t virtiofs TAG /mnt`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// The name the guest mounts it by, 1 to 36 bytes.
    pub tag: String,
    /// The folder, or `fd:N`.
    pub path: Source,
    /// Its name here; default: fs0, fs1, … by its place in the list.
    #[serde(default)]
    pub id: Option<String>,
    /// The guest may only read.
    #[serde(default)]
    pub readonly: bool,
    /// What the guest may keep in mind.
    #[serde(default)]
    pub cache: CachingConfig,
    /// Writes may stay in the guest's page cache for a while.
    #[serde(default)]
    pub writeback: bool,
    /// Bytes of a window through which the guest maps files without a copy in its page cache
    /// (mount option `dax`): a power of two, at least 2 MiB.
    #[serde(default)]
    pub dax: Option<ByteSize>,
    /// Request queues, 1 to 64, each with a thread of its own.
    #[serde(default = "one")]
    pub queues: u16,
    /// Pass extended attributes on.
    #[serde(default = "yes")]
    pub xattr: bool,
    /// Pass POSIX ACLs on and let the guest heed them.
    #[serde(default)]
    pub acl: bool,
}

fn one() -> u16 {
    1
}

fn yes() -> bool {
    true
}

/// What a guest may keep in mind of a shared folder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CachingConfig {
    /// Nothing.
    None,
    /// Names and attributes for a second, data until a file is opened again and has changed.
    #[default]
    Auto,
    /// Everything: only the guest changes the folder.
    Always,
}

impl std::str::FromStr for CachingConfig {
    type Err = &'static str;
    fn from_str(word: &str) -> Result<Self, Self::Err> {
        match word {
            "none" => Ok(Self::None),
            "auto" => Ok(Self::Auto),
            "always" => Ok(Self::Always),
            _ => Err("write none, auto or always"),
        }
    }
}

impl FsConfig {
    /// Reads `tag=TAG,path=FOLDER,ro,…`.
    pub(crate) fn from_flag(argument: &str) -> Result<Self, OptionsError> {
        let options = Options::keys(argument);
        let known = "tag, path, fd, ro, cache, writeback, dax, queues, id, xattr and acl";
        let (mut tag, mut path) = (None, None);
        let mut fs = Self {
            tag: String::new(),
            path: Source::Path(std::path::PathBuf::new()),
            id: None,
            readonly: false,
            cache: CachingConfig::default(),
            writeback: false,
            dax: None,
            queues: one(),
            xattr: yes(),
            acl: false,
        };
        options.each(known, |key, value| {
            match key {
                "path" | "fd" if path.is_some() => {
                    return Err("one tag is one folder; repeat --fs for more".to_owned());
                }
                "tag" => tag = Some(parse(value)?),
                "path" => path = Some(parse(value)?),
                "fd" => path = Some(parse(value.map(|n| format!("fd:{n}")).as_deref())?),
                "ro" => fs.readonly = switch(value)?,
                "cache" => fs.cache = parse(value)?,
                "writeback" => fs.writeback = switch(value)?,
                "dax" => fs.dax = Some(parse(value)?),
                "queues" => fs.queues = parse(value)?,
                "id" => fs.id = Some(parse(value)?),
                "xattr" => fs.xattr = switch(value)?,
                "acl" => fs.acl = switch(value)?,
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        fs.tag = tag.ok_or_else(|| options.bad_first("say what the guest mounts: tag=NAME"))?;
        fs.path = path.ok_or_else(|| options.bad_first("name the folder: path=FOLDER"))?;
        Ok(fs)
    }

    fn check(&self, number: usize, share: usize) -> Result<FsSpec, BadDevice> {
        let id = self.id.clone().unwrap_or_else(|| format!("fs{number}"));
        let bad = |why: String| Err(BadDevice::new(&id, why));
        if self.tag.is_empty() || self.tag.len() > MAX_TAG || self.tag.contains('\0') {
            return bad(format!("a tag has 1 to {MAX_TAG} bytes"));
        }
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return bad(format!("a folder has 1 to {MAX_QUEUES} queues"));
        }
        let window = self.dax.map(|size| size.0);
        if window.is_some_and(|size| !size.is_power_of_two() || !WINDOW.contains(&size)) {
            return bad("a DAX window is a power of two of bytes, from 2M to 1T".to_owned());
        }
        let useless = |what: &str, because: &str| {
            bad(format!(
                "{what} has no effect {because}; remove one of them"
            ))
        };
        if self.writeback && self.readonly {
            return useless("writeback", "on a folder that is only read");
        }
        if self.writeback && self.cache == CachingConfig::None {
            return useless("writeback", "with cache=none");
        }
        if self.acl && !self.xattr {
            return useless("acl", "without extended attributes");
        }
        Ok(FsSpec {
            id,
            path: self.path.clone(),
            window: window.unwrap_or(0),
            queues: self.queues,
            share,
            options: FsOptions {
                tag: self.tag.clone(),
                readonly: self.readonly,
                caching: match self.cache {
                    CachingConfig::None => Caching::None,
                    CachingConfig::Auto => Caching::Auto,
                    CachingConfig::Always => Caching::Always,
                },
                writeback: self.writeback,
                xattr: self.xattr,
                acl: self.acl,
                descriptors: 0,
            },
        })
    }

    /// Checks all of them; each tag is one folder's.
    pub(super) fn check_all(all: &[Self]) -> Result<Vec<FsSpec>, BadDevice> {
        let mut tags = BTreeSet::new();
        let check = |(number, one): (usize, &Self)| {
            let spec = one.check(number, all.len())?;
            if !tags.insert(one.tag.clone()) {
                let why = format!("another folder has the tag {}; give each its own", one.tag);
                return Err(BadDevice::new(&spec.id, why));
            }
            Ok(spec)
        };
        all.iter().enumerate().map(check).collect()
    }
}

#[derive(Debug, Clone)]
pub(super) struct FsSpec {
    id: String,
    path: Source,
    /// Bytes; 0 is none.
    window: u64,
    queues: u16,
    /// How many folders share the process's descriptors.
    share: usize,
    options: FsOptions,
}

/// A folder cannot be shared.
#[derive(Debug, Error)]
enum OpenError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("folder {path}")]
    Export {
        path: Source,
        #[source]
        source: ExportError,
    },
    #[error("the limit of open files cannot be raised")]
    Limit(#[source] std::io::Error),
    #[error("this process may have {limit} open files, too few to share folders; raise ulimit -n")]
    Few { limit: u64 },
    #[error(transparent)]
    Thread(#[from] SpawnError),
}

impl FsSpec {
    fn directory(&self) -> Result<OwnedFd, SourceError> {
        let what = "folder";
        match &self.path {
            Source::Fd(fd) => inherited(*fd).ok_or(SourceError::Closed { what, fd: *fd }),
            Source::Path(path) => {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                rustix::fs::open(path, flags, Mode::empty()).map_err(|e| SourceError::Open {
                    what,
                    path: path.clone(),
                    source: e.into(),
                })
            }
        }
    }

    /// Raises the limit of open files as far as it goes; this folder's share of them. A guest that
    /// walks a tree of files makes one known after the other.
    fn descriptors(&self) -> Result<usize, OpenError> {
        let limit = getrlimit(Resource::Nofile);
        if limit.current != limit.maximum {
            let current = limit.maximum;
            let raised = Rlimit { current, ..limit };
            setrlimit(Resource::Nofile, raised).map_err(|e| OpenError::Limit(e.into()))?;
        }
        let all = limit
            .maximum
            .unwrap_or(DESCRIPTORS_MAX)
            .min(DESCRIPTORS_MAX);
        let share = u64::try_from(self.share.max(1)).unwrap_or(u64::MAX);
        let mine = all.saturating_sub(OTHERS).checked_div(share).unwrap_or(0);
        if mine < OTHERS {
            return Err(OpenError::Few { limit: all });
        }
        Ok(usize::try_from(mine).unwrap_or(usize::MAX))
    }

    /// As `top` shows it: 15 bytes.
    fn thread_name(&self, number: u16) -> String {
        let tag: String = self
            .options
            .tag
            .chars()
            .filter(|c| !c.is_control())
            .collect();
        let tag: String = tag.chars().take(8).collect();
        match number {
            0 => format!("fs-{tag}"),
            _ => format!("fs-{tag}-{number}"),
        }
    }

    fn open_all(&self, host: &HostContext) -> Result<OpenFs, OpenError> {
        let directory = self.directory()?;
        let export = Export::new(&directory).map_err(|source| OpenError::Export {
            path: self.path.clone(),
            source,
        })?;
        let mut spec = self.clone();
        spec.options.descriptors = self.descriptors()?;
        let threads = (0..self.queues)
            .map(|number| {
                host.prepared_thread(
                    &self.thread_name(number),
                    ThreadKind::FS,
                    Fs::prepare_thread,
                )
            })
            .collect::<Result<_, _>>()?;
        Ok(OpenFs {
            spec,
            export: Arc::new(export),
            threads,
            mender: Mutex::default(),
        })
    }
}

impl DeviceSpec for FsSpec {
    fn kind(&self) -> &'static str {
        "virtio-fs"
    }
    fn id(&self) -> &str {
        &self.id
    }
    fn sources(&self) -> Vec<&Source> {
        vec![&self.path]
    }
    fn space(&self) -> Result<Space, DeviceError> {
        Ok(Space {
            shared_memory: self.window,
            ..Space::default()
        })
    }
    fn open(&self, host: &HostContext) -> Result<Box<dyn OpenDevice>, DeviceError> {
        let open = self.open_all(host);
        Ok(Box::new(open.map_err(|e| DeviceError::new(self, e))?))
    }
}

struct OpenFs {
    spec: FsSpec,
    export: Arc<Export>,
    threads: Vec<IoThread>,
    /// Of the model that was made last.
    mender: Mutex<Option<Mender>>,
}

impl OpenDevice for OpenFs {
    fn model(&self, _place: &Place<'_>) -> Result<Box<dyn VirtioModel>, DeviceError> {
        let window = match self.spec.window {
            0 => None,
            size => {
                let window = HostWindow::reserve(size);
                Some(Arc::new(
                    window.map_err(|e| DeviceError::new(&self.spec, e))?,
                ))
            }
        };
        let threads = self.threads.iter().map(IoThread::handle).collect();
        let options = self.spec.options.clone();
        let fs = Fs::new(Arc::clone(&self.export), options, window, threads);
        let fs = fs.map_err(|e| DeviceError::new(&self.spec, e))?;
        *self.mender.lock().unwrap_or_else(PoisonError::into_inner) = Some(fs.mender());
        Ok(Box::new(fs))
    }

    fn mend(&self) -> u64 {
        let mender = self.mender.lock().unwrap_or_else(PoisonError::into_inner);
        mender.as_ref().map_or(0, Mender::mend)
    }
}
