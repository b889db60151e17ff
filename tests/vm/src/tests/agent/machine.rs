//! The agent's part of a boot, of the guest's memory, and of its end.

use std::collections::BTreeMap;

use testudo_agent_protocol::{
    CreateSandboxRequest, Dns, HealthRequest, MetricsRequest, ReseedRandomRequest, SetClockRequest,
    Stdio, code,
};

use crate::batch::Test;
use crate::context::Ctx;
use crate::ensure;
use crate::outcome::Verdict;
use crate::pod::{Pod, container, place, script};
use crate::tests::SOON;

pub(crate) const TESTS: &[Test] = &[
    Test::new("agent::starts_quickly_and_stays_small", quick_and_small),
    Test::new(
        "agent::what_was_written_is_kept_at_the_end",
        written_is_kept,
    ),
    Test::new("agent::clock_seed_and_names", clock_seed_names),
];

const MIB: f64 = 1_048_576.0;

fn metrics(pod: &Pod<'_>) -> Verdict<BTreeMap<String, f64>> {
    Ok(pod.call(&MetricsRequest {})?.values)
}

fn quick_and_small(ctx: &Ctx) -> Verdict {
    let pod = Pod::with_root(ctx)?;
    let health = pod.call(&HealthRequest {})?;
    let took = health.listening_ns.saturating_sub(health.started_ns);
    ensure!(health.init && health.api == 1, "{health:?}");
    pod.begin("box", container("exec sleep 1000"), Stdio::default())?;
    let now = metrics(&pod)?;
    let rss = now["testudo_agent_rss_bytes"] / MIB;
    eprintln!(
        "agent: began at {} ms of the guest, listened {} µs later; RSS with a container {rss:.2} MiB; {now:?}",
        health.started_ns / 1_000_000,
        took / 1000,
    );
    // Of a host that is emulated.
    ensure!(took < 100_000_000, "{took} ns from its start to listening");
    let small = rss < 6.0;
    ensure!(small, "{rss} MiB");
    pod.end()?;
    Ok(())
}

/// Nobody in the guest calls sync.
fn written_is_kept(ctx: &Ctx) -> Verdict {
    let folder = ctx.path("share");
    std::fs::create_dir(&folder)?;
    let disk = ctx.path("disk");
    std::fs::File::create(&disk)?.set_len(64 << 20)?;
    let launch = Pod::launch(ctx)
        .args([
            "--fs",
            &format!("tag=share,path={},writeback", folder.display()),
        ])
        .args(["--disk", &format!("path={},serial=data", disk.display())]);
    let pod = Pod::start(ctx, launch)?;
    pod.add_root()?;
    pod.add_share("share", false)?;
    let mut spec = container("echo kept > /share/file; exec sleep 1000");
    let mut share = crate::pod::mount("/share", "bind", &["bind"]);
    share.from = Some(place("share", "/"));
    spec.mounts.push(share);
    pod.begin("box", spec, Stdio::default())?;
    let seen = pod.exec(
        "box",
        "see",
        script("until test -s /share/file; do sleep 0.1; done"),
        b"",
    )?;
    seen.well()?;
    let done = pod.end()?;
    ensure!(!done.stdout.contains("panic"), "{}", done.stdout);
    let kept = std::fs::read_to_string(folder.join("file"))?;
    ensure!(kept == "kept\n", "{kept:?}");
    Ok(())
}

fn clock_seed_names(ctx: &Ctx) -> Verdict {
    let pod = Pod::with_root(ctx)?;
    pod.call(&CreateSandboxRequest {
        id: "pod".into(),
        hostname: "here".into(),
        dns: Some(Dns {
            servers: vec!["10.0.0.53".into()],
            searches: vec!["ns.example".into()],
            options: Vec::new(),
        }),
        ..CreateSandboxRequest::default()
    })?;
    let second = pod.refused(&CreateSandboxRequest {
        id: "pod".into(),
        ..CreateSandboxRequest::default()
    })?;
    ensure!(second.0 == code::EXISTS, "{second:?}");
    let mut spec = container("cat /etc/resolv.conf; cat /etc/hosts | grep here; date +%Y");
    for name in ["resolv.conf", "hosts"] {
        let mut file = crate::pod::mount(&format!("/etc/{name}"), "bind", &["bind"]);
        file.from = Some(place("sandbox", &format!("/{name}")));
        spec.mounts.push(file);
    }
    // 2040-01-01
    pod.call(&SetClockRequest {
        realtime_ns: 2_208_988_800_000_000_000,
    })?;
    pod.call(&ReseedRandomRequest { seed: vec![7; 64] })?;
    let out = pod.run("box", spec, b"")?.well()?;
    ensure!(
        out == "nameserver 10.0.0.53\nsearch ns.example\n127.0.1.1\there\n2040\n",
        "{out}"
    );
    // The host's wish to end, by the power button.
    pod.vm.ctl_ok(&["power-button"])?;
    pod.vm.finish(SOON)?.expect_code(0)
}
