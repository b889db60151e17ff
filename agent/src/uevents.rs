//! The kernel's announcements of devices. What they say is not read: whoever waits looks into sysfs.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};

/// The kernel's own group; 2 is udev's.
const KERNEL: u32 = 1;

pub(crate) fn listen() -> rustix::io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        Some(netlink::KOBJECT_UEVENT),
    )?;
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, KERNEL))?;
    Ok(socket)
}

/// Takes all announcements; whether there was one, or some were lost.
pub(crate) fn drain(socket: &OwnedFd) -> bool {
    let mut any = false;
    let mut announcement = [0; 8192];
    loop {
        match rustix::net::recv(socket, &mut announcement[..], RecvFlags::empty()) {
            Ok(_) | Err(Errno::NOBUFS) => any = true,
            Err(Errno::INTR) => {}
            Err(_) => return any,
        }
    }
}
