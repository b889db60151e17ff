//! Threads that serve queues: an event loop to which models attach their workers.
//!
//! ```text
//!   IoThread::spawn(name, first) ─▶ first() ─Ok─▶ loop: epoll ─▶ worker.process(event)
//!   handle.attach(worker) ─▶ Attachment ──detach()──▶ the worker, no longer called, no event lost:
//!                                    └──drop──▶ same, and the worker is dropped on the caller
//! ```
//! `first` runs in the new thread before anything else; it is where the VMM installs the thread's
//! seccomp filter. Attaching and detaching are synchronous calls into the loop: when they return,
//! the worker is in it or out of it. They must not be made from a worker of the same thread, which
//! is refused with an error. Workers are `event-manager` subscribers; one that cannot register its
//! descriptors in `init` tells its device, since `init` returns nothing.

use std::any::Any;
use std::io;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle, ThreadId};

use event_manager::{EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberId};
use thiserror::Error;

/// A worker of any type, as the loop holds it.
trait Worker: MutEventSubscriber + Any + Send {}

impl<T: MutEventSubscriber + Any + Send> Worker for T {}

type Endpoint = RemoteEndpoint<Box<dyn Worker>>;

/// The thread could not be started.
#[derive(Debug, Error)]
pub enum SpawnError {
    /// No event loop.
    #[error("cannot make the event loop of thread {name}; check the limit of open files")]
    Loop {
        /// The thread.
        name: String,
        /// Why.
        source: event_manager::Error,
    },
    /// No thread.
    #[error("cannot start thread {name}")]
    Thread {
        /// The thread.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What was to run first in the thread failed, and the thread has ended.
    #[error("thread {name} ended while setting itself up")]
    First {
        /// The thread.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A worker could not be attached; it has been dropped.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The caller is the thread it asks.
    #[error("thread {name} cannot attach a worker to itself")]
    SelfCall {
        /// The thread.
        name: Arc<str>,
    },
    /// The thread is gone.
    #[error("thread {name} has ended")]
    Ended {
        /// The thread.
        name: Arc<str>,
        /// What the loop says.
        source: event_manager::Error,
    },
}

/// A worker could not be taken back.
#[derive(Debug, Error)]
pub enum DetachError {
    /// The caller is the thread it asks.
    #[error("thread {name} cannot detach a worker from itself")]
    SelfCall {
        /// The thread.
        name: Arc<str>,
    },
    /// The thread is gone, and the worker with it.
    #[error("thread {name} has ended")]
    Ended {
        /// The thread.
        name: Arc<str>,
        /// What the loop says.
        source: event_manager::Error,
    },
}

/// The owner of a thread: dropping it ends the loop after the event in hand and joins the thread.
/// Workers still attached are dropped in the thread.
pub struct IoThread {
    handle: IoHandle,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Where workers are attached; clones reach the same thread.
#[derive(Clone)]
pub struct IoHandle {
    name: Arc<str>,
    id: ThreadId,
    endpoint: Endpoint,
}

impl IoThread {
    /// Starts a thread called `name` (the kernel shows 15 bytes) that runs `first`, then serves.
    pub fn spawn(
        name: &str,
        first: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> Result<Self, SpawnError> {
        let manager = EventManager::new().map_err(|source| SpawnError::Loop {
            name: name.into(),
            source,
        })?;
        let endpoint = manager.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let (report, reported) = mpsc::sync_channel(1);
        let thread = thread::Builder::new()
            .name(name.into())
            .spawn(move || {
                let ready = first();
                let go = ready.is_ok();
                if report.send(ready).is_ok() && go {
                    serve(manager, &stopped);
                }
            })
            .map_err(|source| SpawnError::Thread {
                name: name.into(),
                source,
            })?;
        let ready = reported
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("it ended without a word")));
        if let Err(source) = ready {
            return Err(SpawnError::First {
                name: name.into(),
                source,
            });
        }
        let handle = IoHandle {
            name: name.into(),
            id: thread.thread().id(),
            endpoint,
        };
        Ok(Self {
            handle,
            stop,
            thread: Some(thread),
        })
    }

    /// Where workers are attached.
    pub fn handle(&self) -> IoHandle {
        self.handle.clone()
    }
}

fn serve(mut manager: EventManager<Box<dyn Worker>>, stop: &AtomicBool) {
    while !stop.load(Ordering::Acquire) {
        if let Err(e) = manager.run() {
            log::error!("event loop of {:?}: {e}", thread::current().name());
            return;
        }
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Err(e) = self.handle.endpoint.kick() {
            log::error!("cannot end thread {}: {e}", self.handle.name);
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            // A thread that panicked has said so itself.
            let _ = thread.join();
        }
    }
}

impl IoHandle {
    /// Puts `worker` into the loop; its `init` has run when this returns.
    pub fn attach<T>(&self, worker: T) -> Result<Attachment<T>, AttachError>
    where
        T: MutEventSubscriber + Send + 'static,
    {
        let name = Arc::clone(&self.name);
        if self.is_current() {
            return Err(AttachError::SelfCall { name });
        }
        let worker: Box<dyn Worker> = Box::new(worker);
        let added = self
            .endpoint
            .call_blocking::<_, _, event_manager::Error>(move |ops| Ok(ops.add_subscriber(worker)));
        match added {
            Ok(id) => Ok(Attachment {
                handle: self.clone(),
                id: Some(id),
                worker: PhantomData,
            }),
            Err(source) => Err(AttachError::Ended { name, source }),
        }
    }

    fn is_current(&self) -> bool {
        thread::current().id() == self.id
    }
}

/// The guard of an attached worker.
#[must_use = "dropping it detaches the worker"]
pub struct Attachment<T> {
    handle: IoHandle,
    id: Option<SubscriberId>,
    worker: PhantomData<fn() -> T>,
}

impl<T: MutEventSubscriber + Send + 'static> Attachment<T> {
    /// Takes the worker out of the loop and returns it as its last event left it.
    pub fn detach(mut self) -> Result<T, DetachError> {
        self.take()
    }

    /// Runs `f` on the worker in its thread, between events.
    pub fn with<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut T) -> R + Send + 'static,
    ) -> Result<R, DetachError> {
        let name = Arc::clone(&self.handle.name);
        if self.handle.is_current() {
            return Err(DetachError::SelfCall { name });
        }
        let id = self.id;
        let called = self.handle.endpoint.call_blocking(move |ops| {
            let id = id.ok_or(event_manager::Error::InvalidId)?;
            let worker: &mut dyn Any = ops.subscriber_mut(id)?.as_mut();
            let worker = worker
                .downcast_mut::<T>()
                .ok_or(event_manager::Error::InvalidId)?;
            Ok::<_, event_manager::Error>(f(worker))
        });
        called.map_err(|source| DetachError::Ended { name, source })
    }
}

