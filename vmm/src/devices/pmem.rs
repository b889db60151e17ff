//! Files that the guest reaches as memory.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::sync::{Arc, OnceLock};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use testudo_memory::HostWindow;
use thiserror::Error;
use virtio_devices::{BackingError, IoThread, Pmem, PmemRegion, VirtioModel, lock_file};

use super::{DeviceError, DeviceSpec, HostContext, OpenDevice, Place, Space};
use crate::options::{Options, OptionsError, parse, switch};
use crate::seccomp::ThreadKind;
use crate::spec::{ByteSize, Source};

/// The granule of the guest's memory: what a huge page holds, and what Linux maps its page structs by.
const GRANULE: u64 = 2 << 20;
/// What the host maps files by.
const PAGE: u64 = 4096;
/// No file is larger than the address space that a guest may have.
const LARGEST: u64 = 1 << 43;
const WHAT: &str = "pmem file";

/// A file that the guest reaches as memory: a disk without a block layer, whose pages are the host's
/// page cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PmemConfig {
    /// A regular file or a block device, or `fd:N`.
    pub path: Source,
    /// The guest cannot change it.
    #[serde(default)]
    pub readonly: bool,
    /// Its name; default: `pmem0`, `pmem1`, … in the order of the list.
    #[serde(default)]
    pub id: Option<String>,
}

impl PmemConfig {
    /// Reads `path=FILE|fd=N[,ro][,id=NAME]`.
    pub(crate) fn from_flag(argument: &str) -> Result<Self, OptionsError> {
        let options = Options::keys(argument);
        let (mut path, mut readonly, mut id) = (None, false, None);
        options.each("path, fd, ro and id", |key, value| {
            match key {
                "path" => path = Some(parse(value)?),
                "fd" => {
                    let number: String = parse(value)?;
                    path = Some(parse(Some(&format!("fd:{number}")))?);
                }
                "ro" => readonly = switch(value)?,
                "id" => id = Some(parse(value)?),
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        Ok(Self {
            path: path.ok_or_else(|| options.bad_first("name a file: path=FILE or fd=N"))?,
            readonly,
            id,
        })
    }

    pub(super) fn check(&self, index: usize) -> PmemSpec {
        PmemSpec {
            source: self.path.clone(),
            readonly: self.readonly,
            id: self.id.clone().unwrap_or_else(|| format!("pmem{index}")),
            bytes: Arc::default(),
        }
    }
}

/// The file will not do.
#[derive(Debug, Error)]
enum PmemError {
    #[error("{WHAT} {0} is neither a regular file nor a block device")]
    Kind(Source),
    #[error("{WHAT} {0} is empty; give it a size first, for example with truncate -s 1G")]
    Empty(Source),
    #[error("{WHAT} {name} has {size}, more than {}", ByteSize(LARGEST))]
    TooLarge { name: Source, size: ByteSize },
    #[error("cannot ask for the size of {WHAT} {name}")]
    Size {
        name: Source,
        #[source]
        source: io::Error,
    },
    #[error(
        "{WHAT} {name} is in use by another process{}",
        if *.readonly { ", which writes to it" } else { "; end it, or share the file read-only in all of them" }
    )]
    Busy { name: Source, readonly: bool },
    #[error("cannot map {WHAT} {name}")]
    Map {
        name: Source,
        #[source]
        source: io::Error,
    },
}

#[derive(Debug, Clone)]
pub(super) struct PmemSpec {
    source: Source,
    readonly: bool,
    id: String,
    /// The size of the file as it was when it was opened: the plan is made for the same.
    bytes: Arc<OnceLock<u64>>,
}

impl PmemSpec {
    fn length(&self, file: &mut File) -> Result<u64, PmemError> {
        let name = || self.source.clone();
        let failed = |source| PmemError::Size {
            name: name(),
            source,
        };
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(PmemError::Kind(name()));
        }
        match file.seek(SeekFrom::End(0)).map_err(failed)? {
            0 => Err(PmemError::Empty(name())),
            bytes if bytes > LARGEST => Err(PmemError::TooLarge {
                name: name(),
                size: ByteSize(bytes),
            }),
            bytes => Ok(bytes),
        }
    }

