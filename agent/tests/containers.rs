//! What a process in a container sees, and what comes of it.
#![expect(clippy::unwrap_used, reason = "a test: a failure is a panic")]

mod support;

use std::collections::BTreeMap;

use support::{Agent, bind_mount, capabilities, mount, namespaces, process, shell};
use testudo_agent_protocol::namespace::Kind;
use testudo_agent_protocol::{
    Capabilities, ContainerSpec, CreateContainerRequest, Device, HealthRequest, Hook, Hooks,
    IdMapping, Process, RemoveContainerRequest, Rlimit, Seccomp, StartContainerRequest, SyscallArg,
    SyscallRule, User, code,
};

fn output(agent: &Agent, spec: ContainerSpec) -> String {
    let (exit, out, err) = agent.run("box", spec).unwrap();
    assert_eq!((exit.code, err.as_str()), (0, ""), "{out}");
    out
}

fn change(script: &str, how: impl FnOnce(&mut ContainerSpec)) -> ContainerSpec {
    let mut spec = shell(script);
    how(&mut spec);
    spec
}

fn process_of(spec: &mut ContainerSpec) -> &mut Process {
    spec.process.as_mut().unwrap()
}

fn facts(text: &str) -> BTreeMap<&str, &str> {
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.map(|(key, value)| (key, value.trim())).collect()
}

#[test]
fn a_container_says_hello_and_ends_with_its_code() {
    need_containers!();
    let agent = Agent::start().with_root();
    let health = agent.call(&HealthRequest {}).unwrap();
    assert!(!health.init && health.api == 1);
    let (exit, out, err) = agent
        .run_with("one", shell("cat; hostname >&2; exit 7"), b"hello")
        .unwrap();
    assert_eq!((exit.code, exit.signal), (7, 0));
    assert_eq!((out.as_str(), err.as_str()), ("hello", "box\n"));
    assert_eq!((exit.stdout_bytes, exit.stderr_bytes), (5, 4));
    // The same id serves again.
    let (exit, _, _) = agent.run("one", shell("kill -TERM $$; sleep 5")).unwrap();
    assert_eq!(
        exit.code, 0,
        "the first process of a PID namespace minds no signal of its own"
    );
    let (exit, _, _) = agent
        .run("one", shell("sh -c 'kill -KILL $$'; exit $?"))
        .unwrap();
    assert_eq!(exit.code, 137);
}

#[test]
fn environment_folder_user_and_groups() {
    need_containers!();
    let agent = Agent::start().with_root();
    let spec = change(
        "pwd; id -u; id -g; id -G; echo $HOME; echo $ONE; umask",
        |spec| {
            let process = process_of(spec);
            process.cwd = "/var/lib/thing".into();
            process.env.push("ONE=1 and more".into());
            process.user = Some(User {
                uid: 1000,
                gid: 1001,
                additional_gids: vec![7, 8],
                umask: Some(0o027),
            });
        },
    );
    assert_eq!(
        output(&agent, spec),
        "/var/lib/thing\n1000\n1001\n1001 7 8\n/home/somebody\n1 and more\n0027\n"
    );
}

#[test]
fn capabilities_are_those_asked_for_and_no_more() {
    need_containers!();
    let agent = Agent::start().with_root();
    let set = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>();
    let spec = change("cat /proc/self/status", |spec| {
        process_of(spec).capabilities = Some(Capabilities {
            bounding: set(&["CAP_KILL", "CAP_CHOWN", "CAP_NET_RAW"]),
            permitted: set(&["CAP_KILL", "CAP_CHOWN"]),
            effective: set(&["CAP_CHOWN"]),
            inheritable: set(&["CAP_KILL"]),
            ambient: set(&["CAP_KILL"]),
        });
        process_of(spec).user = Some(User {
            uid: 1000,
            gid: 1000,
            ..User::default()
        });
    });
    let text = output(&agent, spec);
    let status = facts(&text);
    // A program without file capabilities keeps the ambient ones of a user who is not root.
    assert_eq!(
        status["CapBnd"],
        format!("{:016x}", (1 << 5) | 1 | (1 << 13))
    );
    assert_eq!(status["CapInh"], format!("{:016x}", 1 << 5));
    assert_eq!(status["CapAmb"], format!("{:016x}", 1 << 5));
    assert_eq!(status["CapPrm"], format!("{:016x}", 1 << 5));
    assert_eq!(status["CapEff"], format!("{:016x}", 1 << 5));
    assert_eq!(status["NoNewPrivs"], "1");
    let none = change("cat /proc/self/status", |spec| {
        process_of(spec).capabilities = None;
    });
    let text = output(&agent, none);
    assert_eq!(facts(&text)["CapBnd"], "0000000000000000");
    assert_eq!(facts(&text)["CapEff"], "0000000000000000");
}

