//! An agent as a service of this machine, and containers with this machine's programs.
#![allow(
    missing_docs,
    dead_code,
    unreachable_pub,
    reason = "each test program uses some of it"
)]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use testudo_agent_protocol::namespace::{From, Kind};
use testudo_agent_protocol::{
    AddStorageRequest, Bind, CallError, Capabilities, Client, ContainerSpec,
    CreateContainerRequest, ExecProcessRequest, Exit, Linux, Mount, Namespace, Place, Preamble,
    Process, ProcessId, RemoveContainerRequest, Root, Rpc, StartContainerRequest, Stdio, Storage,
    User, WaitProcessRequest, bind, storage,
};

/// Why tests of containers cannot run here.
pub fn cannot_run() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("containers need root");
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if !mounts.contains(" - cgroup2 ") {
        return Some("no cgroup2 is mounted");
    }
    None
}

/// Ends the test, saying why, where containers cannot be.
#[macro_export]
macro_rules! need_containers {
    () => {
        if let Some(why) = support::cannot_run() {
            eprintln!("skipped: {why}");
            return;
        }
    };
}

static NUMBER: AtomicU64 = AtomicU64::new(1);

/// Numbers of streams.
pub fn number() -> u64 {
    NUMBER.fetch_add(1, Ordering::Relaxed)
}

pub struct Agent {
    child: Child,
    pub folder: tempfile::TempDir,
}

impl Agent {
    pub fn start() -> Self {
        Self::start_with(&[], &[])
    }

    /// With further settings.
    pub fn start_saying(words: &[&str]) -> Self {
        Self::start_with(&[], words)
    }

    /// With a network of its own, which is empty.
    pub fn start_in_network() -> Self {
        Self::start_with(&["--net"], &[])
    }

    /// `ip` in the agent's network.
    pub fn ip(&self, args: &[&str]) -> String {
        let mut command = Command::new("nsenter");
        command
            .args(["-n", "-t", &self.pid().to_string(), "ip"])
            .args(args);
        let done = command.output().unwrap();
        assert!(done.status.success(), "ip {args:?}: {done:?}");
        String::from_utf8(done.stdout).unwrap()
    }

    fn start_with(unshare: &[&str], words: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let cgroup = folder
            .path()
            .file_name()
            .unwrap()
            .to_string_lossy()
            .replace('.', "t");
        // Its mounts are its own.
        let child = Command::new("unshare")
            .args(unshare)
            .args([
                "--mount",
                "--propagation",
                "private",
                env!("CARGO_BIN_EXE_testudo-agent"),
            ])
            .arg(format!("requests=unix:{}", at("requests")))
            .arg(format!("streams=unix:{}", at("streams")))
            .arg(format!("state={}", at("state")))
            .arg(format!("cgroup=testudo-test-{cgroup}"))
            .arg("log=warn")
            .args(words)
            .spawn()
            .unwrap();
        let agent = Self { child, folder };
        let begun = Instant::now();
        while UnixStream::connect(agent.path("requests")).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(10), "no agent");
            std::thread::sleep(Duration::from_millis(2));
        }
        agent
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn client(&self) -> Client<UnixStream> {
        let socket = UnixStream::connect(self.path("requests")).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        Client::new(socket)
    }

    pub fn call<R: Rpc>(&self, request: &R) -> Result<R::Response, CallError> {
        self.client().call(request)
    }

    pub fn stream(&self, number: u64) -> UnixStream {
        let mut stream = UnixStream::connect(self.path("streams")).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        stream.write_all(&Preamble { number }.to_bytes()).unwrap();
        stream
    }

    /// A root with this machine's programs, as storage `root`.
    pub fn with_root(self) -> Self {
        let root = self.path("root");
        for folder in ["usr", "proc", "sys", "dev", "tmp", "etc", "root"] {
            std::fs::create_dir_all(root.join(folder)).unwrap();
        }
        for link in ["bin", "sbin", "lib", "lib64"] {
            let _ = std::os::unix::fs::symlink(format!("usr/{link}"), root.join(link));
        }
        let users = "root:x:0:0:root:/root:/bin/sh\nsomebody:x:1000:1000::/home/somebody:/bin/sh\n";
        std::fs::write(root.join("etc/passwd"), users).unwrap();
        self.bind("root", &root);
        self.bind("usr", Path::new("/usr"));
        self
    }

    pub fn bind(&self, id: &str, path: &Path) {
        let path = path.display().to_string();
        let storage = Storage {
            id: id.into(),
            driver: Some(storage::Driver::Bind(Bind {
                of: Some(bind::Of::Path(path)),
            })),
            ..Storage::default()
        };
        self.call(&AddStorageRequest {
            storage: Some(storage),
        })
        .unwrap();
    }

    /// Runs a container to its end: its exit and what it wrote.
    pub fn run(&self, id: &str, spec: ContainerSpec) -> Result<(Exit, String, String), CallError> {
        self.run_with(id, spec, b"")
    }

    pub fn run_with(
        &self,
        id: &str,
        spec: ContainerSpec,
        input: &[u8],
    ) -> Result<(Exit, String, String), CallError> {
        let stdio = Stdio {
            stdin: number(),
            stdout: number(),
            stderr: number(),
        };
        let mut client = self.client();
        client.call(&CreateContainerRequest {
            id: id.into(),
            spec: Some(spec),
            stdio: Some(stdio),
            ..CreateContainerRequest::default()
        })?;
        let id = id.to_owned();
        let started = client.call(&StartContainerRequest { id: id.clone() });
        let outcome = started.and_then(|_| self.finish(&id, "", &stdio, input));
        client.call(&RemoveContainerRequest { id, force: true })?;
        outcome
    }

    pub fn exec(
        &self,
        container: &str,
        exec: &str,
        process: Process,
        input: &[u8],
    ) -> Result<(Exit, String, String), CallError> {
        let stdio = Stdio {
            stdin: number(),
            stdout: number(),
            stderr: number(),
        };
        let id = ProcessId {
            container: container.into(),
            exec: exec.into(),
        };
        self.call(&ExecProcessRequest {
            id: Some(id),
            process: Some(process),
            stdio: Some(stdio),
        })?;
        self.finish(container, exec, &stdio, input)
    }

    fn finish(
        &self,
        container: &str,
        exec: &str,
        stdio: &Stdio,
        input: &[u8],
    ) -> Result<(Exit, String, String), CallError> {
        let mut stdin = self.stream(stdio.stdin);
        let read = |number: u64| {
            let mut stream = self.stream(number);
            std::thread::spawn(move || {
                let mut text = String::new();
                stream.read_to_string(&mut text).unwrap();
                text
            })
        };
        let (stdout, stderr) = (read(stdio.stdout), read(stdio.stderr));
        // A process need not read what it is given.
        let _ = stdin.write_all(input);
        let _ = stdin.shutdown(Shutdown::Write);
        let id = ProcessId {
            container: container.into(),
            exec: exec.into(),
        };
        let exit = self
            .call(&WaitProcessRequest { id: Some(id) })?
            .exit
            .unwrap();
        Ok((exit, stdout.join().unwrap(), stderr.join().unwrap()))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        let _ = rustix::process::kill_process(pid.unwrap(), rustix::process::Signal::TERM);
        let ended = self.child.wait().unwrap();
        assert!(
            ended.success() || std::thread::panicking(),
            "the agent ended with {ended}"
        );
    }
}

