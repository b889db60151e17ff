//! The specification of the container, and the storages it is made of.

use std::path::{Path, PathBuf};

use testudo_agent_protocol as agent;
use testudo_agent_protocol::namespace::Kind;
use testudo_agent_protocol::storage::Driver;

use super::seccomp::{ProfileError, profile};
use crate::pod::{Limits, MountPlan, Pod, ProcessPlan, Root};

/// The container's id in its guest: there is one.
pub const CONTAINER: &str = "main";
/// The virtio-fs tag of a root that is a folder.
pub const ROOT_TAG: &str = "root";
/// That of single files.
pub const FILES_TAG: &str = "files";
/// The serial number of a root that is a disk.
const ROOT_DISK: &str = "root";
/// What the agent shares among a sandbox's containers.
const SANDBOX: &str = "sandbox";

const MASKED: &[&str] = &[
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READONLY: &[&str] = &[
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Folders of the host that the guest sees, by tag: tag, folder, read-only.
pub fn folders(pod: &Pod) -> Vec<(String, PathBuf, bool)> {
    let root = match &pod.root {
        Root::Directory(path) => Some((ROOT_TAG.to_owned(), path.clone(), true)),
        Root::Erofs(_) => None,
    };
    let volumes = pod
        .mounts
        .iter()
        .zip(0_usize..)
        .filter_map(|(mount, number)| match mount {
            MountPlan::Folder {
                source, readonly, ..
            } => Some((tag(number), source.clone(), *readonly)),
            MountPlan::File { .. } | MountPlan::Tmpfs { .. } => None,
        });
    root.into_iter().chain(volumes).collect()
}

fn tag(number: usize) -> String {
    format!("volume{number}")
}

fn storage(id: &str, driver: Driver, readonly: bool) -> agent::Storage {
    agent::Storage {
        id: id.into(),
        driver: Some(driver),
        readonly,
        ..agent::Storage::default()
    }
}

fn shared(tag: &str, readonly: bool) -> agent::Storage {
    let driver = agent::VirtioFs {
        tag: tag.into(),
        options: Vec::new(),
    };
    storage(tag, Driver::VirtioFs(driver), readonly)
}

/// The root is never written to: what the container writes is in the guest's memory.
fn storages(pod: &Pod) -> Vec<agent::Storage> {
    let mut all: Vec<agent::Storage> = folders(pod)
        .iter()
        .map(|(tag, _, ro)| shared(tag, *ro))
        .collect();
    if let Root::Erofs(_) = &pod.root {
        let at = agent::device_address::At::DiskSerial(ROOT_DISK.into());
        let disk = agent::Block {
            device: Some(agent::DeviceAddress { at: Some(at) }),
            filesystem: "erofs".into(),
            ..agent::Block::default()
        };
        all.push(storage(ROOT_TAG, Driver::Block(disk), true));
    }
    if pod
        .mounts
        .iter()
        .any(|mount| matches!(mount, MountPlan::File { .. }))
    {
        all.push(shared(FILES_TAG, true));
    }
    let overlay = agent::Overlay {
        lower: vec![place(ROOT_TAG, "")],
        scratch: true,
        ..agent::Overlay::default()
    };
    all.push(storage("rootfs", Driver::Overlay(overlay), false));
    all
}

fn place(storage: &str, path: &str) -> agent::Place {
    agent::Place {
        storage: storage.into(),
        path: path.into(),
    }
}

/// What is asked of the agent.
pub fn request(pod: &Pod) -> Result<agent::CreateContainerRequest, ProfileError> {
    Ok(agent::CreateContainerRequest {
        id: CONTAINER.into(),
        spec: Some(spec(pod)?),
        stdio: None,
        storages: storages(pod),
    })
}

/// The specification.
pub fn spec(pod: &Pod) -> Result<agent::ContainerSpec, ProfileError> {
    let kinds = [Kind::Pid, Kind::Mount, Kind::Ipc, Kind::Uts, Kind::Cgroup];
    let namespace = |kind: Kind| agent::Namespace {
        kind: kind.into(),
        ..agent::Namespace::default()
    };
    let strings = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    Ok(agent::ContainerSpec {
        process: Some(process(&pod.process)),
        root: Some(agent::Root {
            place: Some(place("rootfs", "")),
            readonly: pod.root_readonly,
        }),
        hostname: pod.hostname.clone(),
        mounts: mounts(pod),
        linux: Some(agent::Linux {
            namespaces: kinds.map(namespace).to_vec(),
            resources: Some(resources(&pod.limits)),
            sysctl: pod.sysctls.iter().cloned().collect(),
            seccomp: profile(&pod.seccomp, &pod.process.capabilities)?,
            masked_paths: strings(MASKED),
            readonly_paths: strings(READONLY),
            ..agent::Linux::default()
        }),
        ..agent::ContainerSpec::default()
    })
}

/// A further process: as the first, but for what is said.
pub fn exec_process(plan: &ProcessPlan) -> agent::Process {
    process(plan)
}

fn process(plan: &ProcessPlan) -> agent::Process {
    let limit = |limit: &crate::values::Ulimit| agent::Rlimit {
        kind: limit.kind.clone(),
        soft: limit.soft,
        hard: limit.hard,
    };
    let capabilities = &plan.capabilities;
    // A user that is not root starts without, and can gain no more than these by setuid programs.
    let own = if plan.uid == 0 {
        capabilities.clone()
    } else {
        Vec::new()
    };
    agent::Process {
        terminal: plan.terminal,
        console_size: plan.terminal.then(|| agent::TtySize {
            rows: u32::from(plan.size.0),
            columns: u32::from(plan.size.1),
        }),
        user: Some(agent::User {
            uid: plan.uid,
            gid: plan.gid,
            additional_gids: plan.groups.clone(),
            umask: None,
        }),
        args: plan.args.clone(),
        env: plan.env.clone(),
        cwd: plan.cwd.clone(),
        capabilities: Some(agent::Capabilities {
            bounding: capabilities.clone(),
            effective: own.clone(),
            permitted: own,
            ..agent::Capabilities::default()
        }),
        rlimits: plan.ulimits.iter().map(limit).collect(),
        no_new_privileges: plan.no_new_privileges,
        apparmor_profile: plan.apparmor.clone(),
        ..agent::Process::default()
    }
}

fn resources(limits: &Limits) -> agent::Resources {
    let memory = limits
        .memory
        .map(|size| i64::try_from(size.0).unwrap_or(i64::MAX));
    let quota = limits.cpus.and_then(crate::values::Cpus::quota);
    agent::Resources {
        memory: memory.map(|limit| agent::Memory {
            limit: Some(limit),
            ..agent::Memory::default()
        }),
        cpu: quota.map(|quota| agent::Cpu {
            quota: Some(i64::from(quota)),
            period: Some(100_000),
            ..agent::Cpu::default()
        }),
        pids_max: limits.pids,
        devices: device_rules(),
        ..agent::Resources::default()
    }
}

/// Nothing but the usual devices, and terminals of its own; any may be made.
fn device_rules() -> Vec<agent::DeviceRule> {
    let rule = |allow, kind: &str, major, minor, access: &str| agent::DeviceRule {
        allow,
        kind: kind.into(),
        major,
        minor,
        access: access.into(),
    };
    let usual = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)];
    let usual = usual.map(|(major, minor)| rule(true, "c", Some(major), Some(minor), "rwm"));
    let makes = [
        rule(true, "c", None, None, "m"),
        rule(true, "b", None, None, "m"),
    ];
    let terminals = rule(true, "c", Some(136), None, "rwm");
    std::iter::once(rule(false, "a", None, None, "rwm"))
        .chain(makes)
        .chain(usual)
        .chain([terminals])
        .collect()
}

