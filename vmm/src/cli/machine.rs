//! The flags that describe a machine, and how they become a [`Config`].

use std::io;

use clap::Args;
use thiserror::Error;

use crate::devices::{
    BalloonConfig, DiskConfig, FsConfig, NetConfig, PmemConfig, PortConfig, RngConfig,
    VhostUserConfig, VsockConfig, WatchdogConfig,
};
use crate::options::{Options, OptionsError, parse, switch};
use crate::spec::{
    AffinityConfig, BootConfig, ByteSize, Config, ConsoleConfig, CpusConfig, MemoryConfig, OnPanic,
    OnReset, ParseError, Protocol, Seccomp, Source, Spec, SpecError, TopologyConfig,
};

/// A machine. Flags override what a configuration file says; every FILE may be `fd:N`, a
/// descriptor inherited from the parent process.
#[derive(Debug, Default, Args)]
pub struct MachineArgs {
    /// JSON configuration (see `testudo-vmm schema`).
    #[arg(long, value_name = "FILE")]
    pub config: Option<Source>,
    /// Kernel image: bzImage, or ELF vmlinux.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<Source>,
    /// Initial RAM file system.
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<Source>,
    /// Kernel command line.
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// How an ELF kernel is entered.
    #[arg(long, value_enum)]
    pub protocol: Option<Protocol>,
    /// vCPUs: `N[,sockets=S,cores=C,threads=T]`.
    #[arg(long, value_name = "N")]
    pub cpus: Option<String>,
    /// Host CPUs of one vCPU: `VCPU:LIST`, for example `0:0-3,8`. May be repeated.
    #[arg(long = "cpu-affinity", value_name = "VCPU:LIST")]
    pub affinity: Vec<String>,
    /// Guest-physical address width in bits.
    #[arg(long, value_name = "BITS")]
    pub phys_bits: Option<u8>,
    /// Memory: `SIZE[,max=SIZE][,shared][,hugepages=2M|1G][,thp=off][,mergeable][,reserve][,prefault[=THREADS]]`.
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// Serial port: `stdio`, `off`, `file:PATH`, `unix:PATH`, `pty:PATH` or `fd:N`.
    #[arg(long, value_name = "WHERE")]
    pub console: Option<ConsoleConfig>,
    /// Entropy device: `on`, `off`, or `on,source=FILE,rate=BYTES_PER_SECOND`.
    #[arg(long, value_name = "on|off")]
    pub rng: Option<String>,
    /// Balloon: `on`, `off`, or `[size=SIZE][,deflate-on-oom=on|off][,stats=SECONDS][,reporting=on|off]`.
    #[arg(long, value_name = "on|off")]
    pub balloon: Option<String>,
    /// A disk: `path=FILE|fd=N[,ro][,direct][,queues=N][,threads=N][,id=NAME][,serial=TEXT]`
    /// `[,bw=SIZE][,bw-burst=SIZE][,iops=N][,iops-burst=N][,engine=auto|io_uring|sync]`
    /// `[,block-size=N][,physical-block-size=N][,cache=writeback|writethrough][,lock=off]`. May be repeated.
    #[arg(long = "disk", value_name = "path=FILE")]
    pub disks: Vec<String>,
    /// A file that the guest reaches as memory: `path=FILE|fd=N[,ro][,id=NAME]`. May be repeated.
    #[arg(long, value_name = "path=FILE")]
    pub pmem: Vec<String>,
    /// A network device: `tap=NAME|fd=N[,mac=ADDRESS][,queues=N][,vhost][,vhostfd=N][,mtu=BYTES]`
    /// `[,id=NAME][,offloads=off][,rx-bw=SIZE][,tx-bw=SIZE][,rx-iops=N][,tx-iops=N]`; for several
    /// queue pairs `fds=N:N…`. May be repeated.
    #[arg(long = "net", value_name = "tap=NAME")]
    pub nets: Vec<String>,
    /// Virtio console, the guest's `/dev/hvc0`: what `--console` takes.
    #[arg(long, value_name = "WHERE")]
    pub virtio_console: Option<ConsoleConfig>,
    /// A port of the guest's, `/dev/virtio-ports/NAME`: `name=NAME,to=WHERE`. May be repeated.
    #[arg(long = "port", value_name = "name=NAME,to=WHERE")]
    pub ports: Vec<String>,
    /// Stream sockets between guest and host: `cid=N,socket=PATH|fd=N[,connect=PATH][,streams=N][,id=NAME]`.
    #[arg(long, value_name = "cid=N,socket=PATH")]
    pub vsock: Option<String>,
    /// Watchdog: `on`, `off`, or `on,action=reset|exit|pause|notify`.
    #[arg(long, value_name = "on|off")]
    pub watchdog: Option<String>,
    /// A device whose queues another process serves: `net|fs|blk,socket=PATH|fd=N[,id=NAME][,tag=TAG]`
    /// `[,mac=ADDRESS][,queues=N][,queue-size=N][,reconnect]`. Needs `--memory SIZE,shared`. May be
    /// repeated.
    #[arg(long = "vhost-user", value_name = "KIND,socket=PATH")]
    pub vhost_user: Vec<String>,
    /// A folder to share: `tag=TAG,path=FOLDER|fd=N[,ro][,cache=none|auto|always][,writeback]`
    /// `[,dax=SIZE][,queues=N][,xattr=off][,acl][,id=NAME]`. May be repeated.
    #[arg(long = "fs", value_name = "tag=TAG,path=FOLDER")]
    pub fs: Vec<String>,
    /// Control socket to listen on.
    #[arg(long, value_name = "PATH")]
    pub control: Option<Source>,
    /// The KVM device.
    #[arg(long, value_name = "FILE")]
    pub kvm: Option<Source>,
    /// When the guest resets itself.
    #[arg(long, value_enum)]
    pub on_reset: Option<OnReset>,
    /// When the guest's kernel panics.
    #[arg(long, value_enum)]
    pub on_panic: Option<OnPanic>,
    /// System call filters.
    #[arg(long, value_enum)]
    pub seccomp: Option<Seccomp>,
}

