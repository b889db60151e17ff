//! What other agents have got wrong, each with the test that it is right here. Those that are about what a
//! container sees, about bytes or about DNS are beside the other tests of that; `docs/agent.md` lists all.
#![expect(clippy::unwrap_used, reason = "a test: a failure is a panic")]

mod support;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use support::{Agent, process, shell};
use testudo_agent_protocol::device_address::At;
use testudo_agent_protocol::namespace::{From, Kind};
use testudo_agent_protocol::storage::Driver;
use testudo_agent_protocol::{
    AddStorageRequest, CreateContainerRequest, CreateSandboxRequest, DeviceAddress, HealthRequest,
    KernelModule, ListContainersRequest, ListProcessesRequest, MetricsRequest,
    RemoveContainerRequest, ResizeStorageRequest, StartContainerRequest, StatStorageRequest,
    StatsContainerRequest, Storage, Tmpfs, WaitDeviceRequest, code,
};

fn begin(agent: &Agent, id: &str, spec: testudo_agent_protocol::ContainerSpec) {
    let mut client = agent.client();
    let create = CreateContainerRequest {
        id: id.into(),
        spec: Some(spec),
        ..CreateContainerRequest::default()
    };
    client.call(&create).unwrap();
    client
        .call(&StartContainerRequest { id: id.into() })
        .unwrap();
}

/// Metrics paths that panic on what nobody tried.
#[test]
fn metrics_answer_at_every_stage_of_a_container() {
    need_containers!();
    let agent = Agent::start().with_root();
    let ask = || {
        let values = agent.call(&MetricsRequest {}).unwrap().values;
        assert!(values.values().all(|value| value.is_finite()), "{values:?}");
    };
    ask();
    let create = CreateContainerRequest {
        id: "box".into(),
        spec: Some(shell("exec sleep 1000")),
        ..CreateContainerRequest::default()
    };
    agent.call(&create).unwrap();
    let stats = StatsContainerRequest { id: "box".into() };
    ask();
    agent.call(&stats).unwrap();
    agent
        .call(&StartContainerRequest { id: "box".into() })
        .unwrap();
    ask();
    // Whatever controllers there are, every group counts its processor time.
    assert!(
        agent
            .call(&stats)
            .unwrap()
            .cgroup
            .contains_key("cpu.stat.usage_usec")
    );
    agent
        .call(&RemoveContainerRequest {
            id: "box".into(),
            force: true,
        })
        .unwrap();
    ask();
    assert_eq!(
        agent.call(&stats).unwrap_err().code(),
        Some(code::NOT_FOUND)
    );
}

/// `Pids` that lists one process, and not the container's.
#[test]
fn the_processes_of_a_container_are_listed_all() {
    need_containers!();
    let agent = Agent::start().with_root();
    begin(&agent, "box", shell("sleep 1000 & sleep 1000 & wait"));
    let id = || ListProcessesRequest { id: "box".into() };
    let begun = Instant::now();
    while agent.call(&id()).unwrap().pids.len() != 3 {
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "{:?}",
            agent.call(&id())
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Requests that succeed and do nothing.
#[test]
fn what_is_not_done_is_not_said_to_be() {
    need_containers!();
    let agent = Agent::start();
    let sandbox = CreateSandboxRequest {
        id: "pod".into(),
        modules: vec![KernelModule {
            name: "no/such".into(),
            ..KernelModule::default()
        }],
        ..CreateSandboxRequest::default()
    };
    assert!(agent.call(&sandbox).unwrap_err().code().is_some());
    let remove = RemoveContainerRequest {
        id: "nobody".into(),
        force: true,
    };
    assert_eq!(
        agent.call(&remove).unwrap_err().code(),
        Some(code::NOT_FOUND)
    );
}

/// setns on a thread that others share.
#[test]
fn the_agent_stays_in_its_own_namespaces() {
    need_containers!();
    let agent = Agent::start().with_root();
    let here = || -> BTreeSet<_> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", agent.pid())).unwrap();
        let mut all = BTreeSet::new();
        for task in tasks.flatten() {
            for name in [
                "mnt",
                "net",
                "pid",
                "pid_for_children",
                "ipc",
                "uts",
                "cgroup",
            ] {
                // A job's thread may be on its way out.
                if let Ok(is) = std::fs::read_link(task.path().join("ns").join(name)) {
                    all.insert((name, is));
                }
            }
        }
        all
    };
    let before = here();
    begin(&agent, "one", shell("exec sleep 1000"));
    let mut two = shell("exec sleep 1000");
    two.hostname.clear();
    for namespace in &mut two.linux.as_mut().unwrap().namespaces {
        if namespace.kind() != Kind::Mount && namespace.kind() != Kind::Cgroup {
            namespace.set_from(From::Container);
            namespace.container = "one".into();
        }
    }
    begin(&agent, "two", two);
    agent
        .exec("two", "x", process(&["/bin/true"]), b"")
        .unwrap();
    assert_eq!(before, here());
    // And the second is in those of the first.
    let link = |id: &str| {
        let (_, out, _) = agent
            .exec(
                id,
                "ns",
                process(&["/bin/readlink", "/proc/self/ns/net"]),
                b"",
            )
            .unwrap();
        out
    };
    assert_eq!(link("one"), link("two"));
}

/// A lock that is held over a slow call.
#[test]
fn a_request_that_takes_long_holds_up_no_other() {
    need_containers!();
    let agent = Agent::start().with_root();
    let mut client = agent.client();
    let never = WaitDeviceRequest {
        address: Some(DeviceAddress {
            at: Some(At::DiskSerial("never".into())),
        }),
        deadline_ms: 3000,
    };
    let begun = Instant::now();
    let pending = client.send(&never).unwrap();
    // Over the same connection, and over another.
    client.call(&HealthRequest {}).unwrap();
    agent.call(&ListContainersRequest {}).unwrap();
    agent.run("box", shell("true")).unwrap();
    assert!(
        begun.elapsed() < Duration::from_millis(2900),
        "{:?}",
        begun.elapsed()
    );
    let error = client.receive(pending).unwrap_err();
    assert_eq!(error.code(), Some(code::DEADLINE), "{error}");
}

/// A resize that can never succeed.
#[test]
fn a_storage_is_resized_or_the_refusal_says_why() {
    need_containers!();
    let agent = Agent::start().with_root();
    let storage = Storage {
        id: "small".into(),
        driver: Some(Driver::Tmpfs(Tmpfs {
            bytes: 1 << 20,
            ..Tmpfs::default()
        })),
        ..Storage::default()
    };
    agent
        .call(&AddStorageRequest {
            storage: Some(storage),
        })
        .unwrap();
    let size = || {
        agent
            .call(&StatStorageRequest { id: "small".into() })
            .unwrap()
            .bytes
    };
    assert_eq!(size(), 1 << 20);
    let resize = |id: &str| ResizeStorageRequest {
        id: id.into(),
        bytes: 4 << 20,
    };
    agent.call(&resize("small")).unwrap();
    assert_eq!(size(), 4 << 20);
    assert!(agent.call(&resize("root")).unwrap_err().code().is_some());
}

/// Requests that go round the policy.
#[test]
fn what_the_policy_denies_is_denied() {
    need_containers!();
    let agent = Agent::start_saying(&["deny=ExecProcess,ListContainers"]);
    let error = agent.call(&ListContainersRequest {}).unwrap_err();
    assert_eq!(error.code(), Some(code::DENIED), "{error}");
    agent.call(&HealthRequest {}).unwrap();
}
