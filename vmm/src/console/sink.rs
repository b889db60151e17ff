//! Where the serial port's output goes. Sinks never block: what they cannot take is `WouldBlock`,
//! and the UART tells the guest that the transmitter is busy.
#![expect(unsafe_code, reason = "poll and pwritev2")]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

/// How to write to a descriptor without waiting and without making it non-blocking for everyone
/// who shares it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// Files take what they are given.
    Plain,
    /// Pipes and sockets: `RWF_NOWAIT`.
    NoWait,
    /// Terminals, and pipes on hosts that know no better: look before each write. A pipe that
    /// polls writable has room for `PIPE_BUF` bytes (pipe(7)).
    Poll,
}

/// Output to an open descriptor.
pub(super) struct FdSink {
    file: File,
    manner: Manner,
    stalled: Arc<EventFd>,
}

impl FdSink {
    /// A sink that signals `stalled` each time it has to refuse.
    pub(super) fn new(file: File, stalled: Arc<EventFd>) -> io::Result<Self> {
        let kind = file.metadata()?.file_type();
        let manner = if kind.is_file() {
            Manner::Plain
        } else if kind.is_char_device() {
            Manner::Poll
        } else {
            Manner::NoWait
        };
        Ok(Self {
            file,
            manner,
            stalled,
        })
    }

    fn write_now(&mut self, data: &[u8]) -> io::Result<usize> {
        loop {
            match self.manner {
                Manner::Plain => return self.file.write(data),
                Manner::NoWait => match write_nowait(self.file.as_raw_fd(), data) {
                    Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                        self.manner = Manner::Poll;
                    }
                    result => return result,
                },
                Manner::Poll => {
                    if !writable(self.file.as_raw_fd())? {
                        return Err(io::ErrorKind::WouldBlock.into());
                    }
                    let some = data.get(..libc::PIPE_BUF).unwrap_or(data);
                    return self.file.write(some);
                }
            }
        }
    }
}

impl Write for FdSink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let result = self.write_now(data);
        if matches!(&result, Err(e) if e.kind() == io::ErrorKind::WouldBlock) {
            let _ = self.stalled.write(1);
        }
        result
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_nowait(fd: RawFd, data: &[u8]) -> io::Result<usize> {
    let iov = libc::iovec {
        iov_base: data.as_ptr().cast_mut().cast(),
        iov_len: data.len(),
    };
    // SAFETY: `iov` describes `data`, which pwritev2 only reads.
    let written = unsafe { libc::pwritev2(fd, &raw const iov, 1, -1, libc::RWF_NOWAIT) };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}

fn writable(fd: RawFd) -> io::Result<bool> {
    poll_out(fd, 0)
}

/// Waits until `fd` takes bytes; `false` if it did not within `timeout`.
pub(super) fn wait_writable(fd: RawFd, timeout: Duration) -> bool {
    let millis = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    poll_out(fd, millis).unwrap_or(false)
}

fn poll_out(fd: RawFd, millis: i32) -> io::Result<bool> {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    let ready = unsafe { libc::poll(&raw mut poll, 1, millis) };
    if ready < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(ready > 0)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn a_full_pipe_refuses_and_takes_again() {
        let (mut reader, writer) = io::pipe().unwrap();
        let stalled = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let file = File::from(OwnedFd::from(writer));
        let mut sink = FdSink::new(file, Arc::clone(&stalled)).unwrap();
        let mut sent = 0;
        let error = loop {
            match sink.write(&[b'x'; 1000]) {
                Ok(n) => sent += n,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(stalled.read().unwrap(), 1);
        let mut buffer = vec![0; 8192];
        reader.read_exact(&mut buffer).unwrap();
        sent += sink.write(b"more").unwrap();
        drop(sink);
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).unwrap();
        assert_eq!(rest.len() + buffer.len(), sent);
    }

    #[test]
    fn a_device_is_polled() {
        let stalled = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let null = File::options().write(true).open("/dev/null").unwrap();
        let mut sink = FdSink::new(null, stalled).unwrap();
        assert_eq!(sink.manner, Manner::Poll);
        assert_eq!(sink.write(b"gone").unwrap(), 4);
    }
}