pub fn mount(destination: &str, kind: &str, options: &[&str]) -> Mount {
    Mount {
        destination: destination.into(),
        kind: kind.into(),
        source: kind.into(),
        options: options.iter().map(|&word| word.to_owned()).collect(),
        ..Mount::default()
    }
}

pub fn bind_mount(destination: &str, storage: &str, path: &str, options: &[&str]) -> Mount {
    Mount {
        from: Some(Place {
            storage: storage.into(),
            path: path.into(),
        }),
        ..mount(destination, "bind", options)
    }
}

pub fn namespaces(kinds: &[Kind]) -> Vec<Namespace> {
    let each = kinds.iter().map(|kind| Namespace {
        kind: (*kind).into(),
        from: From::New.into(),
        container: String::new(),
    });
    each.collect()
}

/// Capabilities as Docker gives them by default.
pub fn capabilities() -> Capabilities {
    let names = [
        "CHOWN",
        "DAC_OVERRIDE",
        "FSETID",
        "FOWNER",
        "MKNOD",
        "NET_RAW",
        "SETGID",
        "SETUID",
        "SETFCAP",
        "SETPCAP",
        "NET_BIND_SERVICE",
        "SYS_CHROOT",
        "KILL",
        "AUDIT_WRITE",
    ];
    let names: Vec<String> = names.iter().map(|name| format!("CAP_{name}")).collect();
    Capabilities {
        bounding: names.clone(),
        effective: names.clone(),
        permitted: names,
        ..Capabilities::default()
    }
}

pub fn process(args: &[&str]) -> Process {
    Process {
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        env: vec!["PATH=/usr/sbin:/usr/bin:/sbin:/bin".into()],
        cwd: "/".into(),
        user: Some(User::default()),
        capabilities: Some(capabilities()),
        no_new_privileges: true,
        ..Process::default()
    }
}

/// A container that runs a shell script.
pub fn shell(script: &str) -> ContainerSpec {
    ContainerSpec {
        process: Some(process(&["/bin/sh", "-c", script])),
        root: Some(Root {
            place: Some(Place {
                storage: "root".into(),
                path: "/".into(),
            }),
            readonly: false,
        }),
        hostname: "box".into(),
        mounts: vec![
            bind_mount("/usr", "usr", "/", &["rbind", "ro"]),
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
                ],
            ),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount(
                "/tmp",
                "tmpfs",
                &["nosuid", "nodev", "size=16m", "mode=1777"],
            ),
        ],
        linux: Some(Linux {
            namespaces: namespaces(&[
                Kind::Pid,
                Kind::Network,
                Kind::Mount,
                Kind::Ipc,
                Kind::Uts,
                Kind::Cgroup,
            ]),
            masked_paths: ["/proc/kcore", "/proc/keys", "/sys/firmware"]
                .map(str::to_owned)
                .to_vec(),
            readonly_paths: ["/proc/sys", "/proc/irq"].map(str::to_owned).to_vec(),
            ..Linux::default()
        }),
        ..ContainerSpec::default()
    }
}
