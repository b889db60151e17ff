//! The kernel's random generator after a snapshot: random(4).
#![expect(unsafe_code, reason = "ioctls with a structure of variable length")]

use std::io;
use std::os::fd::AsRawFd;

/// `_IOW('R', 0x03, int[2])` and `_IO('R', 0x07)`, include/uapi/linux/random.h.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Adds a seed, all of whose bits count, and has the generator take it up at once.
pub(crate) fn reseed(seed: &[u8]) -> io::Result<()> {
    let device = std::fs::File::options().write(true).open("/dev/urandom")?;
    let size = i32::try_from(seed.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let bits = size.saturating_mul(8);
    // struct rand_pool_info: entropy_count, buf_size, buf
    let mut pool = Vec::with_capacity(seed.len().saturating_add(8));
    pool.extend_from_slice(&bits.to_ne_bytes());
    pool.extend_from_slice(&size.to_ne_bytes());
    pool.extend_from_slice(seed);
    // SAFETY: the buffer is as long as its buf_size says, alive during the call, and only read.
    let added = unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY as _, pool.as_ptr()) };
    if added != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: takes no argument.
    if unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG as _) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
