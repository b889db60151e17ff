//! Which namespaces a container has anew, which it joins.

use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;
use rustix::thread::UnshareFlags;
use testudo_agent_protocol::namespace::{From, Kind};
use testudo_agent_protocol::{ContainerSpec, Namespace};

use crate::failure::{During, Failure};

/// All kinds: as the protocol, the kernel and /proc name them.
const KINDS: &[(Kind, UnshareFlags, &str)] = &[
    (Kind::User, UnshareFlags::NEWUSER, "user"),
    (Kind::Mount, UnshareFlags::NEWNS, "mnt"),
    (Kind::Pid, UnshareFlags::NEWPID, "pid"),
    (Kind::Network, UnshareFlags::NEWNET, "net"),
    (Kind::Ipc, UnshareFlags::NEWIPC, "ipc"),
    (Kind::Uts, UnshareFlags::NEWUTS, "uts"),
    (Kind::Cgroup, UnshareFlags::NEWCGROUP, "cgroup"),
    (Kind::Time, UnshareFlags::NEWTIME, "time"),
];

/// What a container's specification asks for.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) anew: UnshareFlags,
    /// Kinds, and whose.
    pub(crate) joins: Vec<(Kind, String)>,
}

impl Plan {
    /// Reads a specification.
    pub(crate) fn of(spec: &ContainerSpec) -> Result<Self, Failure> {
        let none = Vec::new();
        let namespaces = spec.linux.as_ref().map_or(&none, |linux| &linux.namespaces);
        let mut plan = Self {
            anew: UnshareFlags::empty(),
            joins: Vec::new(),
        };
        let mut seen = Vec::new();
        for namespace in namespaces {
            let kind = namespace.kind();
            if seen.contains(&kind) {
                return Err(Failure::invalid(format!("two namespaces of kind {kind:?}")));
            }
            seen.push(kind);
            plan.add(namespace)?;
        }
        if !plan.anew.contains(UnshareFlags::NEWNS) {
            return Err(Failure::invalid(
                "a container needs a mount namespace of its own",
            ));
        }
        if !seen.contains(&Kind::Pid) {
            // It would see, and could kill, the agent.
            return Err(Failure::invalid(
                "a container needs a PID namespace: its own or another container's",
            ));
        }
        Ok(plan)
    }

    fn add(&mut self, namespace: &Namespace) -> Result<(), Failure> {
        let kind = namespace.kind();
        let known = KINDS.iter().find(|(known, _, _)| *known == kind);
        let (_, flag, _) =
            known.ok_or_else(|| Failure::invalid("a namespace of no kind that is known"))?;
        match namespace.from() {
            From::New => self.anew |= *flag,
            // The guest's own is what the sandbox's containers share.
            From::Sandbox => match kind {
                Kind::Network | Kind::Ipc | Kind::Uts | Kind::Cgroup | Kind::Time => {}
                _ => {
                    return Err(Failure::invalid(format!(
                        "the sandbox has no {kind:?} namespace to share; name a container"
                    )));
                }
            },
            From::Container => match kind {
                Kind::Mount | Kind::User => {
                    return Err(Failure::invalid(format!(
                        "a {kind:?} namespace cannot be another container's"
                    )));
                }
                _ => self.joins.push((kind, namespace.container.clone())),
            },
        }
        Ok(())
    }
}

/// A process's namespace, and its kind as the kernel numbers it.
pub(crate) fn open(pid: Pid, kind: Kind) -> Result<(u32, OwnedFd), Failure> {
    let (_, flag, name) = KINDS
        .iter()
        .find(|(known, _, _)| *known == kind)
        .ok_or_else(|| Failure::invalid("a namespace of no kind that is known"))?;
    let path = format!("/proc/{}/ns/{name}", pid.as_raw_nonzero());
    let fd = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .during(|| format!("open {path}"))?;
    Ok((flag.bits(), fd))
}

/// All namespaces of a process that differ from this one's, for one that shall join it.
pub(crate) fn all(pid: Pid) -> Result<Vec<(u32, OwnedFd)>, Failure> {
    let own = rustix::process::getpid();
    let mut found = Vec::new();
    for (kind, _, name) in KINDS {
        let link = |pid: Pid| {
            let path = format!("/proc/{}/ns/{name}", pid.as_raw_nonzero());
            rustix::fs::readlink(path, Vec::new()).ok()
        };
        let (theirs, ours) = (link(pid), link(own));
        // A user namespace that one is in already cannot be joined, and the others need not be.
        if theirs.is_some() && theirs != ours {
            found.push(open(pid, *kind)?);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use testudo_agent_protocol::Linux;

    use super::*;

    fn spec(namespaces: &[(Kind, From)]) -> ContainerSpec {
        ContainerSpec {
            linux: Some(Linux {
                namespaces: namespaces
                    .iter()
                    .map(|(kind, from)| Namespace {
                        kind: (*kind).into(),
                        from: (*from).into(),
                        container: "other".into(),
                    })
                    .collect(),
                ..Linux::default()
            }),
            ..ContainerSpec::default()
        }
    }

    #[test]
    fn a_container_is_apart_from_the_agent() {
        assert!(Plan::of(&spec(&[(Kind::Mount, From::New), (Kind::Pid, From::New)])).is_ok());
        for bad in [
            &[][..],
            &[(Kind::Mount, From::New)],
            &[(Kind::Pid, From::New)],
            &[(Kind::Mount, From::New), (Kind::Pid, From::Sandbox)],
            &[(Kind::Mount, From::Container), (Kind::Pid, From::New)],
            &[
                (Kind::Mount, From::New),
                (Kind::Pid, From::New),
                (Kind::Pid, From::New),
            ],
            &[
                (Kind::Mount, From::New),
                (Kind::Pid, From::New),
                (Kind::Unspecified, From::New),
            ],
        ] {
            assert!(Plan::of(&spec(bad)).is_err(), "{bad:?}");
        }
    }
}