#[test]
fn limits_devices_and_shells() {
    need_containers!();
    let agent = Agent::start().with_root();
    let spec = change(
        "ulimit -n; ulimit -Hn; ulimit -c; test -c /dev/null && echo x > /dev/null && \
         test -L /dev/fd && test -c /dev/fuse && stat -c '%a %u %t:%T' /dev/fuse; cat /proc/self/oom_score_adj",
        |spec| {
            let process = process_of(spec);
            process.oom_score_adj = Some(321);
            process.rlimits = vec![
                Rlimit {
                    kind: "RLIMIT_NOFILE".into(),
                    soft: 500,
                    hard: 600,
                },
                Rlimit {
                    kind: "RLIMIT_CORE".into(),
                    soft: 0,
                    hard: 0,
                },
            ];
            spec.linux.as_mut().unwrap().devices.push(Device {
                kind: "c".into(),
                path: "/dev/fuse".into(),
                major: 10,
                minor: 229,
                mode: Some(0o640),
                uid: 1000,
                ..Device::default()
            });
        },
    );
    assert_eq!(output(&agent, spec), "500\n600\n0\n640 1000 a:e5\n321\n");
}

#[test]
fn mounts_are_as_asked_for() {
    need_containers!();
    let agent = Agent::start().with_root();
    let volume = agent.path("volume");
    std::fs::create_dir_all(volume.join("inside")).unwrap();
    std::fs::write(volume.join("inside/file"), "volume\n").unwrap();
    agent.bind("volume", &volume);
    let spec = change(
        "cat /data/file; echo new > /data/new; cat /one; (echo x > /one) 2>/dev/null || echo read-only; \
         grep -c ' /tmp tmpfs rw,nosuid,nodev' /proc/mounts; df -k /tmp | tail -1 | tr -s ' ' | cut -d' ' -f2; \
         touch /usr/x 2>/dev/null || echo usr; touch /made && echo made",
        |spec| {
            spec.mounts
                .push(bind_mount("/data", "volume", "inside", &["rbind"]));
            spec.mounts
                .push(bind_mount("/one", "volume", "inside/file", &["bind", "ro"]));
        },
    );
    assert_eq!(
        output(&agent, spec),
        "volume\nvolume\nread-only\n1\n16384\nusr\nmade\n"
    );
    assert_eq!(
        std::fs::read_to_string(volume.join("inside/new")).unwrap(),
        "new\n"
    );
    let spec = change(
        "touch /x 2>/dev/null || echo read-only; touch /tmp/x && echo tmp",
        |spec| {
            spec.root.as_mut().unwrap().readonly = true;
        },
    );
    assert_eq!(output(&agent, spec), "read-only\ntmp\n");
    // Nothing of it is seen outside.
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(
        !mounts.contains(&agent.path("").display().to_string()),
        "{mounts}"
    );
}

#[test]
fn masked_and_read_only_paths() {
    need_containers!();
    let agent = Agent::start().with_root();
    let script = "wc -c < /proc/keys; ls -A /sys/firmware | wc -l; touch /sys/firmware/x 2>&1 | grep -c -i read-only; \
                  echo x 2>/dev/null > /proc/sys/kernel/domainname || echo refused";
    assert_eq!(output(&agent, shell(script)), "0\n0\n1\nrefused\n");
}

#[test]
fn sysctls_are_written_through_a_proc_of_the_agents_own() {
    need_containers!();
    let agent = Agent::start().with_root();
    let with = |key: &str, value: &str| {
        let (key, value) = (key.to_owned(), value.to_owned());
        change(
            "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shmmni",
            |spec| {
                spec.linux.as_mut().unwrap().sysctl =
                    [(key, value), ("kernel.shmmni".into(), "99".into())].into();
            },
        )
    };
    let out = output(&agent, with("net.ipv4.ip_unprivileged_port_start", "77"));
    assert_eq!(out, "77\n99\n");
    for bad in [
        "../../../etc/passwd",
        "net/../../1/oom_score_adj",
        "no.such.key",
    ] {
        let error = agent.run("box", with(bad, "1")).unwrap_err();
        assert!(error.to_string().contains("set sysctl"), "{error}");
    }
}

