//! The machine of a pod: the VMM's arguments.

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use testudo_agent_protocol::READY_PORT;

use crate::container;
use crate::guest::VSOCK;
use crate::pod::{Pod, Root};

/// The guest's address; each VMM has a hypervisor's worth of addresses of its own.
const CID: u32 = 3;
/// The network device's address, by which the agent knows it.
pub(crate) const MAC: &str = "02:74:73:74:64:01";

/// How the guest reaches its network, as the VMM is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wire {
    /// A tap device.
    Tap(String),
    /// An inherited socket, at whose other end a user-mode stack is.
    Stream(RawFd),
}

/// The VMM's arguments. `sockets` is the pod's runtime folder, `folder` its own.
pub(crate) fn arguments(
    pod: &Pod,
    sockets: &Path,
    folder: &Path,
    wire: Option<&Wire>,
) -> Vec<OsString> {
    let machine = &pod.machine;
    let mut args: Vec<OsString> = vec!["run".into()];
    let mut pair = |flag: &str, value: OsString| args.extend([OsString::from(flag), value]);
    pair("--kernel", machine.kernel.clone().into());
    pair("--initrd", machine.initramfs.clone().into());
    pair("--cmdline", cmdline(pod).into());
    pair("--cpus", machine.cpus.to_string().into());
    pair("--memory", machine.memory.to_string().into());
    pair("--console", with("file:", &folder.join("console.log"), ""));
    pair(
        "--vsock",
        with(&format!("cid={CID},socket="), &sockets.join(VSOCK), ""),
    );
    pair("--control", sockets.join("control").into());
    for (tag, path, readonly) in container::folders(pod) {
        pair(
            "--fs",
            with(
                &format!("tag={tag},path="),
                &path,
                if readonly { ",ro" } else { "" },
            ),
        );
    }
    if let Root::Erofs(path) = &pod.root {
        pair(
            "--disk",
            with(
                "path=",
                path,
                &format!(",ro,serial={}", container::ROOT_TAG),
            ),
        );
    }
    if pod
        .mounts
        .iter()
        .any(|mount| matches!(mount, crate::pod::MountPlan::File { .. }))
    {
        let tag = container::FILES_TAG;
        pair(
            "--fs",
            with(&format!("tag={tag},path="), &sockets.join(tag), ",ro"),
        );
    }
    match wire {
        None => {}
        Some(Wire::Tap(name)) => pair("--net", format!("tap={name},mac={MAC}").into()),
        Some(Wire::Stream(socket)) => {
            pair(
                "--net",
                format!("stream=fd:{socket},mac={MAC},mtu=65520").into(),
            );
        }
    }
    args.extend(machine.args.iter().map(OsString::from));
    args
}

/// A path among options. Its commas are written twice.
fn with(before: &str, path: &Path, after: &str) -> OsString {
    let mut word = OsString::from(before);
    for (n, piece) in path
        .as_os_str()
        .as_bytes()
        .split(|b| *b == b',')
        .enumerate()
    {
        if n > 0 {
            word.push(",,");
        }
        word.push(OsStr::from_bytes(piece));
    }
    word.push(after);
    word
}

fn cmdline(pod: &Pod) -> String {
    let more = &pod.machine.cmdline;
    let mut line = format!("console=ttyS0 quiet panic=-1 agent.ready=vsock:{READY_PORT}");
    if !more.is_empty() {
        line.push(' ');
        line.push_str(more);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_of_a_path_are_written_twice() {
        let all = [
            ("a", "p=a,ro"),
            ("a,b,,c", "p=a,,b,,,,c,ro"),
            (",", "p=,,,ro"),
        ];
        for (path, word) in all {
            assert_eq!(with("p=", Path::new(path), ",ro"), *word);
        }
    }
}
