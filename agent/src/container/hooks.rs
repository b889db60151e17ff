//! Hooks: programs of the guest that run at points of a container's life (OCI runtime specification,
//! config.md, POSIX-platform hooks). Each gets the container's state as JSON on its standard input.
//!
//! Run here, in the guest's namespaces: `prestart` and `createRuntime` when the container's namespaces are
//! there, `poststart` when its process executes, `poststop` when it is removed.

use std::ffi::CString;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, kill_process};
use testudo_agent_protocol::{Hook, code};

use crate::children::{Children, Ended};
use crate::failure::{During, Failure};
use crate::sys::spawn::{Spawn, spawn};

/// What hooks are told.
#[derive(Debug, Clone)]
pub(crate) struct State {
    pub(crate) id: String,
    pub(crate) status: &'static str,
    pub(crate) pid: Option<Pid>,
    pub(crate) annotations: std::collections::BTreeMap<String, String>,
}

impl State {
    /// The state of the OCI runtime specification. There is no bundle in a guest: an empty path says so.
    pub(crate) fn json(&self) -> String {
        let annotations: Vec<String> = self
            .annotations
            .iter()
            .map(|(key, value)| format!("{}:{}", quoted(key), quoted(value)))
            .collect();
        format!(
            "{{\"ociVersion\":\"1.2.0\",\"id\":{},\"status\":{},\"pid\":{},\"bundle\":\"\",\"annotations\":{{{}}}}}",
            quoted(&self.id),
            quoted(self.status),
            self.pid.map_or(0, |pid| pid.as_raw_nonzero().get()),
            annotations.join(",")
        )
    }
}

/// A JSON string (RFC 8259 §7).
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            c if c < ' ' => quoted.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// Runs them one after the other; the first that fails is the failure.
pub(crate) fn run(
    point: &str,
    hooks: &[Hook],
    state: &State,
    children: &Children,
) -> Result<(), Failure> {
    for hook in hooks {
        one(point, hook, state, children)?;
    }
    Ok(())
}

fn one(point: &str, hook: &Hook, state: &State, children: &Children) -> Result<(), Failure> {
    let about = || format!("run {point} hook {}", hook.path);
    let strings = |of: &[String]| {
        let each = of.iter().map(|s| CString::new(s.as_str()));
        each.collect::<Result<Vec<_>, _>>()
            .map_err(|_| Failure::invalid(format!("{point} hook {} has a NUL byte", hook.path)))
    };
    if !hook.path.starts_with('/') {
        return Err(Failure::invalid(format!(
            "{point} hook {:?} is no absolute path",
            hook.path
        )));
    }
    let path = strings(std::slice::from_ref(&hook.path))?;
    let program = path
        .first()
        .ok_or_else(|| Failure::invalid("a hook without a path"))?;
    let args = if hook.args.is_empty() {
        path.clone()
    } else {
        strings(&hook.args)?
    };
    let env = strings(&hook.env)?;
    let (stdin, ours) = pipe_with(PipeFlags::CLOEXEC).during(about)?;
    let null = rustix::fs::open("/dev/null", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
    let null = null.during(about)?;
    let json = state.json();
    // It fits a pipe, or a hook that does not read could hold us up.
    rustix::io::ioctl_fionbio(&ours, true).during(about)?;
    let written = rustix::io::write(&ours, json.as_bytes()).during(about)?;
    if written != json.len() {
        return Err(Failure::invalid(
            "annotations too long for a hook's standard input",
        ));
    }
    drop(ours);
    let birth = children.birth();
    let fds = [
        std::os::fd::AsFd::as_fd(&stdin),
        std::os::fd::AsFd::as_fd(&null),
        std::os::fd::AsFd::as_fd(&null),
    ];
    let pid = spawn(&Spawn {
        program,
        args: &args,
        env: &env,
        fds: &fds,
    })
    .during(about)?;
    let patience = (hook.timeout_s != 0).then(|| Duration::from_secs(hook.timeout_s.into()));
    match children.wait(&birth, pid, patience) {
        Some(Ended::Code(0)) => Ok(()),
        Some(ended) => Err(Failure::new(format!(
            "{point} hook {} ended with {ended:?}",
            hook.path
        ))),
        None => {
            // Not reaped yet, for then its end would have been told: the number is still its own.
            let _ = kill_process(pid, Signal::KILL);
            Err(Failure::of(
                code::DEADLINE,
                format!(
                    "{point} hook {} took more than {} s",
                    hook.path, hook.timeout_s
                ),
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_is_json_whatever_the_annotations() {
        let state = State {
            id: "box".into(),
            status: "creating",
            pid: Pid::from_raw(7),
            annotations: [("a\"b".into(), "c\\\n".into())].into(),
        };
        assert_eq!(
            state.json(),
            r#"{"ociVersion":"1.2.0","id":"box","status":"creating","pid":7,"bundle":"","annotations":{"a\"b":"c\\\u000a"}}"#
        );
    }
}
