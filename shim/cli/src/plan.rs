//! From flags, configuration and image to a [`Pod`].

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};

use crate::args::RunArgs;
use crate::config::Config;
use crate::container::{capabilities, who};
use crate::image::Image;
use crate::places::{INITRAMFS, KERNEL, VMM, passt};
use crate::pod::{Limits, MachinePlan, MountPlan, NetPlan, Pod, ProcessPlan, SeccompPlan};
use crate::state::Directories;
use crate::values::{EnvWord, NetWord, SecurityOption, Signal, Size, VolumeSource};

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// A guest of ours does not boot with less.
const LEAST: Size = Size(48 << 20);

/// Everything decided.
pub fn plan(
    args: &RunArgs,
    image: &Image,
    config: &Config,
    at: &Directories,
) -> anyhow::Result<Pod> {
    let id = crate::state::new_id().context("cannot make an id")?;
    let security = Security::read(&args.security_opt)?;
    let process = process(args, image, &id, &security)?;
    let stop_signal = match (&args.stop_signal, &image.config.stop_signal) {
        (Some(signal), _) => *signal,
        (None, Some(word)) => word.parse().context("the image's stop signal")?,
        (None, None) => Signal::TERM,
    };
    let hostname = args
        .hostname
        .as_ref()
        .map_or_else(|| id.clone(), |name| name.0.clone());
    Ok(Pod {
        name: args
            .name
            .as_ref()
            .map_or_else(|| format!("pod-{id}"), |name| name.0.clone()),
        image: args.image.clone(),
        created_ms: crate::clock::now_ms(),
        root: image.root.clone(),
        root_readonly: args.read_only,
        process,
        hostname,
        mounts: mounts(args, at)?,
        sysctls: args
            .sysctl
            .iter()
            .map(|pair| (pair.0.clone(), pair.1.clone()))
            .collect(),
        seccomp: security.seccomp,
        limits: Limits {
            memory: args.memory,
            cpus: args.cpus,
            pids: args.pids_limit,
        },
        net: net(args, config)?,
        machine: machine(args, config)?,
        remove: args.rm,
        detached: args.detach,
        stop_signal,
        timeout_s: args.timeout,
        log_bytes: config.log_size.0,
        start_timeout_s: config.guest_start_timeout,
        id,
    })
}

struct Security {
    seccomp: SeccompPlan,
    no_new_privileges: bool,
    apparmor: String,
}

impl Security {
    fn read(options: &[SecurityOption]) -> anyhow::Result<Self> {
        let mut all = Self {
            seccomp: SeccompPlan::Default,
            no_new_privileges: false,
            apparmor: String::new(),
        };
        for option in options {
            match option {
                SecurityOption::Unconfined => all.seccomp = SeccompPlan::Unconfined,
                SecurityOption::Profile(path) => {
                    let text = std::fs::read_to_string(path);
                    let text = text.with_context(|| {
                        format!("cannot read the seccomp profile {}", path.display())
                    })?;
                    all.seccomp = SeccompPlan::Profile(text);
                    // A profile that cannot be used is found out here, not in the guest.
                    crate::container::profile(&all.seccomp, &[])
                        .with_context(|| path.display().to_string())?;
                }
                SecurityOption::NoNewPrivileges(on) => all.no_new_privileges = *on,
                SecurityOption::AppArmor(profile) => all.apparmor.clone_from(profile),
            }
        }
        Ok(all)
    }
}

fn process(
    args: &RunArgs,
    image: &Image,
    id: &str,
    security: &Security,
) -> anyhow::Result<ProcessPlan> {
    let config = &image.config;
    let user = match (&args.user, config.user.as_str()) {
        (Some(user), _) => Some(user.clone()),
        (None, word) if !word.is_empty() => Some(
            word.parse()
                .map_err(anyhow::Error::msg)
                .context("the image's user")?,
        ),
        _ => None,
    };
    let who = who(user.as_ref(), &image.users)?;
    let hostname = args.hostname.as_ref().map_or(id, |name| name.0.as_str());
    let cwd = args
        .workdir
        .clone()
        .unwrap_or_else(|| config.working_dir.clone());
    let cwd = if cwd.is_empty() { "/".to_owned() } else { cwd };
    ensure!(
        cwd.starts_with('/'),
        "the working folder {cwd:?} is not absolute"
    );
    Ok(ProcessPlan {
        args: command(args, image)?,
        env: environment(args, image, hostname)?,
        cwd,
        uid: who.uid,
        gid: who.gid,
        groups: who.groups,
        terminal: args.tty,
        stdin: args.interactive,
        size: crate::terminal::size().unwrap_or((24, 80)),
        capabilities: capabilities(&args.cap_add, &args.cap_drop)?,
        no_new_privileges: security.no_new_privileges,
        apparmor: security.apparmor.clone(),
        ulimits: args.ulimit.clone(),
    })
}

/// An entry point that is given makes the image's command meaningless.
fn command(args: &RunArgs, image: &Image) -> anyhow::Result<Vec<String>> {
    let config = &image.config;
    let (entry, own): (Vec<String>, &[String]) = match &args.entrypoint {
        None => (config.entrypoint.clone(), &config.cmd),
        Some(program) if program.is_empty() => (Vec::new(), &[]),
        Some(program) => (vec![program.clone()], &[]),
    };
    let rest = if args.command.is_empty() {
        own
    } else {
        &args.command
    };
    let all: Vec<String> = entry.into_iter().chain(rest.iter().cloned()).collect();
    ensure!(
        !all.is_empty(),
        "{} says no command to run; write one after it",
        args.image
    );
    Ok(all)
}

