//! vsock streams, which neither std nor rustix has addresses for.
#![expect(unsafe_code, reason = "an address family that rustix does not know")]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SocketFlags, SocketType, accept_with, bind, socket_with};

const AF_VSOCK: u16 = 40;
/// `VMADDR_CID_HOST`
const HOST: u32 = 2;
/// `VMADDR_CID_ANY`
const ANY: u32 = u32::MAX;

/// `struct sockaddr_vm` (linux/vm_sockets.h).
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u8,
    zero: [u8; 3],
}

const LENGTH: SocketAddrLen = 16;
const _: () = assert!(size_of::<Address>() == 16, "the kernel's size");

impl Address {
    fn new(cid: u32, port: u32) -> Address {
        Address {
            family: AF_VSOCK,
            reserved: 0,
            port,
            cid,
            flags: 0,
            zero: [0; 3],
        }
    }
}

// SAFETY: the pointer and the length given to `f` are those of a whole `sockaddr_vm`, which is plain
// data of the right size and alignment and lives as long as the call.
unsafe impl SocketAddrArg for Address {
    unsafe fn with_sockaddr<R>(
        &self,
        f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R,
    ) -> R {
        f((&raw const *self).cast(), LENGTH)
    }
}

fn socket() -> io::Result<OwnedFd> {
    let family = AddressFamily::from_raw(AF_VSOCK);
    Ok(socket_with(
        family,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Connects to the host.
pub(crate) fn connect(port: u32) -> io::Result<File> {
    let socket = socket()?;
    rustix::net::connect(&socket, &Address::new(HOST, port))?;
    Ok(socket.into())
}

/// Listens for any guest.
pub(crate) fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    bind(&socket, &Address::new(ANY, port))?;
    rustix::net::listen(&socket, 16)?;
    Ok(socket)
}

/// The next guest's connection.
pub(crate) fn accept(listener: &OwnedFd) -> io::Result<File> {
    Ok(accept_with(listener, SocketFlags::CLOEXEC)?.into())
}
