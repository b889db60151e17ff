//! The host's end of a network device: one descriptor that gives and takes a frame per call, each
//! behind a 12-byte header (`virtio_net_hdr_v1`, virtio 1.2 §5.1.6), or a stream of frames without.
//!
//! The first is a queue of a tap (or macvtap), or, for tests and other processes, a datagram socket.
#![expect(unsafe_code, reason = "ioctls of taps")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use thiserror::Error;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use super::offload::flag;
use super::stream::Stream;

/// Bytes before each frame.
pub(super) const HEADER: usize = 12;

/// `struct ifreq` with the one member that taps look at.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct InterfaceRequest {
    pub(super) name: [u8; 16],
    pub(super) flags: u16,
    pub(super) rest: [u8; 22],
}

impl InterfaceRequest {
    pub(super) fn new(flags: u16) -> Self {
        Self {
            name: [0; 16],
            flags,
            rest: [0; 22],
        }
    }

    pub(super) fn name(&self) -> String {
        let end = self.name.iter().position(|b| *b == 0);
        let name = self.name.get(..end.unwrap_or(16)).unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    }
}

/// Flags of `TUNSETIFF` and `TUNSETQUEUE`.
pub(super) mod iff {
    pub(crate) const TAP: u16 = 0x0002;
    pub(crate) const MULTI_QUEUE: u16 = 0x0100;
    pub(crate) const ATTACH_QUEUE: u16 = 0x0200;
    pub(crate) const DETACH_QUEUE: u16 = 0x0400;
    pub(crate) const NO_PI: u16 = 0x1000;
    pub(crate) const VNET_HDR: u16 = 0x4000;
}

mod number {
    use std::os::raw::{c_int, c_uint};

    const TUN: c_uint = b'T' as c_uint;

    vmm_sys_util::ioctl_iow_nr!(set_iff, TUN, 202, c_int);
    vmm_sys_util::ioctl_iow_nr!(set_offload, TUN, 208, c_uint);
    vmm_sys_util::ioctl_ior_nr!(get_iff, TUN, 210, c_uint);
    vmm_sys_util::ioctl_iow_nr!(set_vnet_hdr_size, TUN, 216, c_int);
    vmm_sys_util::ioctl_iow_nr!(set_queue, TUN, 217, c_int);
    vmm_sys_util::ioctl_iow_nr!(set_vnet_le, TUN, 220, c_int);
}

