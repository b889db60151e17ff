//! A guest whose init is `testudo-agent`, and the host's side of it: requests, streams, containers.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use testudo_agent_protocol::namespace::{From, Kind};
use testudo_agent_protocol::storage::Driver;
use testudo_agent_protocol::{
    AddStorageRequest, Block, CallError, Capabilities, Client, ContainerSpec,
    CreateContainerRequest, DestroySandboxRequest, DeviceAddress, ExecProcessRequest, Exit, Linux,
    Mount, Namespace, Overlay, Place, Preamble, Process, ProcessId, READY_PORT, REQUEST_PORT,
    RemoveContainerRequest, Root, Rpc, STREAM_PORT, StartContainerRequest, Stdio, Storage, User,
    VirtioFs, WaitProcessRequest, connect_through, device_address::At,
};

use crate::context::Ctx;
use crate::ensure;
use crate::launch::Launch;
use crate::outcome::{Outcome, Verdict};
use crate::running::{Finished, Running};
use crate::tests::SOON;

/// For one answer.
const PATIENCE: Duration = Duration::from_secs(90);

/// The guest.
pub(crate) struct Pod<'a> {
    pub(crate) vm: Running<'a>,
    socket: PathBuf,
    number: AtomicU64,
    /// The agent's call.
    ready: UnixStream,
}

/// How a process ended, and what it had written.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) exit: Exit,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ended {
    /// What it wrote, if all went well.
    pub(crate) fn well(self) -> Verdict<String> {
        let Ended { exit, out, err } = self;
        ensure!(exit.code == 0 && err.is_empty(), "{exit:?}: {out}\n{err}");
        Ok(out)
    }
}

impl<'a> Pod<'a> {
    /// The guest's machine: our kernel, the agent, the Debian userland on a disk that is called `root`.
    pub(crate) fn launch(ctx: &'a Ctx) -> Launch<'a> {
        let vsock = format!("cid=3,socket={}", ctx.path("vsock").display());
        let disk = format!("path={},ro,serial=root", ctx.images.userland.display());
        ctx.guest("nothing")
            .initrd_source(&ctx.images.initramfs_agent)
            .cmdline(&format!("agent.ready=vsock:{READY_PORT}"))
            .args(["--vsock", &vsock, "--disk", &disk, "--memory", "256M"])
            .control()
    }

    /// Starts it and waits for the agent's call.
    pub(crate) fn start(ctx: &'a Ctx, launch: Launch<'a>) -> Verdict<Pod<'a>> {
        let listener = UnixListener::bind(ctx.path(&format!("vsock_{READY_PORT}")))?;
        let vm = launch.spawn()?;
        let seconds = i64::try_from(SOON.as_secs())?;
        let limit = Timespec {
            tv_sec: seconds,
            tv_nsec: 0,
        };
        let called = poll(&mut [PollFd::new(&listener, PollFlags::IN)], Some(&limit))?;
        ensure!(called == 1, "the agent did not call within {seconds} s");
        Ok(Pod {
            vm,
            socket: ctx.path("vsock"),
            number: AtomicU64::new(1),
            ready: listener.accept()?.0,
        })
    }