/// The flags do not describe a machine.
#[derive(Debug, Error)]
pub enum ArgsError {
    /// The configuration file cannot be opened.
    #[error(transparent)]
    Open(#[from] crate::spec::SourceError),
    /// The configuration file cannot be read.
    #[error("cannot read configuration {name}")]
    Read {
        /// Path or descriptor.
        name: String,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The configuration file is not one.
    #[error("configuration {name}")]
    Parse {
        /// Path or descriptor.
        name: String,
        /// Why.
        #[source]
        source: ParseError,
    },
    /// A flag's value cannot be read.
    #[error("--{flag}")]
    Flag {
        /// The flag.
        flag: &'static str,
        /// Why.
        #[source]
        source: OptionsError,
    },
    /// `--cpu-affinity` without a colon or a number before it.
    #[error("--cpu-affinity `{0}`: write VCPU:LIST, for example 0:0-3,8")]
    Affinity(String),
    /// Boot options without a kernel.
    #[error("--{flag} has no effect without a kernel; name one with --kernel")]
    NoKernel {
        /// The flag.
        flag: &'static str,
    },
    /// What was said cannot be built.
    #[error(transparent)]
    Spec(#[from] SpecError),
}

impl MachineArgs {
    /// The checked specification of what the flags and the configuration file say together.
    pub fn into_spec(self) -> Result<Spec, ArgsError> {
        Ok(self.into_config()?.check()?)
    }

    fn into_config(self) -> Result<Config, ArgsError> {
        let mut config = match &self.config {
            None => Config::default(),
            Some(source) => read_config(source)?,
        };
        self.boot_into(&mut config)?;
        if let Some(argument) = &self.cpus {
            cpus_into(argument, &mut config.cpus)?;
        }
        if !self.affinity.is_empty() {
            config.cpus.affinity = self
                .affinity
                .iter()
                .map(|a| affinity(a))
                .collect::<Result<_, _>>()?;
        }
        if let Some(argument) = &self.memory {
            config.memory = memory(argument)?;
        }
        if let Some(argument) = &self.rng {
            config.rng = device("rng", argument, RngConfig::from_flag)?;
        }
        if let Some(argument) = &self.balloon {
            config.balloon = device("balloon", argument, BalloonConfig::from_flag)?;
        }
        if !self.nets.is_empty() {
            config.nets = devices("net", &self.nets, NetConfig::from_flag)?;
        }
        if !self.fs.is_empty() {
            config.fs = devices("fs", &self.fs, FsConfig::from_flag)?;
        }
        if !self.disks.is_empty() {
            config.disks = devices("disk", &self.disks, DiskConfig::from_flag)?;
        }
        if !self.pmem.is_empty() {
            let read = |argument: &String| device("pmem", argument, PmemConfig::from_flag);
            config.pmem = self.pmem.iter().map(read).collect::<Result<_, _>>()?;
        }
        if !self.ports.is_empty() {
            config.ports = devices("port", &self.ports, PortConfig::from_flag)?;
        }
        if let Some(argument) = &self.vsock {
            config.vsock = Some(device("vsock", argument, VsockConfig::from_flag)?);
        }
        if let Some(argument) = &self.watchdog {
            config.watchdog = device("watchdog", argument, WatchdogConfig::from_flag)?;
        }
        if !self.vhost_user.is_empty() {
            let read = VhostUserConfig::from_flag;
            config.vhost_user = devices("vhost-user", &self.vhost_user, read)?;
        }
        let cpus = &mut config.cpus;
        cpus.phys_bits = self.phys_bits.or(cpus.phys_bits);
        config.control = self.control.or(config.control);
        config.kvm = self.kvm.or(config.kvm);
        config.console = self.console.unwrap_or(config.console);
        config.virtio_console = self.virtio_console.or(config.virtio_console);
        config.on_reset = self.on_reset.unwrap_or(config.on_reset);
        config.on_panic = self.on_panic.unwrap_or(config.on_panic);
        config.seccomp = self.seccomp.unwrap_or(config.seccomp);
        Ok(config)
    }

    fn boot_into(&self, config: &mut Config) -> Result<(), ArgsError> {
        if let Some(kernel) = &self.kernel {
            let kernel = kernel.clone();
            match &mut config.boot {
                Some(boot) => boot.kernel = kernel,
                none => {
                    *none = Some(BootConfig {
                        kernel,
                        initrd: None,
                        cmdline: String::new(),
                        protocol: Protocol::default(),
                    });
                }
            }
        }
        let given = [
            ("initrd", self.initrd.is_some()),
            ("cmdline", self.cmdline.is_some()),
            ("protocol", self.protocol.is_some()),
        ];
        let Some(boot) = &mut config.boot else {
            return match given.into_iter().find(|(_, given)| *given) {
                Some((flag, _)) => Err(ArgsError::NoKernel { flag }),
                None => Ok(()),
            };
        };
        if let Some(initrd) = &self.initrd {
            boot.initrd = Some(initrd.clone());
        }
        if let Some(cmdline) = &self.cmdline {
            boot.cmdline.clone_from(cmdline);
        }
        boot.protocol = self.protocol.unwrap_or(boot.protocol);
        Ok(())
    }
}

fn read_config(source: &Source) -> Result<Config, ArgsError> {
    let file = source.open("configuration")?;
    let name = source.to_string();
    let text = io::read_to_string(file).map_err(|source| ArgsError::Read {
        name: name.clone(),
        source,
    })?;
    Config::from_json(&text).map_err(|source| ArgsError::Parse { name, source })
}

fn cpus_into(argument: &str, cpus: &mut CpusConfig) -> Result<(), ArgsError> {
    let flag = |source| ArgsError::Flag {
        flag: "cpus",
        source,
    };
    let options = Options::new(argument);
    cpus.count = options.first().map_err(flag)?;
    let mut shape: [Option<u32>; 3] = [None; 3];
    options
        .each("sockets, cores and threads", |key, value| {
            let slot = match key {
                "sockets" => &mut shape[0],
                "cores" => &mut shape[1],
                "threads" => &mut shape[2],
                _ => return Ok(false),
            };
            *slot = Some(parse(value)?);
            Ok(true)
        })
        .map_err(flag)?;
    // Whatever of the shape is not named is 1, except the cores, which make up the rest.
    cpus.topology = match shape {
        [None, None, None] => None,
        [sockets, cores, threads] => {
            let (sockets, threads) = (sockets.unwrap_or(1), threads.unwrap_or(1));
            let others = sockets.max(1).saturating_mul(threads.max(1));
            let cores = cores.unwrap_or_else(|| cpus.count.checked_div(others).unwrap_or(1));
            Some(TopologyConfig {
                sockets,
                cores,
                threads,
            })
        }
    };
    Ok(())
}

fn affinity(argument: &str) -> Result<AffinityConfig, ArgsError> {
    argument
        .split_once(':')
        .and_then(|(cpu, host)| {
            Some(AffinityConfig {
                cpu: cpu.parse().ok()?,
                host: host.to_owned(),
            })
        })
        .ok_or_else(|| ArgsError::Affinity(argument.to_owned()))
}

fn memory(argument: &str) -> Result<MemoryConfig, ArgsError> {
    let flag = |source| ArgsError::Flag {
        flag: "memory",
        source,
    };
    let options = Options::new(argument);
    let mut memory = MemoryConfig {
        size: options.first::<ByteSize>().map_err(flag)?,
        ..MemoryConfig::default()
    };
    let known = "max, shared, hugepages, thp, mergeable, reserve and prefault";
    options
        .each(known, |key, value| {
            match key {
                "max" => memory.max = Some(parse(value)?),
                "shared" => memory.shared = switch(value)?,
                "hugepages" => memory.hugepages = Some(parse(value)?),
                "thp" => memory.thp = switch(value)?,
                "mergeable" => memory.mergeable = switch(value)?,
                "reserve" => memory.reserve = switch(value)?,
                "prefault" => {
                    memory.prefault = Some(match value {
                        None => 0,
                        value => parse(value)?,
                    });
                }
                _ => return Ok(false),
            }
            Ok(true)
        })
        .map_err(flag)?;
    Ok(memory)
}

/// A device's flag, read by its own reader.
fn device<T>(
    flag: &'static str,
    argument: &str,
    read: impl Fn(&str) -> Result<T, OptionsError>,
) -> Result<T, ArgsError> {
    read(argument).map_err(|source| ArgsError::Flag { flag, source })
}

/// A flag that may be repeated.
fn devices<T>(
    flag: &'static str,
    arguments: &[String],
    read: impl Fn(&str) -> Result<T, OptionsError>,
) -> Result<Vec<T>, ArgsError> {
    let all = arguments.iter().map(|one| device(flag, one, &read));
    all.collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn config(args: &[&str]) -> Result<Config, String> {
        let cli = Cli::try_parse_from(["testudo-vmm", "run"].iter().chain(args))
            .map_err(|e| e.to_string())?;
        let Command::Run(machine) = cli.command else {
            panic!("not run");
        };
        machine.into_config().map_err(|e| {
            let source = std::error::Error::source(&e).map(|s| format!(": {s}"));
            format!("{e}{}", source.unwrap_or_default())
        })
    }

    #[test]
    fn flags_and_file_say_the_same() {
        let flags = config(&[
            "--kernel",
            "/k",
            "--initrd",
            "fd:5",
            "--cmdline",
            "-quiet x",
            "--cpus",
            "8,sockets=2,threads=2",
            "--cpu-affinity",
            "0:0-3",
            "--memory",
            "1G,shared,thp=off,prefault=4",
            "--console",
            "file:/log",
            "--rng",
            "on,source=/dev/urandom,rate=1K",
            "--control",
            "/run/ctl",
            "--on-reset",
            "reboot",
        ])
        .unwrap();
        let file = Config::from_json(
            r#"{"boot":{"kernel":"/k","initrd":"fd:5","cmdline":"-quiet x"},
               "cpus":{"count":8,"topology":{"sockets":2,"cores":2,"threads":2},
                       "affinity":[{"cpu":0,"host":"0-3"}]},
               "memory":{"size":"1G","shared":true,"thp":false,"prefault":4},
               "console":"file:/log","rng":{"source":"/dev/urandom","bytes_per_second":1024},
               "control":"/run/ctl","on_reset":"reboot"}"#,
        )
        .unwrap();
        assert_eq!(flags, file);
    }

    #[test]
    fn flags_override_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.json");
        std::fs::write(
            &path,
            r#"{"boot":{"kernel":"/k","cmdline":"a"},"cpus":{"count":4}}"#,
        )
        .unwrap();
        let path = path.to_str().unwrap();
        let config = config(&["--config", path, "--cmdline", "b", "--memory", "64M"]).unwrap();
        assert_eq!(config.cpus.count, 4);
        assert_eq!(config.memory.size, ByteSize(64 << 20));
        let boot = config.boot.unwrap();
        assert_eq!(
            (boot.kernel.to_string(), boot.cmdline),
            ("/k".into(), "b".into())
        );
    }

    #[test]
    fn wrong_flags_are_named() {
        for (args, says) in [
            (
                &["--memory", "1G,huge"][..],
                "`huge` in `1G,huge` is not known here",
            ),
            (&["--memory", "lots"], "`lots` is not a size"),
            (&["--memory", "1G,thp=maybe"], "write on or off"),
            (&["--cpus", "two"], "invalid digit"),
            (&["--cpus", "2,cores"], "a value is missing"),
            (&["--cpu-affinity", "0-3"], "write VCPU:LIST"),
            (
                &["--initrd", "/i"],
                "--initrd has no effect without a kernel",
            ),
            (&["--rng", "yes"], "write on or off"),
            (
                &["--config", "/nonexistent/vm.json"],
                "cannot open configuration /nonexistent/vm.json",
            ),
            (&["--console", "tty"], "`tty` is not a console"),
            (&["--frobnicate"], "unexpected argument '--frobnicate'"),
        ] {
            let error = config(args).unwrap_err();
            assert!(error.contains(says), "{args:?}: {error}");
        }
    }
}