#[test]
fn a_program_that_is_not_there_is_told_at_start() {
    need_containers!();
    let agent = Agent::start().with_root();
    for (args, word, number) in [
        (
            &["/no/such/program"][..],
            "/no/such/program",
            code::NOT_FOUND,
        ),
        (&["nosuchprogram"], "nosuchprogram", code::NOT_FOUND),
        (&["/etc/passwd"], "/etc/passwd", code::INVALID),
    ] {
        let spec = change("", |spec| spec.process = Some(process(args)));
        let error = agent.run("box", spec).unwrap_err();
        assert_eq!(error.code(), Some(number), "{error}");
        assert!(
            error
                .to_string()
                .contains(&format!("StartContainer: cannot execute {word}")),
            "{error}"
        );
    }
}

#[test]
fn huge_arguments_and_names() {
    need_containers!();
    let agent = Agent::start().with_root();
    let spec = change("", |spec| {
        let mut process = process(&["/bin/sh", "-c", "echo $#; printenv BIG | wc -c", "sh"]);
        process
            .args
            .extend((0..10_000).map(|n| format!("argument-{n}")));
        process.env.push(format!("BIG={}", "x".repeat(100_000)));
        spec.process = Some(process);
    });
    assert_eq!(output(&agent, spec), "10000\n100001\n");
}

#[test]
fn a_user_namespace_maps_root_to_nobody_in_particular() {
    need_containers!();
    let agent = Agent::start().with_root();
    let spec = change(
        "id -u; cat /proc/self/uid_map | tr -s ' '; echo x > /dev/null && echo null",
        |spec| {
            let linux = spec.linux.as_mut().unwrap();
            linux.namespaces = namespaces(&[
                Kind::User,
                Kind::Pid,
                Kind::Network,
                Kind::Mount,
                Kind::Ipc,
                Kind::Uts,
                Kind::Cgroup,
            ]);
            let map = IdMapping {
                container_id: 0,
                host_id: 100_000,
                size: 65536,
            };
            linux.uid_mappings = vec![map];
            linux.gid_mappings = vec![map];
            linux.devices.clear();
        },
    );
    std::os::unix::fs::chown(agent.path("root"), Some(100_000), Some(100_000)).unwrap();
    for folder in ["proc", "sys", "dev", "tmp", "etc"] {
        let path = agent.path("root").join(folder);
        std::os::unix::fs::chown(path, Some(100_000), Some(100_000)).unwrap();
    }
    // Others may pass through to it.
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(agent.folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(output(&agent, spec), "0\n 0 100000 65536\nnull\n");
}

/// CVE-2024-21626: a working folder by way of a descriptor of the runtime's.
#[test]
fn no_descriptor_and_no_folder_lead_out() {
    need_containers!();
    let agent = Agent::start().with_root();
    assert_eq!(
        output(&agent, shell("ls /proc/self/fd | tr '\\n' ' '")).trim(),
        "0 1 2 3"
    );
    for number in 3..20 {
        let spec = change("pwd", |spec| {
            process_of(spec).cwd = format!("/proc/self/fd/{number}");
        });
        let Ok((exit, out, _)) = agent.run("box", spec) else {
            continue;
        };
        panic!(
            "a process began at descriptor {number}: {} {out}",
            exit.code
        );
    }
}

/// CVE-2019-5736: a program that is /proc/self/exe.
#[test]
fn the_agents_program_cannot_be_written() {
    need_containers!();
    let agent = Agent::start().with_root();
    let spec = change("", |spec| {
        spec.process = Some(process(&["/proc/self/exe", "stage"]));
    });
    // The agent's own program, as a stage without orders: it fails, and does no harm.
    let ended = agent.run("box", spec);
    assert!(ended.is_err() || ended.is_ok_and(|(exit, _, _)| exit.code != 0));
    let mount = std::fs::read_to_string(format!("/proc/{}/mountinfo", agent.pid())).unwrap();
    let own = agent.path("state/agent").display().to_string();
    let line = mount.lines().find(|line| line.contains(&own)).unwrap();
    assert!(line.split(' ').nth(5).unwrap().starts_with("ro"), "{line}");
}

/// CVE-2019-16884, CVE-2023-27561: /proc of an image as a link, so that masks land elsewhere.
#[test]
fn proc_must_be_where_it_seems() {
    need_containers!();
    let agent = Agent::start().with_root();
    let root = agent.path("root");
    std::fs::remove_dir(root.join("proc")).unwrap();
    std::os::unix::fs::symlink("/tmp", root.join("proc")).unwrap();
    let error = agent.run("box", shell("true")).unwrap_err();
    assert!(
        error.to_string().contains("must be a folder and no link"),
        "{error}"
    );
}

/// CVE-2025-31133: a null device of the container's is not what files are masked with.
#[test]
fn masks_do_not_use_what_the_image_brings() {
    need_containers!();
    let agent = Agent::start().with_root();
    let spec = change("ls -l /dev/null; wc -c < /proc/keys", |spec| {
        // No tmpfs on /dev: the image's own folder, where null is a link.
        spec.mounts
            .retain(|mount| !mount.destination.starts_with("/dev"));
    });
    let link = agent.path("root/dev/null");
    std::os::unix::fs::symlink("/proc/sys/kernel/core_pattern", &link).unwrap();
    let error = agent.run("box", spec).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("/dev/null exists in the root and is something else"),
        "{error}"
    );
}

