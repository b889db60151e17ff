//! What is known of pods, on disk (ADR 0018).
//!
//! ```text
//!  STATE/pods/ID/pod.json       as it shall be; written once            (state directory)
//!                state.json     as it is; replaced whole
//!                lock           held by its supervisor, and before by who makes it
//!                log, log.1     the container's output
//!                console.log    what the guest's kernel and agent said
//!                vmm.log        what the VMM said
//!                supervisor.log
//!  STATE/volumes/NAME/          named volumes
//!  STATE/events                 a JSON line for each thing that happened
//!  RUN/ID/                      sockets; gone with the pod               (runtime directory)
//! ```
//! Whoever finds a pod that is not ended and whose lock nobody holds knows that its supervisor was killed,
//! and repairs: the kernel has ended the VMM with it, the sockets are removed here.

mod directories;
mod events;
mod lock;
mod record;
mod table;

pub use directories::{Directories, DirectoriesError};
pub use events::{Event, EventLog};
pub use lock::{Held, LockError};
pub use record::{End, Phase, State};
pub use table::{Entry, StateError, find, list, new_id, repair};
