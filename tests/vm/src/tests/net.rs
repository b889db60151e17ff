//! Network devices: what a guest and its host say to each other.

mod host;

use std::time::Duration;

use serde_json::Value;

use crate::batch::Test;
use crate::context::Ctx;
use crate::ensure;
use crate::outcome::Verdict;
use crate::running::Running;
use crate::tests::SOON;
use host::{Tap, echo, run_tool};

pub(crate) const TESTS: &[Test] = &[
    Test::new("net::host_and_guest_reach_each_other", reach),
    Test::new("net::transfers_are_exact_across_pauses", exact),
    Test::new("net::vhost_transfers_are_exact_across_pauses", vhost),
];

/// Says so when it is ready, and goes on when the test says so.
const WAIT: &str = "echo READY\nread -r _\n";
/// Sends everything back on port 7.
const ECHO: &str = "socat -b 65536 TCP-LISTEN:7,fork,reuseaddr PIPE &\n";

fn start<'a>(ctx: &'a Ctx, tap: &Tap, then: &str, args: &[&str]) -> Verdict<Running<'a>> {
    let vm = ctx.script(&tap.script(then)).args(args).control().spawn()?;
    vm.wait_for("READY", SOON)?;
    Ok(vm)
}

fn finish(mut vm: Running<'_>) -> Verdict<crate::facts::Facts> {
    vm.send(b"\n")?;
    let done = vm.finish(SOON)?;
    done.expect_code(0)?;
    done.facts()
}

fn counters(vm: &Running<'_>) -> Verdict<Value> {
    Ok(serde_json::from_str(&vm.ctl_ok(&["counters"])?)?)
}

fn counter(counters: &Value, name: &str) -> u64 {
    let value = counters.get("net0").and_then(|net| net.get(name));
    value.and_then(Value::as_u64).unwrap_or(u64::MAX)
}

fn ping(ctx: &Ctx, tap: &Tap, size: u32, count: u32) -> Verdict {
    let (size, count, to) = (size.to_string(), count.to_string(), tap.guest().to_string());
    let command = [
        "ping", "-n", "-q", "-i", "0.02", "-c", &count, "-W", "5", "-s", &size, &to,
    ];
    let told = run_tool(ctx, &command)?;
    ensure!(told.contains(" 0% packet loss"), "{told}");
    Ok(())
}

fn reach(ctx: &Ctx) -> Verdict {
    let tap = Tap::new(1, &[])?;
    let then = format!(
        "fact mac $(cat /sys/class/net/eth0/address)\n\
         fact mtu $(cat /sys/class/net/eth0/mtu)\n\
         fact driver $(basename $(readlink /sys/class/net/eth0/device/driver))\n\
         ping -q -i 0.02 -c 20 -s 1400 {}\n{WAIT}",
        tap.host()
    );
    let args = ["--net", "tap=t1,mac=02:00:00:00:00:4d"];
    let vm = start(ctx, &tap, &then, &args)?;
    for size in [0, 1, 56, 1472, 1473, 20000] {
        ping(ctx, &tap, size, 20)?;
    }
    let info: Value = serde_json::from_str(&vm.ctl_ok(&["info"])?)?;
    ensure!(info.to_string().contains("virtio-net"), "{info}");
    let counters = counters(&vm)?;
    ensure!(
        counter(&counters, "queue0.bytes_out") > 100_000,
        "{counters}"
    );
    ensure!(
        counter(&counters, "queue1.bytes_in") > 100_000,
        "{counters}"
    );
    ensure!(counter(&counters, "rx_dropped") == 0, "{counters}");
    let facts = finish(vm)?;
    ensure!(facts.get("mac")? == "02:00:00:00:00:4d", "{facts:?}");
    ensure!(facts.get("mtu")? == "1500", "{facts:?}");
    ensure!(facts.get("driver")? == "virtio_net", "{facts:?}");
    Ok(())
}

fn exact(ctx: &Ctx) -> Verdict {
    let tap = Tap::new(2, &[])?;
    let vm = start(ctx, &tap, &format!("{ECHO}{WAIT}"), &["--net", "tap=t2"])?;
    across_pauses(&tap, &vm)?;
    finish(vm).map(drop)
}

/// 32 MiB there and back, with three pauses on the way.
fn across_pauses(tap: &Tap, vm: &Running<'_>) -> Verdict {
    let total = 32 << 20;
    let mut next = total / 4;
    echo(&tap.connect(7)?, total, |received| {
        if received >= next && next < total {
            next += total / 4;
            vm.ctl_ok(&["pause"])?;
            std::thread::sleep(Duration::from_millis(200));
            vm.ctl_ok(&["resume"])?;
        }
        Ok(())
    })
}

fn vhost(ctx: &Ctx) -> Verdict {
    let tap = Tap::new(3, &[])?;
    let args = ["--net", "tap=t3,vhost"];
    let vm = start(ctx, &tap, &format!("{ECHO}{WAIT}"), &args)?;
    ping(ctx, &tap, 1400, 20)?;
    across_pauses(&tap, &vm)?;
    let counters = counters(&vm)?;
    ensure!(counter(&counters, "queue0.chains") == 0, "{counters}");
    ensure!(tap.statistic("tx_bytes")? > 32 << 20, "nothing came by");
    finish(vm).map(drop)
}
