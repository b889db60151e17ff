//! A root that is a folder of the host, and a network that the host configures.

use std::process::Command;

use testudo_agent_protocol::namespace::{From, Kind};
use testudo_agent_protocol::{
    Interface, ListInterfacesRequest, Root, Route, UpdateInterfaceRequest, UpdateRoutesRequest,
};

use crate::batch::Test;
use crate::context::Ctx;
use crate::ensure;
use crate::outcome::Verdict;
use crate::pod::{Pod, container, place, scratch_over};

pub(crate) const TESTS: &[Test] = &[
    Test::new("agent::a_root_shared_by_the_host", shared_root),
    Test::new("agent::the_hosts_network_is_configured", network),
];

fn shared_root(ctx: &Ctx) -> Verdict {
    let share = format!("tag=image,path={},ro", ctx.images.userland_folder.display());
    let work = ctx.path("work");
    std::fs::create_dir(&work)?;
    let launch = Pod::launch(ctx)
        .args(["--fs", &share])
        .args(["--fs", &format!("tag=work,path={}", work.display())]);
    let pod = Pod::start(ctx, launch)?;
    pod.add_share("image", true)?;
    pod.add_share("work", false)?;
    // Read-only as it is, and with a layer in memory.
    let mut spec = container("touch /x || echo no; head -1 /etc/passwd; id -u");
    spec.root = Some(Root {
        place: Some(place("image", "/")),
        readonly: true,
    });
    // Nothing can be made there for mounts that the image has no places for.
    spec.mounts
        .retain(|mount| !["/dev/mqueue"].contains(&mount.destination.as_str()));
    let ended = pod.run("plain", spec, b"")?;
    ensure!(
        ended.out == "no\nroot:x:0:0:root:/root:/bin/bash\n0\n",
        "{ended:?}"
    );
    pod.add("root", false, scratch_over("image"))?;
    let mut spec = container("echo one > /etc/new && cat /etc/new && echo two > /work/file");
    let mut mount = crate::pod::mount("/work", "bind", &["bind"]);
    mount.from = Some(place("work", "/"));
    spec.mounts.push(mount);
    let out = pod.run("over", spec, b"")?.well()?;
    ensure!(out == "one\n", "{out}");
    let file = std::fs::read_to_string(work.join("file"))?;
    ensure!(file == "two\n", "{file}");
    pod.end()?;
    Ok(())
}

fn ip(args: &[&str]) -> Verdict {
    let done = Command::new("ip").args(args).output()?;
    let why = String::from_utf8_lossy(&done.stderr).into_owned();
    ensure!(done.status.success(), "ip {args:?}: {why}");
    Ok(())
}

fn network(ctx: &Ctx) -> Verdict {
    let mac = "02:00:00:00:00:07";
    ip(&["tuntap", "add", "mode", "tap", "name", "podtap"])?;
    ip(&["address", "add", "10.77.0.1/24", "dev", "podtap"])?;
    ip(&["link", "set", "podtap", "up"])?;
    let launch = Pod::launch(ctx).args(["--net", &format!("tap=podtap,mac={mac}")]);
    let pod = Pod::start(ctx, launch)?;
    pod.add_root()?;
    let answer = pod.call(&UpdateInterfaceRequest {
        interface: Some(Interface {
            mac: mac.into(),
            name: "net0".into(),
            addresses: vec!["10.77.0.2/24".into(), "fd77::2/64".into()],
            mtu: 1400,
            noarp: false,
        }),
        deadline_ms: 5000,
    })?;
    let is = answer.interface.unwrap_or_default();
    ensure!((is.name.as_str(), is.mtu) == ("net0", 1400), "{is:?}");
    pod.call(&UpdateRoutesRequest {
        routes: vec![Route {
            destination: "0.0.0.0/0".into(),
            gateway: "10.77.0.1".into(),
            device: "net0".into(),
            ..Route::default()
        }],
    })?;
    let listed = pod.call(&ListInterfacesRequest {})?.interfaces;
    ensure!(listed.iter().any(|i| i.name == "net0"), "{listed:?}");
    // A container in the guest's own network reaches the host.
    let mut spec = container("ping -c 1 -W 10 10.77.0.1 > /dev/null && ip route | head -1");
    let namespaces = &mut spec.linux.get_or_insert_default().namespaces;
    for namespace in namespaces.iter_mut().filter(|n| n.kind() == Kind::Network) {
        namespace.from = From::Sandbox.into();
    }
    let out = pod.run("box", spec, b"")?.well()?;
    ensure!(
        out.trim() == "default via 10.77.0.1 dev net0 proto static",
        "{out}"
    );
    pod.end()?;
    ip(&["link", "del", "podtap"])
}
