//! Stream sockets between guest and host.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, getsockname};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_devices::{IoThread, VirtioModel, Vsock, VsockBackend, VsockHost};

use super::{BadDevice, DeviceError, DeviceSpec, HostContext, OpenDevice, Place};
use crate::options::{Options, OptionsError, parse};
use crate::seccomp::ThreadKind;
use crate::spec::Source;
use crate::unix_path::BoundSocket;

/// Addresses that guests can have; 0 to 2 are the hypervisor, the guest itself and the host.
const CIDS: std::ops::RangeInclusive<u32> = 3..=0xffff_fffe;
/// The most bytes of a unix socket's path.
const SUN_PATH: usize = 107;
/// Bytes of `_4294967295`, which follows it.
const SUFFIX: usize = 11;
/// Descriptors of everything but streams.
const OTHER_FILES: u64 = 512;
/// How long the host may take nothing before the guest's last bytes are given up.
const PATIENCE: Duration = Duration::from_secs(10);

/// Stream sockets between guest and host, over unix sockets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's address, 3 or more.
    pub cid: u32,
    /// Where host processes connect: a path that is bound, or `fd:N` for a listening unix stream
    /// socket. They write `CONNECT port` and a newline, and read `OK port` when the guest has answered.
    pub socket: Source,
    /// Where the guest's connections go: to this path with `_port` appended. Default: the path at which
    /// `socket` is bound.
    #[serde(default)]
    pub connect: Option<PathBuf>,
    /// Streams at a time, 1 to 1024; default: 1024.
    #[serde(default)]
    pub streams: Option<usize>,
    /// Its name; default: vsock.
    #[serde(default)]
    pub id: Option<String>,
}