    /// The file's size before it is opened for good: for a plan that is only looked at.
    fn look(&self) -> Result<u64, DeviceError> {
        let source = match &self.source {
            Source::Path(_) => self.source.clone(),
            // Opened anew, so that the descriptor stays whoever's it is.
            Source::Fd(fd) => Source::Path(format!("/proc/self/fd/{fd}").into()),
        };
        let mut file = source.open(WHAT).map_err(|e| DeviceError::new(self, e))?;
        self.length(&mut file)
            .map_err(|e| DeviceError::new(self, e))
    }

    /// The window with the file in it: read-only, or with room beyond the file's end that takes
    /// writes, so that the guest finds memory wherever it was told of some.
    fn window(&self, file: &File, bytes: u64) -> io::Result<HostWindow> {
        let size = bytes.next_multiple_of(GRANULE);
        let mapped = bytes.next_multiple_of(PAGE);
        let window = HostWindow::reserve(size)?;
        window.map_file(0, mapped, file, 0, !self.readonly)?;
        if mapped < size && !self.readonly {
            window.map_scratch(mapped, size.saturating_sub(mapped))?;
        }
        Ok(window)
    }

    /// At most 15 bytes, which is what the kernel keeps.
    fn thread_name(&self) -> String {
        let id = &self.id;
        let name = match id.strip_prefix("pmem") {
            Some(_) => id.clone(),
            None => format!("pmem-{id}"),
        };
        name.chars().take(15).collect()
    }
}

impl DeviceSpec for PmemSpec {
    fn kind(&self) -> &'static str {
        "virtio-pmem"
    }

    fn id(&self) -> &str {
        &self.id
    }

    fn sources(&self) -> Vec<&Source> {
        vec![&self.source]
    }

    fn space(&self) -> Result<Space, DeviceError> {
        let bytes = match self.bytes.get() {
            Some(bytes) => *bytes,
            None => self.look()?,
        };
        Ok(Space {
            guest_memory: bytes.next_multiple_of(GRANULE),
            alignment: GRANULE,
            ..Space::default()
        })
    }

    fn open(&self, host: &HostContext) -> Result<Box<dyn OpenDevice>, DeviceError> {
        let opened = if self.readonly {
            self.source.open(WHAT)
        } else {
            self.source.open_writable(WHAT)
        };
        let mut file = opened.map_err(|e| DeviceError::new(self, e))?;
        let error = |e| DeviceError::new(self, e);
        let bytes = self.length(&mut file).map_err(error)?;
        let bytes = *self.bytes.get_or_init(|| bytes);
        // The lock of a disk: a file is one or the other.
        match lock_file(&file, self.readonly) {
            Ok(()) => {}
            Err(BackingError::Busy) => {
                return Err(error(PmemError::Busy {
                    name: self.source.clone(),
                    readonly: self.readonly,
                }));
            }
            Err(e) => log::warn!("{WHAT} {} is not locked: {e}", self.source),
        }
        let window = self.window(&file, bytes).map_err(|source| {
            error(PmemError::Map {
                name: self.source.clone(),
                source,
            })
        })?;
        // Nothing is flushed of a file that nobody writes: `io` answers as well.
        let thread = match self.readonly {
            true => None,
            false => Some(
                host.thread(&self.thread_name(), ThreadKind::PMEM)
                    .map_err(|e| DeviceError::new(self, e))?,
            ),
        };
        Ok(Box::new(OpenPmem {
            spec: self.clone(),
            file,
            window: Arc::new(window),
            thread,
        }))
    }
}

struct OpenPmem {
    spec: PmemSpec,
    /// Holds the lock as well.
    file: File,
    window: Arc<HostWindow>,
    thread: Option<IoThread>,
}