/// Later ones win: the image's, files', flags'.
fn environment(args: &RunArgs, image: &Image, hostname: &str) -> anyhow::Result<Vec<String>> {
    let mut all: Vec<String> = Vec::new();
    let mut set = |pair: String| {
        let name = pair.split('=').next().unwrap_or_default().to_owned();
        all.retain(|other| other.split('=').next() != Some(&name));
        all.push(pair);
    };
    set(PATH.to_owned());
    set(format!("HOSTNAME={hostname}"));
    if args.tty {
        set("TERM=xterm".to_owned());
    }
    for (name, value) in &image.config.env {
        set(format!("{name}={value}"));
    }
    let mut words = Vec::new();
    for path in &args.env_file {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let read = EnvWord::read_file(&text).map_err(anyhow::Error::msg);
        words.extend(read.with_context(|| path.display().to_string())?);
    }
    words.extend(args.env.iter().cloned());
    for word in words {
        match word {
            EnvWord::Set(name, value) => set(format!("{name}={value}")),
            EnvWord::Inherit(name) => {
                if let Some(value) = std::env::var_os(&name) {
                    let value = value.into_string();
                    let value =
                        value.map_err(|_| anyhow::anyhow!("the variable {name} is not UTF-8"))?;
                    set(format!("{name}={value}"));
                }
            }
        }
    }
    Ok(all)
}

fn mounts(args: &RunArgs, at: &Directories) -> anyhow::Result<Vec<MountPlan>> {
    let mut all = Vec::new();
    for volume in &args.volumes {
        let destination = volume.destination.clone();
        let source = match &volume.source {
            VolumeSource::Path(path) => path.clone(),
            VolumeSource::Named(name) => {
                let path = at.volume(name);
                std::fs::create_dir_all(&path)
                    .with_context(|| format!("cannot make {}", path.display()))?;
                path
            }
        };
        let source = source.canonicalize().with_context(|| {
            format!(
                "the volume {} cannot be used; is there such a folder?",
                source.display()
            )
        })?;
        plain(&source)?;
        all.push(if source.is_dir() {
            MountPlan::Folder { source, destination, readonly: volume.readonly }
        } else if source.is_file() && volume.readonly {
            MountPlan::File { source, destination }
        } else {
            bail!(
                "the volume {} is a single file: write :ro after it, and the guest gets it as it is now; to let \
                 the guest change it, share its folder",
                source.display()
            );
        });
    }
    for tmpfs in &args.tmpfs {
        all.push(MountPlan::Tmpfs {
            destination: tmpfs.destination.clone(),
            options: tmpfs.options.clone(),
        });
    }
    Ok(all)
}

/// The VMM's options are text.
fn plain(path: &std::path::Path) -> anyhow::Result<()> {
    ensure!(
        path.to_str().is_some(),
        "{}: a path that is not UTF-8 cannot be given to the VMM; rename it",
        path.display()
    );
    Ok(())
}

fn net(args: &RunArgs, config: &Config) -> anyhow::Result<NetPlan> {
    let found = passt(config);
    let asked = args.net.clone().or_else(|| config.network_default.clone());
    let kind = asked.unwrap_or(if found.is_some() {
        NetWord::User
    } else {
        NetWord::None
    });
    if kind == NetWord::None {
        if let Some(port) = args.publish.first() {
            bail!(
                "--publish {port} has no effect without a network; install passt, or name one with --net"
            );
        }
        ensure!(
            args.dns.is_empty(),
            "--dns has no effect without a network; name one with --net"
        );
    }
    if let (NetWord::Tap(name), Some(port)) = (&kind, args.publish.first()) {
        bail!(
            "--publish {port} has no effect on the tap {name}: whoever made it leads ports to it"
        );
    }
    if kind == NetWord::User && found.is_none() {
        bail!(
            "--net user needs passt, which is not in the PATH; install it (Debian: `apt install passt`) or name it with network.passt"
        );
    }
    let dns = if args.dns.is_empty() {
        config.network_dns.clone()
    } else {
        args.dns.iter().map(ToString::to_string).collect()
    };
    Ok(NetPlan {
        kind,
        passt: found.unwrap_or_default(),
        publish: args.publish.clone(),
        dns,
    })
}

fn machine(args: &RunArgs, config: &Config) -> anyhow::Result<MachinePlan> {
    let named =
        |flag: &Option<PathBuf>, key: &Option<PathBuf>| flag.clone().or_else(|| key.clone());
    let memory = match args.memory {
        Some(memory) => Size(memory.0.saturating_add(config.guest_overhead.0)),
        None => config.guest_memory,
    };
    ensure!(
        memory >= LEAST,
        "{memory} of memory is too little for a guest; {LEAST} is the least"
    );
    // Whole mebibytes.
    let memory = Size(memory.0.div_ceil(1 << 20) << 20);
    let cpus = args
        .cpus
        .or(config.guest_cpus)
        .map_or(1, crate::values::Cpus::whole);
    Ok(MachinePlan {
        vmm: VMM.find(config.vmm_program.as_deref())?,
        kernel: KERNEL.find(named(&args.kernel, &config.guest_kernel).as_deref())?,
        initramfs: INITRAMFS.find(named(&args.initramfs, &config.guest_initramfs).as_deref())?,
        cpus,
        memory,
        cmdline: config.guest_cmdline.clone(),
        args: config
            .vmm_args
            .iter()
            .chain(&args.vmm_arg)
            .cloned()
            .collect(),
    })
}