/// A descriptor does not do as a tap.
#[derive(Debug, Error)]
pub enum WireError {
    /// Not a tap.
    #[error("it is not a tap")]
    NotATap(#[source] io::Error),
    /// A tun, or a tap in the wrong mode.
    #[error(
        "interface {name} is not in the mode that is needed; open it with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
    )]
    Mode {
        /// The interface.
        name: String,
    },
    /// The host refused a setting.
    #[error("interface {name}: {what}")]
    Setting {
        /// The interface.
        name: String,
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// One queue of the host's end.
pub struct Wire {
    fd: OwnedFd,
    kind: Kind,
}

enum Kind {
    Tap(Tap),
    Datagrams,
    /// Locked by whoever serves the wire; nobody waits for it.
    Stream(Mutex<Stream>),
}

struct Tap {
    name: String,
    multi_queue: bool,
    /// `TUNSETOFFLOAD` flags it takes.
    flags: u32,
}

impl Wire {
    /// A queue of a tap, as `TUNSETIFF` left it.
    pub fn tap(fd: OwnedFd) -> Result<Self, WireError> {
        let mut request = InterfaceRequest::new(0);
        // SAFETY: TUNGETIFF fills a `struct ifreq`, whose size and layout `request` has.
        let got = unsafe { ioctl_with_mut_ref(&fd, number::get_iff(), &mut request) };
        check(got).map_err(WireError::NotATap)?;
        let name = request.name();
        let wanted = iff::TAP | iff::NO_PI | iff::VNET_HDR;
        if request.flags & wanted != wanted {
            return Err(WireError::Mode { name });
        }
        let setting = |what| {
            let name = name.clone();
            move |source| WireError::Setting { name, what, source }
        };
        nonblocking(&fd).map_err(setting("cannot make it non-blocking"))?;
        let size = libc::c_int::try_from(HEADER).unwrap_or_default();
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        let set = unsafe { ioctl_with_ref(&fd, number::set_vnet_hdr_size(), &size) };
        check(set).map_err(setting("cannot set the header's size"))?;
        let little: libc::c_int = 1;
        // SAFETY: TUNSETVNETLE reads one int.
        let set = unsafe { ioctl_with_ref(&fd, number::set_vnet_le(), &little) };
        check(set).map_err(setting("cannot set the header's byte order"))?;
        let flags = probe(&fd).map_err(setting("cannot set its offloads"))?;
        Ok(Self {
            fd,
            kind: Kind::Tap(Tap {
                name,
                multi_queue: request.flags & iff::MULTI_QUEUE != 0,
                flags,
            }),
        })
    }

    /// A datagram socket: each datagram is a header and a frame.
    pub fn datagrams(fd: OwnedFd) -> io::Result<Self> {
        nonblocking(&fd)?;
        let kind = Kind::Datagrams;
        Ok(Self { fd, kind })
    }

    /// A connected stream socket, over which frames go as passt and QEMU speak it: each behind its
    /// length, in four bytes with the most significant first.
    pub fn stream(fd: OwnedFd) -> io::Result<Self> {
        nonblocking(&fd)?;
        let kind = Kind::Stream(Mutex::new(Stream::new()));
        Ok(Self { fd, kind })
    }

    fn as_tap(&self) -> Option<&Tap> {
        match &self.kind {
            Kind::Tap(tap) => Some(tap),
            Kind::Datagrams | Kind::Stream(_) => None,
        }
    }

    /// The frames' way, if it is a stream.
    pub(super) fn as_stream(&self) -> Option<MutexGuard<'_, Stream>> {
        match &self.kind {
            Kind::Stream(stream) => Some(stream.lock().unwrap_or_else(PoisonError::into_inner)),
            Kind::Tap(_) | Kind::Datagrams => None,
        }
    }

    pub(super) fn is_stream(&self) -> bool {
        matches!(self.kind, Kind::Stream(_))
    }

    /// The interface's name, if it is a tap.
    pub fn name(&self) -> Option<&str> {
        self.as_tap().map(|tap| tap.name.as_str())
    }

    /// Whether it is one of several queues of its tap.
    pub fn multi_queue(&self) -> bool {
        self.as_tap().is_some_and(|tap| tap.multi_queue)
    }

    /// What work on packets can be left to it and to the guest, as `TUNSETOFFLOAD` flags.
    pub(super) fn offloads(&self) -> u32 {
        self.as_tap().map_or(0, |tap| tap.flags)
    }

    /// Says what the guest takes, for all queues of the tap.
    pub(super) fn set_offloads(&self, flags: u32) -> io::Result<()> {
        match self.as_tap() {
            Some(_) => set_offload(&self.fd, flags),
            None => Ok(()),
        }
    }

    /// Lets the host deliver to this queue, or not; what waits in it is dropped then. Only a queue of
    /// a multi-queue tap can be without.
    pub(super) fn set_attached(&self, attached: bool) -> io::Result<()> {
        if !self.multi_queue() {
            return Ok(());
        }
        let flags = if attached {
            iff::ATTACH_QUEUE
        } else {
            iff::DETACH_QUEUE
        };
        let request = InterfaceRequest::new(flags);
        // SAFETY: TUNSETQUEUE reads a `struct ifreq`, whose size and layout `request` has.
        let set = unsafe { ioctl_with_ref(&self.fd, number::set_queue(), &request) };
        match check(set) {
            // It is so already.
            Err(e) if e.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => Ok(()),
            done => done,
        }
    }

    /// Drops what waits, frames for a guest that is gone.
    pub(super) fn discard(&self) {
        if let Some(mut stream) = self.as_stream() {
            for _ in 0..MOST_WAITING {
                // Its end, if that is what there is, is found again.
                if stream.front(self.fd.as_fd()).is_err() {
                    return;
                }
                stream.consume();
            }
            return;
        }
        let mut byte = [0];
        for _ in 0..MOST_WAITING {
            if rustix::io::read(&self.fd, &mut byte).is_err() {
                return;
            }
        }
    }
}

/// More than a tap holds (its length is `txqueuelen`, 1000 by default).
const MOST_WAITING: usize = 4096;

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Wire {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}

/// Makes `fd`, a new open file of `/dev/net/tun`, a queue of the tap `name`, which is created if
/// there is none and the caller may.
pub fn attach_tap(fd: &OwnedFd, name: &str, multi_queue: bool) -> io::Result<()> {
    let several = if multi_queue { iff::MULTI_QUEUE } else { 0 };
    let mut request = InterfaceRequest::new(iff::TAP | iff::NO_PI | iff::VNET_HDR | several);
    let bytes = name.as_bytes();
    // The last byte stays 0.
    let place = request.name.get_mut(..bytes.len()).filter(|p| p.len() < 16);
    place
        .ok_or(io::ErrorKind::InvalidInput)?
        .copy_from_slice(bytes);
    // SAFETY: TUNSETIFF reads and fills a `struct ifreq`, whose size and layout `request` has.
    check(unsafe { ioctl_with_mut_ref(fd, number::set_iff(), &mut request) })
}

fn nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = fcntl_getfl(fd)?;
    Ok(fcntl_setfl(fd, flags | OFlags::NONBLOCK)?)
}

/// The flags the tap takes; none is set afterwards.
fn probe(fd: &OwnedFd) -> io::Result<u32> {
    let all = flag::PLAIN | flag::UFO | flag::USO;
    let fewer = [all, flag::PLAIN | flag::USO, flag::PLAIN | flag::UFO];
    let taken = fewer.into_iter().find(|f| set_offload(fd, *f).is_ok());
    set_offload(fd, 0)?;
    Ok(taken.unwrap_or(flag::PLAIN))
}

fn set_offload(fd: &OwnedFd, flags: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes an integer.
    check(unsafe { ioctl_with_val(fd, number::set_offload(), flags.into()) })
}

fn check(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
