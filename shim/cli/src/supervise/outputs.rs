//! The container's output: to the log, and to whoever is attached.
//!
//! A reader that is attached and does not read holds the container up, as a pipe would; one that has gone
//! does not. Locks are not held while bytes are written.

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::{Shared, lock};
use crate::output::{OutputLog, Stream};

const BUFFER: usize = 64 * 1024;

/// Whoever wants output.
struct Reader {
    client: u64,
    stream: Stream,
    to: Arc<OwnedFd>,
}

#[derive(Default)]
struct Counted {
    bytes: [u64; 2],
    ended: [bool; 2],
}

/// Both outputs.
pub(crate) struct Outputs {
    readers: Mutex<Vec<Reader>>,
    log: Mutex<OutputLog>,
    counted: Mutex<Counted>,
    moved: Condvar,
}

fn index(stream: Stream) -> usize {
    match stream {
        Stream::Out => 0,
        Stream::Err => 1,
    }
}

impl Outputs {
    pub(crate) fn new(folder: &Path, most: u64) -> io::Result<Self> {
        Ok(Self {
            readers: Mutex::default(),
            log: Mutex::new(OutputLog::create(folder, most)?),
            counted: Mutex::default(),
            moved: Condvar::new(),
        })
    }

    /// From now on a client gets output.
    pub(crate) fn attach(&self, client: u64, stream: Stream, to: OwnedFd) {
        lock(&self.readers).push(Reader {
            client,
            stream,
            to: Arc::new(to),
        });
    }

    /// And now not any more.
    pub(crate) fn detach(&self, client: u64) {
        lock(&self.readers).retain(|reader| reader.client != client);
    }

    /// Passes one output on until it ends.
    pub(crate) fn pump(&self, mut from: UnixStream, stream: Stream) {
        let mut buffer = vec![0; BUFFER];
        loop {
            let length = match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => length,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            self.pass(stream, buffer.get(..length).unwrap_or_default());
        }
        self.count(stream, 0, true);
    }

    fn pass(&self, stream: Stream, bytes: &[u8]) {
        if let Err(e) = lock(&self.log).add(stream, bytes) {
            eprintln!("testudo supervise: output is not kept: {e}");
        }
        let readers: Vec<(u64, Arc<OwnedFd>)> = lock(&self.readers)
            .iter()
            .filter(|reader| reader.stream == stream)
            .map(|reader| (reader.client, Arc::clone(&reader.to)))
            .collect();
        for (client, to) in readers {
            if write_all(&to, bytes).is_err() {
                lock(&self.readers)
                    .retain(|reader| reader.client != client || reader.stream != stream);
            }
        }
        self.count(
            stream,
            u64::try_from(bytes.len()).unwrap_or_default(),
            false,
        );
    }

    fn count(&self, stream: Stream, bytes: u64, ended: bool) {
        let mut counted = lock(&self.counted);
        let index = index(stream);
        if let Some(total) = counted.bytes.get_mut(index) {
            *total = total.saturating_add(bytes);
        }
        if let Some(end) = counted.ended.get_mut(index) {
            *end |= ended;
        }
        drop(counted);
        self.moved.notify_all();
    }

    /// There will be none of this output.
    pub(crate) fn none_of(&self, stream: Stream) {
        self.count(stream, 0, true);
    }

    /// Waits until so many bytes of both have been passed on, or their ends.
    pub(crate) fn wait_for(&self, wanted: [u64; 2], patience: Duration) -> bool {
        let deadline = Instant::now().checked_add(patience);
        let mut counted = lock(&self.counted);
        loop {
            let done = counted.bytes.iter().zip(&counted.ended).zip(&wanted);
            if done
                .into_iter()
                .all(|((bytes, ended), wanted)| *ended || bytes >= wanted)
            {
                return true;
            }
            let left =
                deadline.and_then(|deadline| deadline.checked_duration_since(Instant::now()));
            let Some(left) = left else { return false };
            let waited = self.moved.wait_timeout(counted, left);
            counted = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }
}

/// Also to descriptors that their owner made non-blocking.
fn write_all(to: &OwnedFd, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Ok(length) => bytes = bytes.get(length..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let mut fds = [PollFd::new(to, PollFlags::OUT)];
                match poll(&mut fds, None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(e) => return Err(e),
                }
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Starts passing on a container's output.
pub(crate) fn start(shared: &Arc<Shared>, stream: Stream, from: UnixStream) -> io::Result<()> {
    let name = match stream {
        Stream::Out => "out",
        Stream::Err => "err",
    };
    shared.thread(name, move |shared| shared.outputs.pump(from, stream))?;
    Ok(())
}