impl<T: 'static> Attachment<T> {
    fn take(&mut self) -> Result<T, DetachError> {
        let name = Arc::clone(&self.handle.name);
        if self.handle.is_current() {
            return Err(DetachError::SelfCall { name });
        }
        let id = self.id.take();
        let removed = self.handle.endpoint.call_blocking(move |ops| {
            let id = id.ok_or(event_manager::Error::InvalidId)?;
            ops.remove_subscriber(id)
        });
        let worker: Box<dyn Any> = removed.map_err(|source| DetachError::Ended {
            name: Arc::clone(&name),
            source,
        })?;
        worker
            .downcast::<T>()
            .map(|worker| *worker)
            .map_err(|_| DetachError::Ended {
                name,
                source: event_manager::Error::InvalidId,
            })
    }
}

impl<T> Drop for Attachment<T> {
    fn drop(&mut self) {
        let Some(id) = self.id.take() else {
            return;
        };
        if self.handle.is_current() {
            // Inside the loop: it takes the worker out after the event in hand.
            let fired = self.handle.endpoint.fire(move |ops| {
                let _ = ops.remove_subscriber(id);
            });
            if let Err(e) = fired {
                log::debug!("detach from {}: {e}", self.handle.name);
            }
            return;
        }
        let removed = self
            .handle
            .endpoint
            .call_blocking(move |ops| ops.remove_subscriber(id));
        drop::<Result<Box<dyn Worker>, event_manager::Error>>(removed);
    }
}

#[cfg(test)]
mod tests;
