//! What a process in a container sees, and how it ends.

use std::collections::BTreeMap;

use testudo_agent_protocol::{
    ContainerSpec, Cpu, Linux, Memory, Process, Resources, Rlimit, Seccomp, SyscallRule, User, code,
};

use crate::batch::Test;
use crate::context::Ctx;
use crate::ensure;
use crate::outcome::{Outcome, Verdict};
use crate::pod::{Ended, Pod, container, mount, script, words};

pub(crate) const TESTS: &[Test] = &[
    Test::new("agent::ends_are_told_as_they_were", ends),
    Test::new("agent::a_process_is_who_it_should_be", identity),
    Test::new("agent::a_container_is_made_as_asked", surroundings),
    Test::new("agent::the_kernel_has_what_containers_use", kernel),
];

fn process_of(spec: &mut ContainerSpec) -> &mut Process {
    spec.process.get_or_insert_default()
}

fn linux_of(spec: &mut ContainerSpec) -> &mut Linux {
    spec.linux.get_or_insert_default()
}

fn same(what: &str, is: &str, wanted: &str) -> Verdict {
    ensure!(is == wanted, "{what}: {is:?}, not {wanted:?}");
    Ok(())
}

fn ends(ctx: &Ctx) -> Verdict {
    let pod = Pod::with_root(ctx)?;
    let ended = pod.run("one", container("cat; echo oops >&2; exit 7"), b"hello")?;
    let Ended { exit, out, err } = ended;
    ensure!((exit.code, exit.signal) == (7, 0), "{exit:?}");
    ensure!((exit.stdout_bytes, exit.stderr_bytes) == (5, 5), "{exit:?}");
    same("stdout", &out, "hello")?;
    same("stderr", &err, "oops\n")?;
    // The same id serves again; a signal of a process counts as in a shell.
    let killed = pod.run("one", container("sh -c 'kill -KILL $$'; exit $?"), b"")?;
    ensure!(killed.exit.code == 137, "{:?}", killed.exit);
    let stdio = pod.three();
    pod.begin("two", container("exec sleep 1000"), stdio)?;
    let exec = pod.begin_exec("two", "term", script("exec sleep 1000"), pod.three())?;
    pod.call(&testudo_agent_protocol::SignalProcessRequest {
        id: Some(exec.clone()),
        signal: 15,
        all: false,
    })?;
    let exit = pod.wait(&exec)?;
    ensure!((exit.code, exit.signal) == (143, 15), "{exit:?}");
    let missing = pod
        .client()?
        .call(&testudo_agent_protocol::ExecProcessRequest {
            id: Some(crate::pod::process_id("two", "missing")),
            process: Some(crate::pod::process(&["/no/such/program"])),
            stdio: None,
        });
    let missing = missing.err().and_then(|e| e.code());
    ensure!(missing == Some(code::NOT_FOUND), "{missing:?}");
    pod.remove("two")?;
    pod.end()?;
    Ok(())
}

fn status(text: &str) -> BTreeMap<&str, &str> {
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.map(|(key, value)| (key, value.trim())).collect()
}

