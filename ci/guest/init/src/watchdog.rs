//! The kernel's watchdog device (Linux Documentation/watchdog/watchdog-api.rst).
#![expect(unsafe_code, reason = "ioctls that rustix does not have")]

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::thread::sleep;
use std::time::Duration;

use crate::console::Console;

/// `_IOR('W', 2, int)`: why the machine started.
const GET_BOOT_STATUS: u32 = 0x8004_5702;
/// `_IOWR('W', 6, int)`, in seconds.
const SET_TIMEOUT: u32 = 0xc004_5706;
/// Written before closing: closing shall end it.
const MAGIC: &[u8] = b"V";
const PERIOD: Duration = Duration::from_millis(500);

fn ioctl(device: &File, request: u32, value: &mut i32) -> io::Result<()> {
    // SAFETY: both requests take a pointer to an int, which the kernel reads and writes.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), request as _, &raw mut *value) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Starts the watchdog with a time-out of so many seconds and feeds it so many times. It is left
/// running; with `close` it is stopped.
pub(crate) fn feed(console: &mut Console, seconds: i32, times: u32, close: bool) -> io::Result<()> {
    let mut device = OpenOptions::new().write(true).open("/dev/watchdog")?;
    let mut status = 0;
    ioctl(&device, GET_BOOT_STATUS, &mut status)?;
    console.fact("watchdog.bootstatus", status);
    let mut timeout = seconds;
    ioctl(&device, SET_TIMEOUT, &mut timeout)?;
    console.fact("watchdog.timeout", timeout);
    for _ in 0..times {
        device.write_all(b"1")?;
        sleep(PERIOD);
    }
    console.line("WATCHDOG fed");
    if close {
        device.write_all(MAGIC)?;
    }
    Ok(())
}
