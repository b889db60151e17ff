//! What a network device takes of the host: queues of a tap, `/dev/vhost-net`, an address.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use rustix::net::sockopt::socket_type;
use rustix::net::{SocketType, getpeername};
use rustix::rand::{GetRandomFlags, getrandom};
use thiserror::Error;
use virtio_devices::{VhostError, VhostNet, Wire, WireError, attach_tap};

use super::{NetSpec, WireSpec};
use crate::spec::{Source, SourceError};

const TUN: &str = "/dev/net/tun";
const VHOST: &str = "/dev/vhost-net";

/// The host does not give what a network device needs.
#[derive(Debug, Error)]
pub(super) enum OpenError {
    #[error("cannot open {TUN}; load the module tun, or hand the tap over by fd=N")]
    Tun(#[source] io::Error),
    #[error(
        "there is no tap {name}, and this process may not make one; make it: ip tuntap add {name} mode tap vnet_hdr user $USER"
    )]
    Absent { name: String },
    #[error(
        "tap {name} is not this user's; give it to the user: ip tuntap add {name} mode tap user $USER"
    )]
    NotOurs { name: String },
    #[error("tap {name} is in use by another process")]
    Busy { name: String },
    #[error(
        "interface {name} is not a tap with {pairs} queues; make it: ip tuntap add {name} mode tap{}", if *.pairs > 1 { " multi_queue" } else { "" }
    )]
    Unfit { name: String, pairs: u16 },
    #[error("tap {name}")]
    Attach {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("tap {name}: {what}")]
    Setting {
        name: String,
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("{wire}")]
    Wire {
        wire: String,
        #[source]
        source: WireError,
    },
    #[error("{first} and {other} are descriptors of two taps, {first_name} and {other_name}")]
    TwoTaps {
        first: Source,
        first_name: String,
        other: Source,
        other_name: String,
    },
    #[error("{wire} is a tap with one queue; for several queue pairs open it with IFF_MULTI_QUEUE")]
    OneQueue { wire: Source },
    #[error(
        "cannot open {VHOST}; load the module vhost_net, hand it over by vhostfd=N, or leave vhost out"
    )]
    VhostAbsent(#[source] io::Error),
    #[error(transparent)]
    Vhost(#[from] VhostError),
    #[error(
        "cannot connect to {}: does somebody listen there (passt --socket {}), may this user connect?", path.display(), path.display()
    )]
    Connect {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{0} is not a connected stream socket")]
    NotAStream(Source),
    #[error("{socket} cannot be made non-blocking")]
    Blocking {
        socket: Source,
        #[source]
        source: io::Error,
    },
    #[error("no random address")]
    Random(#[source] io::Error),
}

/// What was opened.
pub(super) struct Opened {
    pub(super) wires: Vec<Wire>,
    pub(super) vhost: Vec<VhostNet>,
    pub(super) mac: [u8; 6],
    pub(super) mtu: Option<u16>,
}

pub(super) fn open(spec: &NetSpec) -> Result<Opened, OpenError> {
    let (wires, own_mtu) = match &spec.wire {
        WireSpec::Tap { name, pairs } => open_tap(name, *pairs, spec.mtu)?,
        WireSpec::Fds(fds) => (take_taps(fds)?, None),
        WireSpec::Stream(socket) => (vec![open_stream(socket)?], None),
    };
    let mac = match spec.mac {
        Some(mac) => mac.0,
        None => random_mac()?,
    };
    Ok(Opened {
        wires,
        vhost: open_vhost(spec)?,
        mac,
        mtu: spec.mtu.or(own_mtu),
    })
}

/// All queues of the tap `name`, and its MTU.
fn open_tap(
    name: &str,
    pairs: u16,
    mtu: Option<u16>,
) -> Result<(Vec<Wire>, Option<u16>), OpenError> {
    let there = interface(name).is_some();
    let mut wires = Vec::new();
    for pair in 0..pairs {
        let fd = open_queue(name, pairs).map_err(|e| refused(name, pairs, there || pair > 0, e))?;
        wires.push(Wire::tap(fd).map_err(|source| OpenError::Wire {
            wire: format!("tap {name}"),
            source,
        })?);
    }
    let setting = |what| {
        move |source| OpenError::Setting {
            name: name.to_owned(),
            what,
            source,
        }
    };
    if !there {
        if let Some(mtu) = mtu {
            ifreq::set_mtu(name, mtu).map_err(setting("cannot set its MTU"))?;
        }
        ifreq::bring_up(name).map_err(setting("cannot bring it up"))?;
    }
    let own = ifreq::mtu(name).map_err(setting("cannot read its MTU"))?;
    Ok((wires, Some(own)))
}

enum Refusal {
    Tun(io::Error),
    Attach(io::Error),
}

fn open_queue(name: &str, pairs: u16) -> Result<OwnedFd, Refusal> {
    let open = || {
        let file = OpenOptions::new().read(true).write(true).open(TUN);
        file.map(OwnedFd::from).map_err(Refusal::Tun)
    };
    let fd = open()?;
    match attach_tap(&fd, name, pairs > 1) {
        Ok(()) => Ok(fd),
        // A tap for several queues takes one only as such.
        Err(e) if pairs == 1 && e.kind() == io::ErrorKind::InvalidInput => {
            let fd = open()?;
            attach_tap(&fd, name, true).map_err(Refusal::Attach)?;
            Ok(fd)
        }
        Err(e) => Err(Refusal::Attach(e)),
    }
}

fn refused(name: &str, pairs: u16, there: bool, refusal: Refusal) -> OpenError {
    let source = match refusal {
        Refusal::Tun(e) => return OpenError::Tun(e),
        Refusal::Attach(e) => e,
    };
    let name = name.to_owned();
    match source.kind() {
        io::ErrorKind::PermissionDenied if there => OpenError::NotOurs { name },
        io::ErrorKind::PermissionDenied => OpenError::Absent { name },
        io::ErrorKind::ResourceBusy => OpenError::Busy { name },
        io::ErrorKind::InvalidInput if there => OpenError::Unfit { name, pairs },
        _ => OpenError::Attach { name, source },
    }
}

/// Inherited queues of one tap.
fn take_taps(sources: &[Source]) -> Result<Vec<Wire>, OpenError> {
    let mut wires: Vec<(Wire, &Source)> = Vec::new();
    for source in sources {
        let fd = OwnedFd::from(source.open("tap")?);
        let wire = Wire::tap(fd).map_err(|e| OpenError::Wire {
            wire: format!("tap {source}"),
            source: e,
        })?;
        if sources.len() > 1 && !wire.multi_queue() {
            return Err(OpenError::OneQueue {
                wire: source.clone(),
            });
        }
        if let Some((first, first_source)) = wires.first()
            && first.name() != wire.name()
        {
            let name = |wire: &Wire| wire.name().unwrap_or_default().to_owned();
            return Err(OpenError::TwoTaps {
                first: (*first_source).clone(),
                first_name: name(first),
                other: source.clone(),
                other_name: name(&wire),
            });
        }
        wires.push((wire, source));
    }
    Ok(wires.into_iter().map(|(wire, _)| wire).collect())
}

/// The stream to another process.
fn open_stream(socket: &Source) -> Result<Wire, OpenError> {
    let fd = match socket {
        Source::Path(path) => {
            let stream = UnixStream::connect(path).map_err(|source| OpenError::Connect {
                path: path.clone(),
                source,
            })?;
            OwnedFd::from(stream)
        }
        Source::Fd(_) => {
            let fd = OwnedFd::from(socket.open("stream")?);
            let stream = matches!(socket_type(&fd), Ok(SocketType::STREAM));
            if !stream || getpeername(&fd).is_err() {
                return Err(OpenError::NotAStream(socket.clone()));
            }
            fd
        }
    };
    Wire::stream(fd).map_err(|source| OpenError::Blocking {
        socket: socket.clone(),
        source,
    })
}

/// One for each queue pair, if there are to be any.
fn open_vhost(spec: &NetSpec) -> Result<Vec<VhostNet>, OpenError> {
    if !spec.vhost {
        return Ok(Vec::new());
    }
    let new = |file: File| Ok(VhostNet::new(file.into())?);
    if spec.vhost_fds.is_empty() {
        let open = || OpenOptions::new().read(true).write(true).open(VHOST);
        return (0..spec.wire.pairs())
            .map(|_| open().map_err(OpenError::VhostAbsent).and_then(new))
            .collect();
    }
    let fds = spec.vhost_fds.iter();
    fds.map(|source| new(source.open("vhost-net")?)).collect()
}

/// A locally administered address that nobody else is likely to have.
fn random_mac() -> Result<[u8; 6], OpenError> {
    let mut mac = [0; 6];
    getrandom(&mut mac, GetRandomFlags::empty()).map_err(|e| OpenError::Random(e.into()))?;
    let [first, ..] = &mut mac;
    *first = (*first & 0xfc) | 2;
    Ok(mac)
}

/// The index of an interface of this name.
fn interface(name: &str) -> Option<u32> {
    let name = CString::new(name).ok()?;
    ifreq::index(&name)
}

/// Settings of interfaces, by ioctls on a socket.
mod ifreq {
    #![expect(unsafe_code, reason = "ioctls of network interfaces")]

    use std::ffi::CStr;
    use std::io;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixDatagram;

    pub(super) fn index(name: &CStr) -> Option<u32> {
        // SAFETY: a C string, which is only read.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        (index != 0).then_some(index)
    }

    /// `struct ifreq` with the members used here: flags (a short) and MTU (an int) begin at the same
    /// place.
    #[repr(C)]
    struct Request {
        name: [u8; 16],
        value: [u8; 4],
        rest: [u8; 20],
    }

    fn call(name: &str, number: libc::c_ulong, value: [u8; 4]) -> io::Result<[u8; 4]> {
        let mut request = Request {
            name: [0; 16],
            value,
            rest: [0; 20],
        };
        let place = request.name.get_mut(..name.len()).filter(|p| p.len() < 16);
        place
            .ok_or(io::ErrorKind::InvalidInput)?
            .copy_from_slice(name.as_bytes());
        // Any socket will do.
        let socket = UnixDatagram::unbound()?;
        // SAFETY: these calls read and fill a `struct ifreq`, whose size and layout `request` has.
        let done = unsafe { libc::ioctl(socket.as_raw_fd(), number, &raw mut request) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(request.value)
    }

    pub(super) fn mtu(name: &str) -> io::Result<u16> {
        let mtu = call(name, libc::SIOCGIFMTU, [0; 4])?;
        Ok(u16::try_from(i32::from_ne_bytes(mtu)).unwrap_or(u16::MAX))
    }

    pub(super) fn set_mtu(name: &str, mtu: u16) -> io::Result<()> {
        call(name, libc::SIOCSIFMTU, i32::from(mtu).to_ne_bytes()).map(drop)
    }

    pub(super) fn bring_up(name: &str) -> io::Result<()> {
        let [low, high, ..] = call(name, libc::SIOCGIFFLAGS, [0; 4])?;
        let up = u16::try_from(libc::IFF_UP).unwrap_or(1);
        let flags = u16::from_ne_bytes([low, high]) | up;
        let [low, high] = flags.to_ne_bytes();
        call(name, libc::SIOCSIFFLAGS, [low, high, 0, 0]).map(drop)
    }
}
