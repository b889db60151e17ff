//! AF_VSOCK listeners; rustix has the calls, but not this family's address.
#![expect(unsafe_code, reason = "no safe wrapper knows sockaddr_vm")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

const AF_VSOCK: u16 = 40;
/// `include/uapi/linux/vm_sockets.h`
const VMADDR_CID_ANY: u32 = u32::MAX;

/// A socket that listens on a port of this guest.
pub(crate) fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::from_raw(AF_VSOCK),
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    // SAFETY: all-zero bytes are a valid sockaddr_vm: it consists of integers.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = AF_VSOCK;
    address.svm_cid = VMADDR_CID_ANY;
    address.svm_port = port;
    let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>())
        .map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the descriptor is open; pointer and length are those of one live address.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            std::ptr::from_ref(&address).cast(),
            length,
        )
    };
    if bound != 0 {
        return Err(io::Error::last_os_error());
    }
    rustix::net::listen(&socket, 128)?;
    Ok(socket)
}