fn identity(ctx: &Ctx) -> Verdict {
    let pod = Pod::with_root(ctx)?;
    let mut spec = container(
        "pwd; id -u; id -g; id -G; echo $ONE; umask; ulimit -n; ulimit -Hn; cat /proc/self/status",
    );
    let process = process_of(&mut spec);
    process.cwd = "/var/lib".into();
    process.env.push("ONE=1 and more".into());
    process.user = Some(User {
        uid: 1000,
        gid: 1001,
        additional_gids: vec![7, 8],
        umask: Some(0o027),
    });
    process.rlimits = vec![Rlimit {
        kind: "RLIMIT_NOFILE".into(),
        soft: 100,
        hard: 200,
    }];
    process.no_new_privileges = true;
    linux_of(&mut spec).seccomp = Some(Seccomp {
        default_action: "SCMP_ACT_ALLOW".into(),
        architectures: words(&["SCMP_ARCH_X86_64"]),
        syscalls: vec![SyscallRule {
            names: words(&["mkdir", "mkdirat"]),
            action: "SCMP_ACT_ERRNO".into(),
            errno: Some(13),
            args: Vec::new(),
        }],
        ..Seccomp::default()
    });
    let out = pod.run("box", spec.clone(), b"")?.well()?;
    let (head, rest) = out.split_at(out.find("Name:").unwrap_or(out.len()));
    same(
        "identity",
        head,
        "/var/lib\n1000\n1001\n1001 7 8\n1 and more\n0027\n100\n200\n",
    )?;
    let is = status(rest);
    for (key, wanted) in [
        ("CapEff", "0000000000000000"),
        ("CapBnd", "00000000a80425fb"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
        ("Uid", "1000\t1000\t1000\t1000"),
    ] {
        same(key, is.get(key).copied().unwrap_or_default(), wanted)?;
    }
    let mut root = container("cat /proc/self/status; mkdir /tmp/x || echo refused $?");
    linux_of(&mut root).seccomp = linux_of(&mut spec).seccomp.clone();
    let ended = pod.run("box", root, b"")?;
    let is = status(&ended.out);
    same(
        "CapEff of root",
        is.get("CapEff").copied().unwrap_or_default(),
        "00000000a80425fb",
    )?;
    same(
        "NoNewPrivs",
        is.get("NoNewPrivs").copied().unwrap_or_default(),
        "0",
    )?;
    ensure!(
        ended.out.contains("refused 1") && ended.err.contains("Permission denied"),
        "{ended:?}"
    );
    // Capabilities of a file, on the disk's overlay.
    let mut file = container(
        "cp /bin/cat /tmp/cat; python3 -c 'import os,struct; \
         os.setxattr(\"/tmp/cat\",\"security.capability\",struct.pack(\"<5I\",0x2000001,1<<10,0,0,0))'; \
         setpriv --reuid 1000 --regid 1000 --clear-groups /tmp/cat /proc/self/status",
    );
    file.mounts.push(mount("/tmp", "tmpfs", &["mode=1777"]));
    let out = pod.run("box", file, b"")?.well()?;
    same(
        "CapEff of a file",
        status(&out).get("CapEff").copied().unwrap_or_default(),
        "0000000000000400",
    )?;
    pod.end()?;
    Ok(())
}

fn surroundings(ctx: &Ctx) -> Verdict {
    let pod = Pod::with_root(ctx)?;
    let mut spec = container(
        "hostname; cat /proc/1/comm; wc -c < /proc/keys; ls /sys/firmware | wc -l; \
         echo 1 > /proc/sys/kernel/panic || echo no; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; \
         stat -fc %T /data; df -B1 --output=size /data | tail -1; touch /data/x && echo yes; \
         touch /usr/x && echo writable; ls /dev | tr '\\n' ' '; cat /sys/fs/cgroup/memory.max; \
         cat /sys/fs/cgroup/cpu.max; cat /sys/fs/cgroup/pids.max; ls /proc/self/fd | wc -l",
    );
    spec.mounts
        .push(mount("/data", "tmpfs", &["size=1m", "nodev"]));
    let linux = linux_of(&mut spec);
    linux
        .sysctl
        .insert("net.ipv4.ip_unprivileged_port_start".into(), "7".into());
    linux.resources = Some(Resources {
        memory: Some(Memory {
            limit: Some(64 << 20),
            ..Memory::default()
        }),
        cpu: Some(Cpu {
            quota: Some(50_000),
            period: Some(100_000),
            ..Cpu::default()
        }),
        pids_max: Some(33),
        ..Resources::default()
    });
    let ended = pod.run("box", spec.clone(), b"")?;
    let lines: Vec<&str> = ended.out.lines().collect();
    let wanted = [
        "box",
        "sh",
        "0",
        "0",
        "no",
        "7",
        "tmpfs",
        "1048576",
        "yes",
        "writable",
        "core fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero 67108864",
        "50000 100000",
        "33",
        "4",
    ];
    ensure!(lines.iter().map(|l| l.trim()).eq(wanted), "{ended:?}");
    ensure!(ended.err.contains("Read-only file system"), "{ended:?}");
    // A root that is read-only, and arguments as large as the kernel takes them.
    if let Some(root) = &mut spec.root {
        root.readonly = true;
    }
    spec.process = Some(script(
        "touch /usr/y || echo read-only; test ${#BIG} = 100000 && echo big",
    ));
    process_of(&mut spec)
        .env
        .push(format!("BIG={}", "x".repeat(100_000)));
    let ended = pod.run("box", spec, b"")?;
    same("a read-only root", &ended.out, "read-only\nbig\n")?;
    pod.end()?;
    Ok(())
}

/// One line each for what our kernel has to have.
const KERNEL: &str = r#"
import ctypes, os, socket, select, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(name, number, *args):
    r = libc.syscall(number, *args)
    if r < 0: print("missing", name, os.strerror(ctypes.get_errno()))
    return r
call("inotify", 294, 0)
call("fanotify", 300, 0, 0)
call("eventfd", 290, 0, 0)
call("timerfd", 283, 1, 0)
call("signalfd", 289, -1, ctypes.byref(ctypes.c_uint64(0)), 8, 0)
call("epoll", 291, 0)
call("userfaultfd", 323, 1)
call("memfd", 319, b"x", 0)
call("io_uring", 425, 4, ctypes.create_string_buffer(120))
call("pidfd_open", 434, os.getpid(), 0)
call("kcmp", 312, os.getpid(), os.getpid(), 0, 0, 0)
call("add_key", 248, b"user", b"n", b"v", 1, -3)
call("mq_open", 240, b"q", 0o102, 0o600, None)
call("landlock is not asked for; process_vm_readv", 310, os.getpid(), None, 0, None, 0, 0)
for ns in "cgroup ipc mnt net pid time user uts".split():
    if not os.path.exists("/proc/self/ns/" + ns): print("missing namespace", ns)
have = open("/sys/fs/cgroup/cgroup.controllers").read().split()
for c in "cpuset cpu io memory pids hugetlb".split():
    if c not in have: print("missing controller", c, have)
fs = open("/proc/filesystems").read().split()
for f in "overlay erofs ext4 tmpfs devpts mqueue cgroup2 fuse virtiofs binfmt_misc hugetlbfs squashfs".split():
    if f not in fs: print("missing file system", f)
for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_PACKET, socket.AF_NETLINK, 40):
    socket.socket(family, socket.SOCK_RAW if family in (17, 16) else socket.SOCK_STREAM).close()
os.setxattr("/tmp/f", "user.x", b"1") if False else None
open("/dev/shm/f", "w").close(); os.setxattr("/dev/shm/f", "trusted.x", b"1") if os.geteuid() else None
print("io:", "read_bytes" in open("/proc/self/io").read(), "children:", os.path.exists("/proc/self/task/%d/children" % os.getpid()))
"#;

fn kernel(ctx: &Ctx) -> Verdict {
    let pod = Pod::with_root(ctx)?;
    let mut spec = container("exec python3 -");
    if let Some(capabilities) = &mut process_of(&mut spec).capabilities {
        for set in [
            &mut capabilities.bounding,
            &mut capabilities.permitted,
            &mut capabilities.effective,
        ] {
            set.extend(words(&["CAP_SYS_ADMIN", "CAP_SYS_PTRACE"]));
        }
    }
    let ended = pod.run("box", spec, KERNEL.as_bytes())?;
    let out = ended.well()?;
    if out.trim() != "io: True children: True" {
        return Err(Outcome::Failed(out));
    }
    pod.end()?;
    Ok(())
}
