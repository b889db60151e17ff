//! Work that may take time: each job has a thread, and what comes of it is carried out by the loop, which
//! owns everything. A job gets what it needs by value and can reach nothing else.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use rustix::event::{EventfdFlags, eventfd};

use crate::agent::Agent;
use crate::failure::{During, Failure};
use testudo_agent_protocol::code;

/// What comes of a job.
pub(crate) type Then = Box<dyn FnOnce(&mut Agent) + Send>;

/// Jobs at once.
const MOST: usize = 128;
/// Jobs decode messages, open paths and write files.
const STACK: usize = 256 * 1024;

/// The loop's end of all jobs.
pub(crate) struct Jobs {
    done: Receiver<Then>,
    sender: Sender<Then>,
    bell: Arc<OwnedFd>,
    running: usize,
}

impl Jobs {
    pub(crate) fn new() -> io::Result<Self> {
        let (sender, done) = channel();
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            done,
            sender,
            bell: Arc::new(bell),
            running: 0,
        })
    }

    /// Starts a job.
    pub(crate) fn start(
        &mut self,
        name: &str,
        job: impl FnOnce() -> Then + Send + 'static,
    ) -> Result<(), Failure> {
        if self.running >= MOST {
            return Err(Failure::of(
                code::EXHAUSTED,
                format!("{MOST} requests that take time are under way already"),
            ));
        }
        let (sender, bell) = (self.sender.clone(), Arc::clone(&self.bell));
        thread::Builder::new()
            .name(name.into())
            .stack_size(STACK)
            .spawn(move || {
                // Both fail only when the loop is gone, and the process with it.
                let _ = sender.send(job());
                let _ = rustix::io::write(&*bell, &1_u64.to_ne_bytes());
            })
            .during(|| "start a thread".into())?;
        self.running = self.running.saturating_add(1);
        Ok(())
    }

    /// What has come of jobs since.
    pub(crate) fn finished(&mut self) -> Vec<Then> {
        let mut count = [0; 8];
        let _ = rustix::io::read(&*self.bell, &mut count);
        let finished: Vec<Then> = self.done.try_iter().collect();
        self.running = self.running.saturating_sub(finished.len());
        finished
    }
}

impl AsFd for Jobs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
