//! AF_VSOCK sockets; rustix has the calls, but not this family's address.
#![expect(unsafe_code, reason = "no safe wrapper knows sockaddr_vm")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

const AF_VSOCK: u16 = 40;
/// `include/uapi/linux/vm_sockets.h`
const VMADDR_CID_ANY: u32 = u32::MAX;

/// The host, to a guest.
const VMADDR_CID_HOST: u32 = 2;

type Call =
    unsafe extern "C" fn(libc::c_int, *const libc::sockaddr, libc::socklen_t) -> libc::c_int;

fn with_address(call: Call, cid: u32, port: u32) -> io::Result<(OwnedFd, io::Result<()>)> {
    let socket = rustix::net::socket_with(
        AddressFamily::from_raw(AF_VSOCK),
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    // SAFETY: all-zero bytes are a valid sockaddr_vm: it consists of integers.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = AF_VSOCK;
    address.svm_cid = cid;
    address.svm_port = port;
    let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>())
        .map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: `call` is bind or connect: the descriptor is open, pointer and length are those of one live
    // address, which is only read.
    let done = unsafe {
        call(
            socket.as_raw_fd(),
            std::ptr::from_ref(&address).cast(),
            length,
        )
    };
    let answer = if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    };
    Ok((socket, answer))
}

/// A socket that listens on a port of this guest.
pub(crate) fn listen(port: u32) -> io::Result<OwnedFd> {
    let (socket, bound) = with_address(libc::bind, VMADDR_CID_ANY, port)?;
    bound?;
    rustix::net::listen(&socket, 128)?;
    Ok(socket)
}

/// A socket on its way to a port of the host.
pub(crate) fn call_host(port: u32) -> io::Result<OwnedFd> {
    match with_address(libc::connect, VMADDR_CID_HOST, port)? {
        (socket, Ok(())) => Ok(socket),
        (socket, Err(e)) if e.raw_os_error() == Some(libc::EINPROGRESS) => Ok(socket),
        (_, Err(e)) => Err(e),
    }
}
