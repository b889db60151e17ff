//! Commands that talk to the supervisor: the one that made the pod, and others through its socket.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
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
pub(crate) struct Clients {
    next: AtomicU64,
    links: Mutex<Vec<(u64, Arc<Link>)>>,
    /// What each new one is told first: whether it runs, and how it ended.
    news: Mutex<Vec<Tell>>,
    /// To the thread that writes the container's standard input. What waits there is bounded by what each
    /// client may send before it is told that something was taken.
    input: Sender<Input>,
    /// Its end, until that thread is there.
    waiting: Mutex<Option<Receiver<Input>>>,
}

/// For the container's standard input.
enum Input {
    /// From this client.
    Bytes(u64, Vec<u8>),
    /// There is no more.
    End,
}

impl Default for Clients {
    fn default() -> Self {
        let (input, waiting) = channel();
        Self {
            next: AtomicU64::default(),
            links: Mutex::default(),
            news: Mutex::default(),
            input,
            waiting: Mutex::new(Some(waiting)),
        }
    }
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

    fn taken(&self, id: u64) {
        if let Some((_, link)) = lock(&self.links).iter().find(|(other, _)| *other == id) {
            // One that has gone needs no telling.
            let _ = link.tell(&Tell::Taken);
        }
    }

    fn input(&self, input: Input) {
        // The other end is kept as long as this.
        let _ = self.input.send(input);
    }
}

/// From now on there is somebody to take input: by a thread of its own, for a container may take none for long.
pub(crate) fn take_input(shared: &Arc<Shared>, mut stream: UnixStream) -> io::Result<()> {
    let Some(waiting) = lock(&shared.clients.waiting).take() else {
        return Ok(());
    };
    shared.thread("in", move |shared| {
        for input in waiting {
            match input {
                Input::Bytes(id, bytes) => {
                    // What a container takes no more is gone, as with a pipe.
                    let _ = stream.write_all(&bytes);
                    shared.clients.taken(id);
                }
                Input::End => end_of_input(&stream),
            }
        }
    })?;
    Ok(())
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
                Incoming::Gone => return self.owner,
                Incoming::Input(bytes) if self.stdin => {
                    self.shared.clients.input(Input::Bytes(self.id, bytes));
                }
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
                    self.shared.clients.input(Input::End);
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
