//! The last steps: identity, filter, and the program.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::io::Errno;
use testudo_agent_protocol::Process;

use super::identity::{self, Sets};
use super::{limits, root};
use crate::failure::{During, Failure};
use crate::sys::exec;

/// Where a program is looked for if the environment does not say.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A process that only has to be executed.
pub(super) struct Ready {
    process: Process,
    sets: Sets,
    args: Vec<CString>,
    env: Vec<CString>,
    /// The filter's steps and flags.
    filter: (Vec<u8>, u32),
}

/// Everything that can be checked before the word to start.
pub(super) fn prepare(process: &Process, filter: (Vec<u8>, u32)) -> Result<Ready, Failure> {
    let strings = |of: &[String], what: &str| {
        of.iter()
            .map(|s| CString::new(s.as_str()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| Failure::invalid(format!("{what} contains a NUL byte")))
    };
    let args = strings(&process.args, "an argument")?;
    if args.first().is_none_or(|program| program.is_empty()) {
        return Err(Failure::invalid("a process without a program"));
    }
    let mut env = strings(&process.env, "the environment")?;
    if !process.env.iter().any(|pair| pair.starts_with("HOME=")) {
        let uid = process.user.as_ref().map_or(0, |user| user.uid);
        if let Some(home) = home_of(uid).and_then(|home| CString::new(format!("HOME={home}")).ok())
        {
            env.push(home);
        }
    }
    let sets = Sets::read(process.capabilities.as_ref())?;
    limits::set(process)?;
    Ok(Ready {
        process: process.clone(),
        sets,
        args,
        env,
        filter,
    })
}

/// By the container's own list of users.
fn home_of(uid: u32) -> Option<String> {
    let users = std::fs::read_to_string("/etc/passwd").ok()?;
    let line = users
        .lines()
        .find(|line| line.split(':').nth(2).and_then(|id| id.parse().ok()) == Some(uid));
    match line.and_then(|line| line.split(':').nth(5)) {
        Some(home) if !home.is_empty() => Some(home.to_owned()),
        _ => Some("/".into()),
    }
}

impl Ready {
    /// Becomes the process. Returns only what went wrong.
    pub(super) fn execute(self) -> Failure {
        match self.try_execute() {
            Ok(never) => match never {},
            Err(failure) => failure,
        }
    }

    fn try_execute(&self) -> Result<std::convert::Infallible, Failure> {
        // Before the change of user, who need not be allowed to see it; again after, for a file system that
        // knows only that user.
        let early = root::working_folder(&self.process.cwd);
        if !self.process.no_new_privileges {
            // Takes a right that the process itself may not have.
            self.filter()?;
        }
        identity::take_on(&self.process, &self.sets)?;
        early.or_else(|_| root::working_folder(&self.process.cwd))?;
        if self.process.no_new_privileges {
            rustix::thread::set_no_new_privs(true).during(|| "give up new privileges".into())?;
        }
        exec::close_on_exec_from(3).during(|| "close what is open".into())?;
        exec::default_sigpipe();
        let program = self.program()?;
        if self.process.no_new_privileges {
            self.filter()?;
        }
        let refused = exec::execve(&program, &self.args, &self.env);
        Err(self.explain(refused))
    }

    fn filter(&self) -> Result<(), Failure> {
        let (program, flags) = &self.filter;
        if program.is_empty() {
            return Ok(());
        }
        exec::filter(program, *flags).during(|| "install the system call filter".into())
    }

    fn name(&self) -> &str {
        self.process.args.first().map_or("", String::as_str)
    }

    /// A name without a slash is looked for in the process's own PATH.
    fn program(&self) -> Result<CString, Failure> {
        let name = self.name();
        let nul = |_| Failure::invalid("a program's name contains a NUL byte");
        if name.contains('/') {
            return CString::new(name).map_err(nul);
        }
        let path = self
            .process
            .env
            .iter()
            .find_map(|pair| pair.strip_prefix("PATH="))
            .unwrap_or(DEFAULT_PATH);
        let mut denied = None;
        for folder in path.split(':') {
            let folder = if folder.is_empty() { "." } else { folder };
            let candidate = Path::new(folder).join(name);
            match rustix::fs::access(&candidate, rustix::fs::Access::EXEC_OK) {
                Ok(()) if candidate.is_file() => {
                    return CString::new(candidate.as_os_str().as_bytes()).map_err(nul);
                }
                Err(e @ Errno::ACCESS) => denied = Some(e),
                Ok(()) | Err(_) => {}
            }
        }
        Err(self.explain(denied.unwrap_or(Errno::NOENT).into()))
    }

    fn explain(&self, source: io::Error) -> Failure {
        let code = match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => testudo_agent_protocol::code::NOT_FOUND,
            _ => testudo_agent_protocol::code::INVALID,
        };
        Failure {
            code,
            what: format!("execute {}", self.name()),
            source: Some(source),
        }
    }
}
