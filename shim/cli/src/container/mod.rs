//! From a pod to what the agent is asked for: the container's specification and its storages.
//!
//! Pure but for [`users`](mod@users), which reads the root's own lists of users. Defaults are those that
//! users of Docker know: capabilities, masked and read-only paths, mounts, system calls.

mod capabilities;
mod seccomp;
mod spec;
mod syscalls;
mod users;

pub use capabilities::{UnknownCapability, capabilities};
pub use seccomp::{ProfileError, profile};
pub(crate) use spec::file_name;
pub use spec::{CONTAINER, FILES_TAG, ROOT_TAG, exec_process, folders, request, spec};
pub use users::{UserError, UserLists, Who, who};