    /// With the userland as storage `root`, writable in memory.
    pub(crate) fn with_root(ctx: &'a Ctx) -> Verdict<Pod<'a>> {
        let pod = Pod::start(ctx, Pod::launch(ctx))?;
        pod.add_root()?;
        Ok(pod)
    }

    pub(crate) fn add_root(&self) -> Verdict {
        let device = DeviceAddress {
            at: Some(At::DiskSerial("root".into())),
        };
        self.add(
            "image",
            true,
            Driver::Block(Block {
                device: Some(device),
                filesystem: "erofs".into(),
                ..Block::default()
            }),
        )?;
        self.add("root", false, scratch_over("image"))
    }

    pub(crate) fn add_share(&self, tag: &str, readonly: bool) -> Verdict {
        let share = VirtioFs {
            tag: tag.into(),
            options: Vec::new(),
        };
        self.add(tag, readonly, Driver::VirtioFs(share))
    }

    pub(crate) fn add(&self, id: &str, readonly: bool, driver: Driver) -> Verdict {
        let storage = Storage {
            id: id.into(),
            driver: Some(driver),
            readonly,
            deadline_ms: 5000,
        };
        self.call(&AddStorageRequest {
            storage: Some(storage),
        })?;
        Ok(())
    }

    fn open(&self, port: u32) -> Verdict<UnixStream> {
        let mut socket = UnixStream::connect(&self.socket)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        connect_through(&mut socket, port)?;
        Ok(socket)
    }

    /// A connection of its own.
    pub(crate) fn client(&self) -> Verdict<Client<UnixStream>> {
        Ok(Client::new(self.open(REQUEST_PORT)?))
    }

    /// A connection for who writes requests by hand.
    pub(crate) fn raw(&self) -> Verdict<UnixStream> {
        self.open(REQUEST_PORT)
    }

    pub(crate) fn call<R: Rpc>(&self, request: &R) -> Verdict<R::Response> {
        Ok(self.client()?.call(request)?)
    }

    /// The code with which a request is refused, as it has to be.
    pub(crate) fn refused<R: Rpc>(&self, request: &R) -> Verdict<(i32, String)> {
        match self.client()?.call(request) {
            Err(CallError::Refused { code, message, .. }) => Ok((code, message)),
            Err(e) => Err(e.into()),
            Ok(_) => Err(Outcome::Failed(format!("{} is not refused", R::METHOD))),
        }
    }

    /// A number that no stream has.
    pub(crate) fn number(&self) -> u64 {
        self.number.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn three(&self) -> Stdio {
        Stdio {
            stdin: self.number(),
            stdout: self.number(),
            stderr: self.number(),
        }
    }

    pub(crate) fn stream(&self, number: u64) -> Verdict<UnixStream> {
        let mut stream = self.open(STREAM_PORT)?;
        stream.write_all(&Preamble { number }.to_bytes())?;
        Ok(stream)
    }

    /// Creates a container and starts it.
    pub(crate) fn begin(&self, id: &str, spec: ContainerSpec, stdio: Stdio) -> Verdict {
        let mut client = self.client()?;
        client.call(&CreateContainerRequest {
            id: id.into(),
            spec: Some(spec),
            stdio: Some(stdio),
            ..CreateContainerRequest::default()
        })?;
        client.call(&StartContainerRequest { id: id.into() })?;
        Ok(())
    }

    pub(crate) fn remove(&self, id: &str) -> Verdict {
        self.call(&RemoveContainerRequest {
            id: id.into(),
            force: true,
        })?;
        Ok(())
    }

    /// Runs a container to its end.
    pub(crate) fn run(&self, id: &str, spec: ContainerSpec, input: &[u8]) -> Verdict<Ended> {
        let stdio = self.three();
        self.begin(id, spec, stdio)?;
        let ended = self.finish(&process_id(id, ""), &stdio, input)?;
        self.remove(id)?;
        Ok(ended)
    }

    /// Runs a process in a container to its end.
    pub(crate) fn exec(
        &self,
        id: &str,
        exec: &str,
        process: Process,
        input: &[u8],
    ) -> Verdict<Ended> {
        let stdio = self.three();
        let id = self.begin_exec(id, exec, process, stdio)?;
        self.finish(&id, &stdio, input)
    }

    pub(crate) fn begin_exec(
        &self,
        id: &str,
        exec: &str,
        process: Process,
        stdio: Stdio,
    ) -> Verdict<ProcessId> {
        let id = process_id(id, exec);
        self.call(&ExecProcessRequest {
            id: Some(id.clone()),
            process: Some(process),
            stdio: Some(stdio),
        })?;
        Ok(id)
    }

    pub(crate) fn wait(&self, id: &ProcessId) -> Verdict<Exit> {
        let answer = self.call(&WaitProcessRequest {
            id: Some(id.clone()),
        })?;
        answer
            .exit
            .ok_or_else(|| Outcome::Failed("an end without an exit".into()))
    }

    /// Its end, and all it writes.
    pub(crate) fn finish(&self, id: &ProcessId, stdio: &Stdio, input: &[u8]) -> Verdict<Ended> {
        let mut stdin = self.stream(stdio.stdin)?;
        let read = |number: u64| -> Verdict<_> {
            let mut stream = self.stream(number)?;
            Ok(std::thread::spawn(move || {
                let mut bytes = Vec::new();
                let read = stream.read_to_end(&mut bytes);
                read.map(|_| String::from_utf8_lossy(&bytes).into_owned())
            }))
        };
        let (out, err) = (read(stdio.stdout)?, read(stdio.stderr)?);
        // A process need not read what it is given.
        let _ = stdin.write_all(input);
        let _ = stdin.shutdown(Shutdown::Write);
        let exit = self.wait(id)?;
        let text = |thread: std::thread::JoinHandle<std::io::Result<String>>| -> Verdict<String> {
            let joined = thread.join();
            let read = joined.map_err(|_| Outcome::Failed("a reader panicked".into()))?;
            Ok(read?)
        };
        Ok(Ended {
            exit,
            out: text(out)?,
            err: text(err)?,
        })
    }

    /// Ends the pod by request; the guest powers off.
    pub(crate) fn end(mut self) -> Verdict<Finished> {
        self.call(&DestroySandboxRequest {})?;
        let mut rest = Vec::new();
        self.ready.set_read_timeout(Some(SOON))?;
        self.ready.read_to_end(&mut rest)?;
        ensure!(rest.is_empty(), "the agent's call says {rest:?}");
        let done = self.vm.finish(SOON)?;
        done.expect_code(0)?;
        Ok(done)
    }
}

pub(crate) fn process_id(container: &str, exec: &str) -> ProcessId {
    ProcessId {
        container: container.into(),
        exec: exec.into(),
    }
}

/// A writable layer in memory.
pub(crate) fn scratch_over(storage: &str) -> Driver {
    Driver::Overlay(Overlay {
        lower: vec![place(storage, "/")],
        scratch: true,
        scratch_bytes: 64 << 20,
        ..Overlay::default()
    })
}

pub(crate) fn place(storage: &str, path: &str) -> Place {
    Place {
        storage: storage.into(),
        path: path.into(),
    }
}

pub(crate) fn words(of: &[&str]) -> Vec<String> {
    of.iter().map(|&word| word.to_owned()).collect()
}

pub(crate) fn mount(destination: &str, kind: &str, options: &[&str]) -> Mount {
    Mount {
        destination: destination.into(),
        kind: kind.into(),
        source: kind.into(),
        options: words(options),
        ..Mount::default()
    }
}

pub(crate) fn namespaces(kinds: &[Kind]) -> Vec<Namespace> {
    let each = kinds.iter().map(|kind| Namespace {
        kind: (*kind).into(),
        from: From::New.into(),
        container: String::new(),
    });
    each.collect()
}

/// Capabilities as Docker gives them.
pub(crate) fn capabilities() -> Capabilities {
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

pub(crate) fn process(args: &[&str]) -> Process {
    Process {
        args: words(args),
        env: words(&["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]),
        cwd: "/".into(),
        user: Some(User::default()),
        capabilities: Some(capabilities()),
        ..Process::default()
    }
}

pub(crate) fn script(text: &str) -> Process {
    process(&["/bin/sh", "-c", text])
}

/// A container as Docker makes it, that runs a shell script.
pub(crate) fn container(text: &str) -> ContainerSpec {
    use Kind::{Cgroup, Ipc, Mount, Network, Pid, Uts};
    ContainerSpec {
        process: Some(script(text)),
        root: Some(Root {
            place: Some(place("root", "/")),
            readonly: false,
        }),
        hostname: "box".into(),
        mounts: vec![
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
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount(
                "/sys/fs/cgroup",
                "cgroup",
                &["nosuid", "noexec", "nodev", "ro"],
            ),
            mount(
                "/dev/shm",
                "tmpfs",
                &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
            ),
        ],
        linux: Some(Linux {
            namespaces: namespaces(&[Pid, Network, Mount, Ipc, Uts, Cgroup]),
            masked_paths: words(&[
                "/proc/kcore",
                "/proc/keys",
                "/proc/timer_list",
                "/sys/firmware",
            ]),
            readonly_paths: words(&["/proc/sys", "/proc/irq", "/proc/bus"]),
            ..Linux::default()
        }),
        ..ContainerSpec::default()
    }
}
