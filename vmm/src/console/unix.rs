//! A console on a listening stream socket: one client at a time, the last output kept for the
//! next one.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::unix_path::BoundSocket;

/// Output kept while nobody is connected; older bytes make room.
const KEPT: usize = 64 * 1024;

/// The listening socket and its client.
pub(super) struct Listening {
    bound: BoundSocket,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    stalled: Arc<EventFd>,
}

#[derive(Default)]
struct State {
    /// Its descriptor is epoll's to know, so it stays until the console has taken it from there.
    client: Option<UnixStream>,
    /// The client takes no more.
    gone: bool,
    kept: VecDeque<u8>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Listening {
    pub(super) fn bind(path: &Path, stalled: Arc<EventFd>) -> io::Result<Self> {
        Ok(Self {
            bound: BoundSocket::bind(path)?,
            shared: Arc::new(Shared {
                state: Mutex::default(),
                stalled,
            }),
        })
    }

    pub(super) fn sink(&self) -> Box<dyn Write + Send> {
        Box::new(UnixSink(Arc::clone(&self.shared)))
    }

    pub(super) fn listener_fd(&self) -> RawFd {
        self.bound.as_raw_fd()
    }

    pub(super) fn client_fd(&self) -> Option<RawFd> {
        self.shared.lock().client.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Takes a waiting client. If there is one already the newcomer is turned away.
    pub(super) fn accept(&self) -> io::Result<bool> {
        let (stream, _) = self.bound.listener().accept()?;
        let mut state = self.shared.lock();
        if state.client.is_some() {
            return Ok(false);
        }
        stream.set_nonblocking(true)?;
        state.client = Some(stream);
        state.gone = false;
        Ok(true)
    }

    /// Whether there is a client that takes no more.
    pub(super) fn client_is_gone(&self) -> bool {
        self.shared.lock().gone
    }

    /// Forgets the client, which nothing watches any more.
    pub(super) fn hang_up(&self) {
        let mut state = self.shared.lock();
        state.client = None;
        state.gone = false;
    }

    /// Reads from the client; `Ok(0)` when it has gone.
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut state = self.shared.lock();
        let Some(client) = &mut state.client else {
            return Ok(0);
        };
        match client.read(buffer) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(e),
            Ok(n) if n > 0 => Ok(n),
            _ => {
                state.gone = true;
                Ok(0)
            }
        }
    }
}

struct UnixSink(Arc<Shared>);

impl Write for UnixSink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut state = self.0.lock();
        let State { client, gone, kept } = &mut *state;
        if let (Some(stream), false) = (client, *gone) {
            match send(stream, kept, data) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let _ = self.0.stalled.write(1);
                    return Err(e);
                }
                Ok(sent) => return Ok(sent),
                // The reader notices, and forgets it.
                Err(_) => *gone = true,
            }
        }
        let room = KEPT.saturating_sub(data.len());
        let excess = kept.len().saturating_sub(room);
        kept.drain(..excess);
        kept.extend(data.iter().rev().take(KEPT).rev());
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Sends what was kept, then `data`.
fn send(stream: &mut UnixStream, kept: &mut VecDeque<u8>, data: &[u8]) -> io::Result<usize> {
    while !kept.is_empty() {
        let (head, _) = kept.as_slices();
        let sent = stream.write(head)?;
        if sent == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        kept.drain(..sent);
    }
    if data.is_empty() {
        return Ok(0);
    }
    stream.write(data)
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn listening(dir: &Path) -> Listening {
        let stalled = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        Listening::bind(&dir.join("console"), stalled).unwrap()
    }

    #[test]
    fn a_late_client_sees_the_last_output() {
        let dir = tempfile::tempdir().unwrap();
        let console = listening(dir.path());
        let mut sink = console.sink();
        for _ in 0..KEPT {
            sink.write_all(b"ab").unwrap();
        }
        let mut client = UnixStream::connect(dir.path().join("console")).unwrap();
        assert!(console.accept().unwrap());
        sink.write_all(b"!").unwrap();
        let mut seen = vec![0; KEPT + 1];
        client.read_exact(&mut seen).unwrap();
        assert_eq!(seen.last(), Some(&b'!'));
        assert_eq!(seen.first(), Some(&b'a'));

        let _second = UnixStream::connect(dir.path().join("console")).unwrap();
        assert!(!console.accept().unwrap(), "one client at a time");
        drop(client);
        assert_eq!(console.read(&mut [0; 8]).unwrap(), 0);
        assert!(console.client_is_gone());
        console.hang_up();
        assert!(console.client_fd().is_none());
    }
}