#[test]
fn links_of_an_image_do_not_lead_mounts_out() {
    need_containers!();
    let agent = Agent::start().with_root();
    let outside = agent.path("outside");
    std::fs::create_dir(&outside).unwrap();
    std::os::unix::fs::symlink(&outside, agent.path("root/trap")).unwrap();
    let spec = change("touch /trap/file && echo done", |spec| {
        spec.mounts.push(mount("/trap", "tmpfs", &[]));
    });
    // In the container the link leads to a path in the root, which is not there.
    let error = agent.run("box", spec).unwrap_err();
    assert!(error.to_string().contains("/trap"), "{error}");
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
}

#[test]
fn requests_out_of_order_are_refused() {
    need_containers!();
    let agent = Agent::start().with_root();
    let mut client = agent.client();
    let create = CreateContainerRequest {
        id: "box".into(),
        spec: Some(shell("exec sleep 100")),
        ..CreateContainerRequest::default()
    };
    let start = StartContainerRequest { id: "box".into() };
    let remove = |force| RemoveContainerRequest {
        id: "box".into(),
        force,
    };
    assert_eq!(
        client.call(&start).unwrap_err().code(),
        Some(code::NOT_FOUND)
    );
    client.call(&create).unwrap();
    assert_eq!(client.call(&create).unwrap_err().code(), Some(code::EXISTS));
    client.call(&start).unwrap();
    assert_eq!(
        client.call(&start).unwrap_err().code(),
        Some(code::WRONG_STATE)
    );
    assert_eq!(
        client.call(&remove(false)).unwrap_err().code(),
        Some(code::WRONG_STATE)
    );
    client.call(&remove(true)).unwrap();
    assert_eq!(
        client.call(&remove(true)).unwrap_err().code(),
        Some(code::NOT_FOUND)
    );
    let bad = CreateContainerRequest {
        id: "../box".into(),
        ..create
    };
    assert_eq!(client.call(&bad).unwrap_err().code(), Some(code::INVALID));
}

