//! The container's view of files: its root, mounts and devices, and the step into it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, UnmountFlags, mount_change, move_mount, unmount,
};
use rustix::thread::UnshareFlags;
use testudo_agent_protocol::{ContainerSpec, Linux};

use super::channel::Order;
use super::options::{Options, root_propagation};
use super::terminal::{self, Terminal};
use super::{Given, devices, masks, mounts, tree};
use crate::failure::{During, Failure};
use crate::sys::mount_attr::{self, MountAttr, RDONLY};

/// Builds it all and steps in. Gives the terminal, if the process shall have one.
pub(super) fn build(
    order: &Order,
    spec: &ContainerSpec,
    given: &mut Given,
) -> Result<Option<Terminal>, Failure> {
    let none = Linux::default();
    let linux = spec.linux.as_ref().unwrap_or(&none);
    // Nothing that is mounted from here on is seen outside.
    let down = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", down).during(|| "part from the guest's mounts".into())?;
    let root = given
        .root
        .take()
        .ok_or_else(|| Failure::new("an order came without a root"))?;
    move_mount(
        &root,
        "",
        CWD,
        order.anchor.as_str(),
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .during(|| format!("mount the root on {}", order.anchor))?;
    for mount in &spec.mounts {
        let source = match &mount.from {
            Some(_) => Some(given.binds.next().ok_or_else(|| {
                Failure::new(format!("nothing came to mount on {}", mount.destination))
            })?),
            None => None,
        };
        mounts::attach(root.as_fd(), mount, source)?;
    }
    devices::make(root.as_fd(), spec, order.bind_devices)?;
    let process = spec.process.clone().unwrap_or_default();
    let terminal = if process.terminal {
        let terminal = terminal::open(root.as_fd(), &process)?;
        terminal.show(root.as_fd())?;
        Some(terminal)
    } else {
        None
    };
    // The last that needs the guest's files.
    let null = masks::null()?;
    for path in &linux.readonly_paths {
        masks::readonly(root.as_fd(), path)?;
    }
    for path in &linux.masked_paths {
        masks::mask(root.as_fd(), path, &null)?;
    }
    let proc = if linux.sysctl.is_empty() {
        None
    } else {
        Some(mounts::make("proc", "proc", &Options::default())?)
    };
    step_into(&root)?;
    if let Some(proc) = proc {
        sysctl(proc.as_fd(), linux)?;
    }
    finish_root(&root, spec, linux)?;
    name(order, spec)?;
    Ok(terminal)
}

/// The root becomes `/`, and what was `/` is gone.
fn step_into(root: &OwnedFd) -> Result<(), Failure> {
    let about = || "step into the root".into();
    rustix::process::fchdir(root).during(about)?;
    // pivot_root(2), NOTES: the old root ends up on top of the new one.
    rustix::process::pivot_root(".", ".").during(about)?;
    mount_change(
        ".",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .during(about)?;
    unmount(".", UnmountFlags::DETACH).during(|| "leave the guest's root".into())?;
    rustix::process::chdir("/").during(about)
}

fn finish_root(root: &OwnedFd, spec: &ContainerSpec, linux: &Linux) -> Result<(), Failure> {
    let (propagation, recursive) =
        root_propagation(&linux.rootfs_propagation).ok_or_else(|| {
            Failure::invalid(format!(
                "rootfs_propagation is {:?}; known are private, shared, slave, unbindable, and \
                 these with an r before them",
                linux.rootfs_propagation
            ))
        })?;
    let attr = MountAttr {
        propagation,
        ..MountAttr::default()
    };
    mount_attr::set(root, attr, recursive, None).during(|| "set the root's propagation".into())?;
    if spec.root.as_ref().is_some_and(|root| root.readonly) {
        let attr = MountAttr {
            set: RDONLY,
            ..MountAttr::default()
        };
        mount_attr::set(root, attr, false, None).during(|| "make the root read-only".into())?;
    }
    Ok(())
}

/// Written through a procfs that only this stage has: what is at /proc of the container may be a trap.
fn sysctl(proc: BorrowedFd<'_>, linux: &Linux) -> Result<(), Failure> {
    for (key, value) in &linux.sysctl {
        let about = || format!("set sysctl {key} to {value}");
        let path = Path::new("sys").join(key.replace('.', "/"));
        let file = rustix::fs::openat2(
            proc,
            &path,
            OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV,
        )
        .during(about)?;
        rustix::io::write(&file, value.as_bytes()).during(about)?;
    }
    Ok(())
}

fn name(order: &Order, spec: &ContainerSpec) -> Result<(), Failure> {
    let own = order.unshare & UnshareFlags::NEWUTS.bits() != 0;
    if !spec.hostname.is_empty() {
        if !own {
            // That of the sandbox; the specification asks for an error.
            return Err(Failure::invalid(
                "a hostname was given for a container without a UTS namespace of its own",
            ));
        }
        rustix::system::sethostname(spec.hostname.as_bytes())
            .during(|| format!("set hostname {}", spec.hostname))?;
    }
    if !spec.domainname.is_empty() && own {
        rustix::system::setdomainname(spec.domainname.as_bytes())
            .during(|| format!("set domain name {}", spec.domainname))?;
    }
    Ok(())
}

/// Opens a folder of the container as the process will see it.
pub(super) fn working_folder(path: &str) -> Result<(), Failure> {
    let path = if path.is_empty() { "/" } else { path };
    let about = || format!("enter the working folder {path}");
    match rustix::process::chdir(path) {
        Ok(()) => {}
        Err(rustix::io::Errno::NOENT) => {
            // As other runtimes do: an image need not have it.
            let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                .during(about)?;
            tree::folders(root.as_fd(), Path::new(path))?;
            rustix::process::chdir(path).during(about)?;
        }
        Err(e) => return Err(e).during(about),
    }
    // A path through a descriptor that leads out of the root would make this "(unreachable)…".
    let here = rustix::process::getcwd(Vec::new()).during(about)?;
    if here.to_bytes().starts_with(b"/") {
        return Ok(());
    }
    Err(Failure::invalid(format!(
        "the working folder {path} is outside of the root"
    )))
}
