//! A generic netlink socket: four system calls with their arguments in order.
#![expect(unsafe_code, reason = "no safe wrapper offers netlink groups")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const NETLINK_ADD_MEMBERSHIP: libc::c_int = 1;
/// More than any message of the families used here.
const MESSAGE: usize = 8192;

pub(crate) fn generic_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: plain numbers go in, a descriptor or -1 comes out.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_GENERIC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends to the kernel, which is where a netlink socket without a peer sends.
pub(crate) fn send(socket: &OwnedFd, message: &[u8]) -> io::Result<()> {
    // SAFETY: pointer and length are those of one live slice, which is only read.
    let sent = unsafe {
        libc::send(
            socket.as_raw_fd(),
            message.as_ptr().cast(),
            message.len(),
            0,
        )
    };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The next message, waiting for it.
pub(crate) fn receive(socket: &OwnedFd) -> io::Result<Vec<u8>> {
    let mut message = vec![0; MESSAGE];
    // SAFETY: pointer and length are those of one live, exclusively borrowed buffer.
    let length = unsafe {
        libc::recv(
            socket.as_raw_fd(),
            message.as_mut_ptr().cast(),
            message.len(),
            0,
        )
    };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    message.truncate(length);
    Ok(message)
}

pub(crate) fn join_group(socket: &OwnedFd, group: u32) -> io::Result<()> {
    // SAFETY: the option's value is one u32, alive during the call, and its size is given.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_NETLINK,
            NETLINK_ADD_MEMBERSHIP,
            std::ptr::from_ref(&group).cast(),
            4,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