fn mount(destination: &str, kind: &str, options: &[&str]) -> agent::Mount {
    agent::Mount {
        destination: destination.into(),
        kind: kind.into(),
        source: kind.into(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..agent::Mount::default()
    }
}

fn bind(destination: &str, from: agent::Place, readonly: bool) -> agent::Mount {
    let options: &[&str] = if readonly {
        &["rbind", "rprivate", "ro"]
    } else {
        &["rbind", "rprivate"]
    };
    agent::Mount {
        from: Some(from),
        source: String::new(),
        ..mount(destination, "bind", options)
    }
}

fn mounts(pod: &Pod) -> Vec<agent::Mount> {
    let mut all = vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount(
            "/dev",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "/dev/pts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            &["ro", "nosuid", "noexec", "nodev"],
        ),
        mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        bind("/dev/shm", place(SANDBOX, "shm"), false),
    ];
    let taken = |path: &str| pod.mounts.iter().any(|mount| destination(mount) == path);
    for file in ["resolv.conf", "hosts", "hostname"] {
        let at = format!("/etc/{file}");
        if !taken(&at) {
            all.push(bind(&at, place(SANDBOX, file), false));
        }
    }
    // A mount below another comes after it.
    let mut own: Vec<(&MountPlan, usize)> = pod.mounts.iter().zip(0..).collect();
    own.sort_by_key(|(mount, _)| Path::new(destination(mount)).components().count());
    for (plan, number) in own {
        all.push(match plan {
            MountPlan::Folder {
                destination,
                readonly,
                ..
            } => bind(destination, place(&tag(number), ""), *readonly),
            MountPlan::File { destination, .. } => {
                bind(destination, place(FILES_TAG, &file_name(number)), true)
            }
            MountPlan::Tmpfs {
                destination,
                options,
            } => {
                let options: Vec<&str> = options.iter().map(String::as_str).collect();
                mount(destination, "tmpfs", &options)
            }
        });
    }
    all
}

/// What a single file is called among [`FILES_TAG`].
pub(crate) fn file_name(number: usize) -> String {
    format!("file{number}")
}

fn destination(plan: &MountPlan) -> &str {
    match plan {
        MountPlan::Folder { destination, .. }
        | MountPlan::File { destination, .. }
        | MountPlan::Tmpfs { destination, .. } => destination,
    }
}