impl VsockConfig {
    /// Reads `cid=N,socket=PATH|fd=N[,connect=PATH][,streams=N][,id=NAME]`.
    pub(crate) fn from_flag(argument: &str) -> Result<Self, OptionsError> {
        let options = Options::keys(argument);
        let (mut cid, mut socket) = (None, None);
        let (mut connect, mut streams, mut id) = (None, None, None);
        options.each("cid, socket, fd, connect, streams and id", |key, value| {
            match key {
                "cid" => cid = Some(parse(value)?),
                "socket" => socket = Some(parse(value)?),
                "fd" => {
                    let fd: u32 = parse(value)?;
                    socket = Some(parse(Some(&format!("fd:{fd}")))?);
                }
                "connect" => connect = Some(parse(value)?),
                "streams" => streams = Some(parse(value)?),
                "id" => id = Some(parse(value)?),
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        let (Some(cid), Some(socket)) = (cid, socket) else {
            let why = "write at least cid=N (3 or more) and socket=PATH or fd=N";
            return Err(options.bad_first(why));
        };
        Ok(Self {
            cid,
            socket,
            connect,
            streams,
            id,
        })
    }

    pub(super) fn check(&self) -> Result<VsockSpec, BadDevice> {
        let id = self.id.clone().unwrap_or_else(|| "vsock".to_owned());
        let bad = |why: String| Err(BadDevice::new(&id, why));
        if !CIDS.contains(&self.cid) {
            return bad(format!(
                "cid {} cannot be a guest's; write 3 to {}",
                self.cid,
                CIDS.end()
            ));
        }
        let streams = self.streams.unwrap_or(VsockBackend::STREAMS);
        if !(1..=VsockBackend::STREAMS).contains(&streams) {
            return bad(format!(
                "{streams} streams; write 1 to {}",
                VsockBackend::STREAMS
            ));
        }
        let paths = [self.socket.path(), self.connect.as_deref()];
        let most = SUN_PATH.saturating_sub(SUFFIX);
        let long = paths.into_iter().flatten().find(|p| bytes(p) > most);
        if let Some(path) = long {
            return bad(format!(
                "{} has {} bytes, and a unix socket's path with a port has room for {most}; choose a shorter one",
                path.display(),
                bytes(path)
            ));
        }
        Ok(VsockSpec {
            cid: self.cid,
            socket: self.socket.clone(),
            connect: self.connect.clone(),
            streams,
            id,
        })
    }
}

fn bytes(path: &Path) -> usize {
    path.as_os_str().len()
}

#[derive(Debug, Clone)]
pub(super) struct VsockSpec {
    cid: u32,
    socket: Source,
    connect: Option<PathBuf>,
    streams: usize,
    id: String,
}

/// The host's socket cannot be used.
#[derive(Debug, Error)]
enum ListenError {
    #[error("cannot listen at {}: is it in use, does its folder exist, may this user write there?", path.display())]
    Bind {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(
        "{0} is not a listening unix stream socket; bind it and call listen(2) before handing it over"
    )]
    Kind(Source),
}

impl VsockSpec {
    fn listen(
        &self,
    ) -> Result<(OwnedFd, Option<BoundSocket>), Box<dyn std::error::Error + Send + Sync>> {
        match &self.socket {
            Source::Path(path) => {
                let bound = BoundSocket::bind(path).map_err(|source| ListenError::Bind {
                    path: path.clone(),
                    source,
                })?;
                Ok((bound.listener().try_clone()?.into(), Some(bound)))
            }
            Source::Fd(_) => {
                let fd = OwnedFd::from(self.socket.open("vsock socket")?);
                let listens = matches!(socket_domain(&fd), Ok(AddressFamily::UNIX))
                    && matches!(socket_type(&fd), Ok(SocketType::STREAM))
                    && matches!(socket_acceptconn(&fd), Ok(true));
                if !listens {
                    return Err(ListenError::Kind(self.socket.clone()).into());
                }
                rustix::io::ioctl_fionbio(&fd, true)?;
                Ok((fd, None))
            }
        }
    }

    fn base(&self, listener: &OwnedFd) -> Option<PathBuf> {
        if let Some(path) = &self.connect {
            return Some(path.clone());
        }
        let address = SocketAddrUnix::try_from(getsockname(listener.as_fd()).ok()?).ok()?;
        let path = address.path()?.into_owned().into_string().ok()?;
        let fits = path.len() <= SUN_PATH.saturating_sub(SUFFIX);
        // A relative one is relative to whoever bound it.
        let known = self.socket.path().is_some() || path.starts_with('/');
        (fits && known).then(|| path.into())
    }
}

impl DeviceSpec for VsockSpec {
    fn kind(&self) -> &'static str {
        "virtio-vsock"
    }
    fn id(&self) -> &str {
        &self.id
    }
    fn sources(&self) -> Vec<&Source> {
        vec![&self.socket]
    }
    fn open(&self, host: &HostContext) -> Result<Box<dyn OpenDevice>, DeviceError> {
        let (listener, bound) = self.listen().map_err(|e| DeviceError::new(self, e))?;
        let base = self.base(&listener);
        allow_files(self.streams);
        let error = |e| DeviceError::new(self, e);
        let thread = host
            .thread("vsock", ThreadKind::VSOCK)
            .map_err(|e| DeviceError::new(self, e))?;
        let host = VsockHost { listener, base };
        let backend = VsockBackend::new(host, self.streams, &thread.handle()).map_err(error)?;
        Ok(Box::new(OpenVsock {
            cid: self.cid,
            backend,
            bound: Mutex::new(bound),
            _thread: thread,
        }))
    }
}

/// Each stream is a descriptor, and shells allow few.
fn allow_files(streams: usize) {
    let wanted = u64::try_from(streams)
        .unwrap_or(u64::MAX)
        .saturating_add(OTHER_FILES);
    let limit = getrlimit(Resource::Nofile);
    let enough = |limit: Option<u64>, wanted| limit.is_none_or(|limit| limit >= wanted);
    if enough(limit.current, wanted) {
        return;
    }
    let current = limit.maximum.map_or(wanted, |most| most.min(wanted));
    let raised = Rlimit {
        current: Some(current),
        maximum: limit.maximum,
    };
    if let Err(e) = setrlimit(Resource::Nofile, raised) {
        log::warn!("the limit of open files stays at {:?}: {e}", limit.current);
    } else if current < wanted {
        log::warn!("{current} open files at most: fewer than {streams} streams will be possible");
    }
}

struct OpenVsock {
    cid: u32,
    // Before the thread it is served in.
    backend: VsockBackend,
    bound: Mutex<Option<BoundSocket>>,
    _thread: IoThread,
}

impl OpenDevice for OpenVsock {
    fn model(&self, _place: &Place<'_>) -> Result<Box<dyn VirtioModel>, DeviceError> {
        Ok(Box::new(Vsock::new(self.cid, self.backend.clone())))
    }

    fn end(&self) {
        let lost = self.backend.drain(PATIENCE);
        if lost > 0 {
            log::warn!("vsock: a reader on the host does not read: {lost} bytes are lost");
        }
        let bound = self.bound.lock();
        drop(
            bound
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .take(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_and_json_say_the_same() {
        let flag = VsockConfig::from_flag("cid=5,socket=/run/v,streams=9,connect=/run/w").unwrap();
        let json = r#"{"cid":5,"socket":"/run/v","streams":9,"connect":"/run/w"}"#;
        assert_eq!(flag, serde_json::from_str(json).unwrap());
        let flag = VsockConfig::from_flag("fd=7,cid=3,id=agent").unwrap();
        assert_eq!(flag.socket, Source::Fd(7));
        assert_eq!(flag.check().unwrap().id, "agent");
    }

    #[test]
    fn wrong_words_are_one_clear_line() {
        for (argument, says) in [
            ("cid=3", "write at least cid=N"),
            ("socket=/run/v", "write at least cid=N"),
            ("cid=x,socket=/v", "invalid digit"),
            ("cid=3,socket=/v,port=1", "`port`"),
            ("cid=3,fd=1", "not a descriptor"),
        ] {
            let error = VsockConfig::from_flag(argument).unwrap_err().to_string();
            assert!(error.contains(says), "{argument}: {error}");
        }
        let long = format!("cid=3,socket=/{}", "x".repeat(96));
        for (argument, says) in [
            ("cid=2,socket=/v", "cid 2 cannot be a guest's"),
            ("cid=4294967295,socket=/v", "cannot be a guest's"),
            ("cid=3,socket=/v,streams=0", "0 streams; write 1 to 1024"),
            (&long, "choose a shorter one"),
        ] {
            let config = VsockConfig::from_flag(argument).unwrap();
            let error = config.check().unwrap_err().to_string();
            assert!(error.contains(says), "{argument}: {error}");
        }
    }

    #[test]
    fn a_listening_socket_may_be_handed_over() {
        use std::os::unix::net::UnixListener;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let listener: OwnedFd = UnixListener::bind(&path).unwrap().into();
        let spec = VsockConfig::from_flag("cid=3,fd=9")
            .unwrap()
            .check()
            .unwrap();
        assert_eq!(spec.base(&listener), Some(path));
        let named = VsockConfig::from_flag("cid=3,fd=9,connect=/run/w").unwrap();
        let base = named.check().unwrap().base(&listener);
        assert_eq!(base, Some("/run/w".into()));
    }
}
