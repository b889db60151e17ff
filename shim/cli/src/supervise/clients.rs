//! Commands that talk to the supervisor: the one that made the pod, and others through its socket.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rustix::event::{PollFd, PollFlags, poll};
use testudo_agent_protocol::{
    PauseContainerRequest, ProcessId, ResizeTtyRequest, ResumeContainerRequest,
    SignalProcessRequest, TtySize,
};
use testudo_protocol::Listener;

use super::{Happening, Shared, lock};
use crate::container::CONTAINER;
use crate::guest::{GuestError, end_of_input};
use crate::link::{Ask, Incoming, Link, Tell};
use crate::output::Stream;

/// Whoever is there.
#[derive(Default)]
pub(crate) struct Clients {
    next: AtomicU64,
    links: Mutex<Vec<(u64, Arc<Link>)>>,
    /// What each new one is told first: whether it runs, and how it ended.
    news: Mutex<Vec<Tell>>,
    input: Mutex<Input>,
}

/// The container's standard input.
#[derive(Default)]
struct Input {
    stream: Option<UnixStream>,
    /// What came before there was one.
    early: Vec<u8>,
    /// There is no more.
    ended: bool,
}

impl Clients {
    /// Tells all there are, and all that come.
    pub(crate) fn tell_all(&self, tell: &Tell) {
        let mut news = lock(&self.news);
        news.push(tell.clone());
        for (_, link) in lock(&self.links).iter() {
            // One that has gone is found out by its own thread.
            let _ = link.tell(tell);
        }
    }

    fn add(&self, link: &Arc<Link>) -> u64 {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let news = lock(&self.news);
        for tell in news.iter() {
            let _ = link.tell(tell);
        }
        lock(&self.links).push((id, Arc::clone(link)));
        id
    }

    fn remove(&self, id: u64) {
        lock(&self.links).retain(|(other, _)| *other != id);
    }

    /// From now on there is somebody to take input.
    pub(crate) fn take_input(&self, mut stream: UnixStream) {
        let mut input = lock(&self.input);
        let early = std::mem::take(&mut input.early);
        // A container that takes none is not an error.
        let _ = stream.write_all(&early);
        if input.ended {
            end_of_input(&stream);
        } else {
            input.stream = Some(stream);
        }
    }

    fn input(&self, bytes: &[u8]) {
        let stream = {
            let mut input = lock(&self.input);
            match input.stream.as_ref().map(UnixStream::try_clone) {
                Some(stream) => stream,
                None => {
                    if !input.ended {
                        input.early.extend_from_slice(bytes);
                    }
                    return;
                }
            }
        };
        if let Ok(mut stream) = stream {
            let _ = stream.write_all(bytes);
        }
    }

    fn end_input(&self) {
        let mut input = lock(&self.input);
        input.ended = true;
        if let Some(stream) = input.stream.take() {
            end_of_input(&stream);
        }
    }

    fn has_input(&self) -> bool {
        lock(&self.input).stream.is_some()
    }
}

/// Lets others in.
pub(crate) fn open_door(shared: &Arc<Shared>) -> anyhow::Result<()> {
    let door = Listener::bind(&shared.sockets.join("supervisor"))?;
    shared.thread("door", move |shared| {
        loop {
            let mut fds = [PollFd::new(&door, PollFlags::IN)];
            let _ = poll(&mut fds, None);
            let Ok(connection) = door.accept() else {
                continue;
            };
            if connection.set_nonblocking(false).is_ok() {
                let _ = serve(shared, Link(connection));
            }
        }
    })?;
    Ok(())
}

/// Serves one, by a thread of its own.
pub(crate) fn serve(shared: &Arc<Shared>, link: Link) -> io::Result<()> {
    let link = Arc::new(link);
    let id = shared.clients.add(&link);
    shared.thread("client", move |shared| {
        let owner = Client {
            shared,
            link: &link,
            id,
            owner: false,
            stdin: false,
        }
        .talk();
        shared.outputs.detach(id);
        shared.clients.remove(id);
        if owner {
            // Nobody is left who wanted it.
            shared.happened(Happening::Stop {
                timeout_s: 0,
                why: Some("its command has gone".into()),
            });
            shared.killer.kill();
        }
    })?;
    Ok(())
}

struct Client<'a> {
    shared: &'a Arc<Shared>,
    link: &'a Link,
    id: u64,
    owner: bool,
    stdin: bool,
}

impl Client<'_> {
    /// Whether the pod has lost its owner.
    fn talk(&mut self) -> bool {
        loop {
            match self.link.incoming() {
                Incoming::Gone => {
                    if self.stdin
                        && !self.owner
                        && !self.shared.pod.detached
                        && !self.shared.clients.has_input()
                    {
                        self.shared.clients.end_input();
                    }
                    return self.owner;
                }
                Incoming::Input(bytes) if self.stdin => self.shared.clients.input(&bytes),
                Incoming::Input(_) => {}
                Incoming::Ask(Ask::Detach, _) => return false,
                Incoming::Ask(ask, fds) => {
                    let answer = self.answer(&ask, fds);
                    if let Some(answer) = answer {
                        let _ = self.link.tell(&answer);
                    }
                }
            }
        }
    }

    fn answer(&mut self, ask: &Ask, fds: Vec<OwnedFd>) -> Option<Tell> {
        let done = |result: Result<(), GuestError>| {
            Some(match result {
                Ok(()) => Tell::Done,
                Err(e) => Tell::Refused { why: e.to_string() },
            })
        };
        let guest = &self.shared.guest;
        let id = CONTAINER.to_owned();
        match *ask {
            Ask::Attach { owner, stdin } => {
                self.owner = owner;
                self.stdin = stdin;
                for (stream, to) in [Stream::Out, Stream::Err].into_iter().zip(fds) {
                    self.shared.outputs.attach(self.id, stream, to);
                }
                None
            }
            Ask::Wait | Ask::Detach => None,
            Ask::EndOfInput => {
                if self.stdin {
                    self.shared.clients.end_input();
                }
                None
            }
            Ask::Resize { rows, columns } => {
                let size = TtySize {
                    rows: rows.into(),
                    columns: columns.into(),
                };
                let request = ResizeTtyRequest {
                    id: Some(first()),
                    size: Some(size),
                };
                // A size that comes too early or too late is the terminal's at the start, or nobody's.
                let _ = guest.call(&request);
                None
            }
            Ask::Signal { signal } => {
                let request = SignalProcessRequest {
                    id: Some(first()),
                    signal: signal.0,
                    all: false,
                };
                done(guest.call(&request).map(drop))
            }
            Ask::Stop { timeout_s } => {
                self.shared.happened(Happening::Stop {
                    timeout_s,
                    why: None,
                });
                None
            }
            Ask::Pause => {
                let result = guest.call(&PauseContainerRequest { id }).map(drop);
                self.paused(true, result.is_ok());
                done(result)
            }
            Ask::Resume => {
                let result = guest.call(&ResumeContainerRequest { id }).map(drop);
                self.paused(false, result.is_ok());
                done(result)
            }
        }
    }

    fn paused(&self, paused: bool, done: bool) {
        if done {
            self.shared.happened(Happening::Paused(paused));
        }
    }
}

/// The container's first process.
pub(crate) fn first() -> ProcessId {
    ProcessId {
        container: CONTAINER.into(),
        exec: String::new(),
    }
}