#[test]
fn an_execs_capabilities_are_its_own() {
    need_containers!();
    let agent = Agent::start().with_root();
    let mut client = agent.client();
    client
        .call(&CreateContainerRequest {
            id: "box".into(),
            spec: Some(shell("exec sleep 100")),
            ..CreateContainerRequest::default()
        })
        .unwrap();
    client
        .call(&StartContainerRequest { id: "box".into() })
        .unwrap();
    let with = |capabilities: Option<Capabilities>| Process {
        capabilities,
        ..process(&["/bin/cat", "/proc/self/status"])
    };
    let effective = |name: &str, capabilities: Option<Capabilities>| {
        let (_, out, _) = agent.exec("box", name, with(capabilities), b"").unwrap();
        facts(&out)["CapEff"].to_owned()
    };
    let all = Capabilities {
        bounding: vec!["CAP_SYS_ADMIN".into()],
        effective: vec!["CAP_SYS_ADMIN".into()],
        permitted: vec!["CAP_SYS_ADMIN".into()],
        ..Capabilities::default()
    };
    assert_eq!(effective("wider", Some(all)), format!("{:016x}", 1 << 21));
    assert_eq!(effective("none", None), "0000000000000000");
    assert_ne!(effective("same", Some(capabilities())), "0000000000000000");
    let (exit, out, _) = agent
        .exec(
            "box",
            "sees",
            process(&["/bin/sh", "-c", "hostname; cat /proc/1/comm; exit 3"]),
            b"",
        )
        .unwrap();
    assert_eq!((exit.code, out.as_str()), (3, "box\nsleep\n"));
    let error = agent
        .exec("box", "lacks", process(&["/no/such"]), b"")
        .unwrap_err();
    assert_eq!(error.code(), Some(code::NOT_FOUND));
}

#[test]
fn a_filter_refuses_what_its_rules_say() {
    need_containers!();
    let agent = Agent::start().with_root();
    for privileges in [false, true] {
        let spec = change(
            "grep Seccomp: /proc/self/status; mkdir /tmp/x 2>&1 | cut -d: -f3; uname -s",
            |spec| {
                process_of(spec).no_new_privileges = !privileges;
                let refuse = |names: &[&str], errno, args| SyscallRule {
                    names: names.iter().map(|&n| n.to_owned()).collect(),
                    action: "SCMP_ACT_ERRNO".into(),
                    errno: Some(errno),
                    args,
                };
                let never = SyscallArg {
                    index: 0,
                    value: 0xdead_beef_dead_beef,
                    op: "SCMP_CMP_EQ".into(),
                    ..SyscallArg::default()
                };
                spec.linux.as_mut().unwrap().seccomp = Some(Seccomp {
                    default_action: "SCMP_ACT_ALLOW".into(),
                    syscalls: vec![
                        // EDOM: nobody else answers so.
                        refuse(&["mkdir", "mkdirat"], 33, Vec::new()),
                        refuse(&["uname"], 33, vec![never]),
                    ],
                    ..Seccomp::default()
                });
            },
        );
        let out = output(&agent, spec);
        assert_eq!(
            out,
            "Seccomp:\t2\n Numerical argument out of domain\nLinux\n"
        );
    }
}

#[test]
fn hooks_hear_of_their_container() {
    need_containers!();
    let agent = Agent::start().with_root();
    let log = agent.path("hooks");
    let hook = |point: &str| Hook {
        path: "/bin/sh".into(),
        args: vec![
            "sh".into(),
            "-c".into(),
            format!("(echo {point}; cat) >> {}", log.display()),
        ],
        env: vec!["PATH=/bin:/usr/bin".into()],
        timeout_s: 10,
    };
    let spec = change("exit 0", |spec| {
        spec.annotations = [("who".to_owned(), "me".to_owned())].into();
        spec.hooks = Some(Hooks {
            prestart: vec![hook("prestart")],
            create_runtime: vec![hook("create")],
            poststart: vec![hook("poststart")],
            poststop: vec![hook("poststop")],
            ..Hooks::default()
        });
    });
    assert_eq!(output(&agent, spec.clone()), "");
    let text = std::fs::read_to_string(&log).unwrap();
    let words: Vec<&str> = text
        .split(['\n', '{'])
        .filter(|w| ["prestart", "create", "poststart", "poststop"].contains(w))
        .collect();
    // poststart follows JSON without a line's end.
    assert_eq!(text.matches("\"id\":\"box\"").count(), 4, "{text}");
    assert!(
        text.contains("\"annotations\":{\"who\":\"me\"}") && !words.is_empty(),
        "{text}"
    );
    let mut failing = spec;
    failing.hooks = Some(Hooks {
        create_runtime: vec![Hook {
            args: vec!["sh".into(), "-c".into(), "exit 3".into()],
            ..hook("x")
        }],
        ..Hooks::default()
    });
    let error = agent.run("box", failing).unwrap_err().to_string();
    assert!(
        error.contains("createRuntime hook /bin/sh ended with Code(3)"),
        "{error}"
    );
}