impl OpenDevice for OpenPmem {
    fn model(&self, place: &Place<'_>) -> Result<Box<dyn VirtioModel>, DeviceError> {
        let error = |e: io::Error| DeviceError::new(&self.spec, e);
        let at = place
            .memory
            .ok_or_else(|| error(io::Error::other("the plan has no place for its memory")))?;
        let readonly = self.spec.readonly;
        let shown = place.windows.show(at.base(), &self.window, readonly);
        let region = PmemRegion {
            start: at.base(),
            size: self.window.len(),
            shown: shown.map_err(error)?,
        };
        let flushed = match self.thread {
            Some(_) => Some(self.file.try_clone().map_err(error)?),
            None => None,
        };
        let io = self
            .thread
            .as_ref()
            .map_or(place.io.clone(), IoThread::handle);
        Ok(Box::new(Pmem::new(region, flushed, io)))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::letters::Letters;
    use crate::spec::Seccomp;

    fn host() -> HostContext {
        HostContext {
            seccomp: Seccomp::Off,
            letters: Letters::new().unwrap(),
        }
    }

    fn spec(flag: &str) -> PmemSpec {
        PmemConfig::from_flag(flag).unwrap().check(0)
    }

    fn refused(spec: &PmemSpec) -> String {
        let error = spec.open(&host()).err().expect("it was opened");
        format!("{:#}", anyhow::Error::from(error))
    }

    #[test]
    fn flags_read() {
        let one = PmemConfig::from_flag("path=/x,ro,id=root").unwrap();
        assert_eq!(
            (one.path, one.readonly, one.id.as_deref()),
            (Source::Path("/x".into()), true, Some("root"))
        );
        assert_eq!(spec("fd=9").source, Source::Fd(9));
        assert_eq!(spec("fd=9").id, "pmem0");
        for (flag, says) in [
            ("ro", "name a file"),
            ("fd=x", "`fd:x` is not a descriptor"),
            (
                "path=/x,size=1G",
                "`size` in `path=/x,size=1G` is not known",
            ),
            ("path", "a value is missing"),
        ] {
            let error = PmemConfig::from_flag(flag).unwrap_err().to_string();
            assert!(error.contains(says), "{flag}: {error}");
        }
    }

    #[test]
    fn the_room_is_the_file_rounded_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let spec = spec(&format!("path={}", path.display()));
        assert!(spec.space().is_err(), "there is no file yet");
        let mut file = File::create(&path).unwrap();
        file.write_all(&[7; 5000]).unwrap();
        let space = spec.space().unwrap();
        assert_eq!((space.guest_memory, space.alignment), (GRANULE, GRANULE));
        file.set_len((2 << 20) + 1).unwrap();
        assert_eq!(spec.space().unwrap().guest_memory, 2 * GRANULE);
        let _open = spec.open(&host()).unwrap();
        file.set_len(64 << 20).unwrap();
        let planned = spec.space().unwrap().guest_memory;
        assert_eq!(planned, 2 * GRANULE, "what was mapped is planned for");
    }

    #[test]
    fn files_that_will_not_do_are_refused_in_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let flag = format!("path={}", path.display());
        assert!(refused(&spec(&flag)).contains("cannot open pmem file"));
        File::create(&path).unwrap();
        assert!(refused(&spec(&flag)).contains("is empty; give it a size"));
        assert!(refused(&spec("path=/")).contains("pmem"));
        assert!(refused(&spec("path=/dev/null")).contains("neither a regular file nor"));
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(4096).unwrap();
        let held = spec(&flag).open(&host()).unwrap();
        assert!(refused(&spec(&flag)).contains("in use by another process; end it"));
        let readonly = format!("{flag},ro");
        assert!(refused(&spec(&readonly)).contains("which writes to it"));
        drop(held);
        let _one = spec(&readonly).open(&host()).unwrap();
        let _two = spec(&readonly).open(&host()).unwrap();
        assert!(refused(&spec(&flag)).contains("in use"));
        file.set_len(LARGEST + 1).unwrap();
        assert!(refused(&spec(&readonly)).contains("more than 8T"));
    }

    #[test]
    fn threads_are_named_after_their_device() {
        assert_eq!(spec("path=/x").thread_name(), "pmem0");
        assert_eq!(spec("path=/x,id=root").thread_name(), "pmem-root");
        let long = spec("path=/x,id=a-very-long-name").thread_name();
        assert_eq!(long, "pmem-a-very-lon");
    }
}
