//! Network devices: what a guest and its host say to each other.

mod growing;
mod host;
mod passt;

use std::fs::File;
use std::io::{Read, Write};
use std::time::Duration;

use serde_json::Value;

use crate::batch::Test;
use crate::context::{Ctx, Kernel};
use crate::ensure;
use crate::outcome::{Outcome, Verdict};
use crate::running::Running;
use crate::tests::SOON;
use host::{Tap, echo, ip, iperf, open_queue, run_tool};

pub(crate) const TESTS: &[Test] = &[
    Test::new("net::host_and_guest_reach_each_other", reach),
    Test::new("net::transfers_are_exact_across_pauses", exact),
    Test::new("net::vhost_transfers_are_exact_across_pauses", vhost),
    Test::new("net::iperf_with_and_without_offloads", offloads),
    Test::new("net::jumbo_frames", jumbo),
    Test::new("net::a_thousand_connections", connections),
    Test::new("net::queue_pairs_are_used_and_can_be_changed", |c| {
        queue_pairs(c, 6, "queues=2", true)
    }),
    Test::new("net::vhost_queue_pairs_are_used_and_can_be_changed", |c| {
        queue_pairs(c, 7, "queues=2,vhost", false)
    }),
    Test::new("net::the_cable_is_pulled_and_plugged_in", |c| {
        link(c, 8, "id=up")
    }),
    Test::new("net::the_cable_of_vhost_is_pulled_and_plugged_in", |c| {
        link(c, 9, "id=up,vhost")
    }),
    Test::new("net::limits_hold_and_are_lifted", limits),
    Test::new("net::a_guest_that_boots_again_has_its_network", reboot),
    Test::new("net::inherited_queues_and_vhosts_are_used", inherited),
    Test::new("net::a_tap_that_is_not_there_is_made", made),
    Test::new("net::vhost_reaches_memory_that_comes", growing::vhost).seconds(240),
    Test::new("net::passt_connects_an_ordinary_users_guest", passt::user),
    Test::new("net::passt_on_a_descriptor_and_its_end", passt::end),
    Test::new("net::bad_input_is_one_clear_line", bad_input),
];

/// Says so when it is ready, and goes on when the test says so.
const WAIT: &str = "echo READY\nread -r _\n";
/// Sends everything back on port 7.
const ECHO: &str = "socat -b 65536 TCP-LISTEN:7,fork,reuseaddr EXEC:cat &\n";

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
        ping(ctx, &tap, size, 10)?;
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

/// 24 MiB there and back, with three pauses on the way.
fn across_pauses(tap: &Tap, vm: &Running<'_>) -> Verdict {
    let total = 24 << 20;
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
    ensure!(tap.statistic("tx_bytes")? > 24 << 20, "nothing came by");
    finish(vm).map(drop)
}

/// In the guest; `-1` would end after a client that only looks whether it is there.
const IPERF: &str =
    "iperf3 -s > /dev/null &\nuntil ss -Hltn | grep -q ':5201 '; do sleep 0.05; done\n";

/// Mbit/s that both ways must exceed: it is what a network is for. A lab that has its machine to itself
/// does a hundred times that.
const SLOWEST: f64 = 2.0;
/// Seconds of an attempt: a machine that is busy with something else gets longer ones.
const ATTEMPTS: [u32; 3] = [1, 3, 9];

/// Megabits a second, measured again if they are not more than `floor`, in vain at last.
fn faster(ctx: &Ctx, tap: &Tap, floor: f64, more: &[&str]) -> Verdict<f64> {
    let mut best = 0.0_f64;
    for seconds in ATTEMPTS {
        best = best.max(iperf(ctx, tap, seconds, more)?);
        if best > floor {
            return Ok(best);
        }
    }
    Err(Outcome::Failed(format!(
        "{best:.1} Mbit/s ({more:?}) at the most, not more than {floor}"
    )))
}

fn both_ways(ctx: &Ctx, tap: &Tap, what: &str) -> Verdict {
    let down = faster(ctx, tap, SLOWEST, &[])?;
    let up = faster(ctx, tap, SLOWEST, &["-R"])?;
    println!("     {what}: {down:.0} Mbit/s to the guest, {up:.0} from it");
    Ok(())
}

fn offloads(ctx: &Ctx) -> Verdict {
    let tap = Tap::new(4, &[])?;
    let features = "for f in tx-checksumming rx-checksumming tcp-segmentation-offload; do\n\
                    fact $f $(ethtool -k eth0 | sed -n \"s/^$f: //p\" | cut -d' ' -f1)\ndone\n";
    let script = format!("{features}{IPERF}{WAIT}");
    for (args, expected) in [
        ("tap=t4", "on"),
        ("tap=t4,vhost", "on"),
        ("tap=t4,offloads=off", "off"),
        ("tap=t4,offloads=off,vhost", "off"),
    ] {
        let vm = start(ctx, &tap, &script, &["--net", args])?;
        both_ways(ctx, &tap, args)?;
        let facts = finish(vm)?;
        for feature in ["tx-checksumming", "tcp-segmentation-offload"] {
            let found = facts.get(feature)?;
            ensure!(found == expected, "{args}: {feature} is {found}");
        }
    }
    Ok(())
}

fn jumbo(ctx: &Ctx) -> Verdict {
    let tap = Tap::new(5, &[])?;
    tap.set_mtu("9000")?;
    // The guest finds the tap's MTU.
    let script = format!("fact mtu $(cat /sys/class/net/eth0/mtu)\n{ECHO}{WAIT}");
    let args = ["--net", "tap=t5,offloads=off"];
    let vm = start(ctx, &tap, &script, &args)?;
    ping(ctx, &tap, 8972, 20)?;
    echo(&tap.connect(7)?, 8 << 20, |_| Ok(()))?;
    let facts = finish(vm)?;
    ensure!(facts.get("mtu")? == "9000", "{facts:?}");
    Ok(())
}

fn connections(ctx: &Ctx) -> Verdict {
    const COUNT: usize = 1000;
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut open_files = getrlimit(Resource::Nofile);
    open_files.current = open_files.maximum;
    setrlimit(Resource::Nofile, open_files)?;
    let server = "ulimit -n 4096\npython3 /run/files/server &\n";
    let program = "import asyncio\n\
        async def echo(r, w):\n    \
            w.write(await r.readexactly(1000))\n    \
            await w.drain()\n    \
            w.close()\n\
        async def main():\n    \
            server = await asyncio.start_server(echo, '0.0.0.0', 7, backlog=1024)\n    \
            await server.serve_forever()\n\
        asyncio.run(main())\n";
    let tap = Tap::new(10, &[])?;
    let launch = ctx.script(&tap.script(&format!("{server}{WAIT}")));
    let launch = launch.script_file("server", program.as_bytes());
    let vm = launch.args(["--net", "tap=t10"]).spawn()?;
    vm.wait_for("READY", SOON)?;
    let mut streams = Vec::new();
    for _ in 0..COUNT {
        streams.push(tap.connect(7)?);
    }
    let message = |number: usize| -> Vec<u8> {
        let mut bytes = vec![0; 1000];
        host::pattern(number as u64 * 1000, &mut bytes);
        bytes
    };
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.write_all(&message(number))?;
    }
    for (number, stream) in streams.iter_mut().enumerate() {
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        ensure!(answer == message(number), "connection {number}");
    }
    finish(vm).map(drop)
}

fn queue_pairs(ctx: &Ctx, subnet: u8, options: &str, counted: bool) -> Verdict {
    let tap = Tap::new(subnet, &["multi_queue"])?;
    let script = format!(
        "fact pairs $(ethtool -l eth0 | sed -n 's/^Combined:[^0-9]*//p' | tr '\\n' '-')\n\
         for cpu in 0 1; do taskset -c $cpu iperf3 -s -p 520$((cpu + 1)) > /dev/null & done\n\
         for port in 5201 5202; do until ss -Hltn | grep -q \":$port \"; do sleep 0.05; done; done\n{WAIT}\
         ethtool -L eth0 combined 1\necho ONE\nread -r _\n\
         ethtool -L eth0 combined 2\necho TWO\nread -r _\n"
    );
    let net = format!("{},{options}", format_args!("tap={}", tap.name));
    let mut vm = start(ctx, &tap, &script, &["--cpus", "2", "--net", &net])?;
    let names = threads(&vm)?;
    for name in ["net-net0", "net-net0-1"] {
        ensure!(names.iter().any(|n| n == name), "threads are {names:?}");
    }
    let each = |up: &[&str]| -> Verdict {
        for port in ["5201", "5202"] {
            faster(ctx, &tap, SLOWEST, &[&["-p", port], up].concat())?;
        }
        Ok(())
    };
    each(&["-R"])?;
    each(&[])?;
    if counted {
        let counters = counters(&vm)?;
        for queue in ["queue1.bytes_in", "queue3.bytes_in"] {
            ensure!(counter(&counters, queue) > 1 << 20, "{queue}: {counters}");
        }
    }
    vm.send(b"\n")?;
    vm.wait_for("ONE", SOON)?;
    each(&[])?;
    vm.send(b"\n")?;
    vm.wait_for("TWO", SOON)?;
    vm.ctl_ok(&["pause"])?;
    vm.ctl_ok(&["resume"])?;
    each(&["-R"])?;
    let facts = finish(vm)?;
    ensure!(facts.get("pairs")? == "2-2-", "{facts:?}");
    Ok(())
}

fn threads(vm: &Running<'_>) -> Verdict<Vec<String>> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", vm.pid()))?;
    tasks
        .map(|task| {
            Ok(std::fs::read_to_string(task?.path().join("comm"))?
                .trim()
                .to_owned())
        })
        .collect()
}

fn link(ctx: &Ctx, subnet: u8, options: &str) -> Verdict {
    let tap = Tap::new(subnet, &[])?;
    let wait = |state: &str, word: &str| {
        let carrier = "cat /sys/class/net/eth0/carrier";
        format!("until [ \"$({carrier})\" = {state} ]; do sleep 0.05; done\necho {word}\n")
    };
    let script = format!(
        "echo READY\n{}{}read -r _\n",
        wait("0", "PULLED"),
        wait("1", "PLUGGED")
    );
    let net = format!("tap={},{options}", tap.name);
    let vm = start(ctx, &tap, &script, &["--net", &net])?;
    ping(ctx, &tap, 56, 3)?;
    vm.ctl_ok(&["link", "up", "down"])?;
    vm.wait_for("PULLED", SOON)?;
    let to = tap.guest().to_string();
    let lost = run_tool(
        ctx,
        &["ping", "-n", "-q", "-c", "2", "-i", "0.2", "-W", "1", &to],
    );
    ensure!(lost.is_err(), "a pulled cable carries packets");
    vm.ctl_ok(&["link", "up", "up"])?;
    vm.wait_for("PLUGGED", SOON)?;
    ping(ctx, &tap, 56, 3)?;
    let refused = vm.ctl(&["link", "rng", "down"])?;
    refused.expect_one_line_error(&["rng", "cannot have a link"])?;
    finish(vm).map(drop)
}

/// A mebibyte a second is 8.4 Mbit/s, and what may come at once adds as much in the first second.
/// That much it never exceeds, however busy the machine is; without the limit it soon does.
fn limits(ctx: &Ctx) -> Verdict {
    const SECONDS: u32 = 3;
    let tap = Tap::new(11, &[])?;
    let args = ["--net", "tap=t11,rx-bw=1M"];
    let vm = start(ctx, &tap, &format!("{IPERF}{WAIT}"), &args)?;
    let most = 18.0;
    let held = |more: &[&str], what: &str| {
        let rate = iperf(ctx, &tap, SECONDS, more)?;
        println!("     {what}: {rate:.1} Mbit/s");
        ensure!(rate > 0.1 && rate < most, "{what}: {rate} Mbit/s");
        Ok(())
    };
    held(&[], "limited to the guest")?;
    faster(ctx, &tap, most, &["-R"])?;
    vm.ctl_ok(&["limits", "net0", "--direction", "tx", "--bw", "1M"])?;
    held(&["-R"], "limited from the guest")?;
    vm.ctl_ok(&["limits", "net0"])?;
    faster(ctx, &tap, most, &[])?;
    let counters = counters(&vm)?;
    ensure!(counter(&counters, "queue0.stalls") > 0, "{counters}");
    finish(vm).map(drop)
}

fn reboot(ctx: &Ctx) -> Verdict {
    for (subnet, options) in [(12, ""), (13, ",vhost")] {
        let tap = Tap::new(subnet, &[])?;
        let net = format!("tap={}{options}", tap.name);
        let script = format!("fact mac $(cat /sys/class/net/eth0/address)\n{ECHO}{WAIT}");
        let launch = ctx.guest("script,reboot").script(&tap.script(&script));
        let launch = launch.args(["--on-reset", "reboot", "--net", &net]);
        let mut vm = launch.control().spawn()?;
        for boot in 1..=2 {
            vm.wait_for_times("READY", boot, SOON)?;
            echo(&tap.connect(7)?, 1 << 20, |_| Ok(()))?;
            vm.send(b"\n")?;
        }
        vm.wait_for_times("READY", 3, SOON)?;
        let macs: Vec<_> = vm
            .console()
            .lines()
            .filter_map(|l| Some(l.strip_prefix("FACT mac=")?.to_owned()))
            .collect();
        ensure!(
            macs.len() == 3 && macs.iter().all(|m| *m == macs[0]),
            "{macs:?}"
        );
        vm.ctl_ok(&["stop"])?;
        vm.finish(SOON)?.expect_code(0)?;
    }
    Ok(())
}

const TAP: u16 = 0x0002;
const NO_PI: u16 = 0x1000;
const VNET_HDR: u16 = 0x4000;
const MULTI_QUEUE: u16 = 0x0100;

/// A guest whose VMM is nobody's, who may not even read the images.
fn nobodys<'a>(ctx: &'a Ctx) -> Verdict<crate::launch::Launch<'a>> {
    let mut launch = ctx.guest("poweroff");
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    let kvm = launch.pass(&kvm)?;
    let kernel = launch.pass(&File::open(ctx.kernel(Kernel::OwnBzimage))?)?;
    let initrd = launch.pass(&File::open(&ctx.images.initramfs_bare)?)?;
    let launch = launch.kernel_source(kernel).initrd_source(initrd);
    Ok(launch.arg("--kvm").arg(kvm).as_nobody())
}

fn inherited(ctx: &Ctx) -> Verdict {
    let tap = Tap::new(14, &["multi_queue"])?;
    let flags = TAP | NO_PI | VNET_HDR | MULTI_QUEUE;
    let queues = [open_queue("t14", flags)?, open_queue("t14", flags)?];
    let vhosts =
        ["/dev/vhost-net"; 2].map(|path| File::options().read(true).write(true).open(path));
    let mut launch = ctx.script(&tap.script(&format!("{ECHO}{WAIT}")));
    let number = |name: String| name.trim_start_matches("fd:").to_owned();
    let mut fds = Vec::new();
    for queue in &queues {
        fds.push(number(launch.pass(queue)?));
    }
    let mut vhostfds = Vec::new();
    for vhost in vhosts {
        vhostfds.push(number(launch.pass(&vhost?)?));
    }
    let net = format!("fds={},vhostfds={}", fds.join(":"), vhostfds.join(":"));
    let vm = launch.args(["--cpus", "2", "--net", &net]).spawn()?;
    drop(queues);
    vm.wait_for("READY", SOON)?;
    echo(&tap.connect(7)?, 4 << 20, |_| Ok(()))?;
    finish(vm).map(drop)
}

fn made(ctx: &Ctx) -> Verdict {
    let tap = Tap::made_elsewhere(15);
    let vm = ctx
        .script(&tap.script(&format!("fact mtu $(cat /sys/class/net/eth0/mtu)\n{WAIT}")))
        .args(["--net", "tap=t15,mtu=1400"])
        .spawn()?;
    vm.wait_for("READY", SOON)?;
    tap.address()?;
    ping(ctx, &tap, 1372, 5)?;
    let facts = finish(vm)?;
    ensure!(facts.get("mtu")? == "1400", "{facts:?}");
    ensure!(
        ip(&["link", "show", "t15"]).is_err(),
        "the tap outlives the VM"
    );
    Ok(())
}

fn bad_input(ctx: &Ctx) -> Verdict {
    let single = Tap::new(16, &[])?;
    let multi = Tap::new(17, &["multi_queue"])?;
    let open = |name: &str, flags| open_queue(name, flags);
    let wrong = |args: &[&str], words: &[&str]| -> Verdict {
        let done = ctx.guest("poweroff").args(args).run()?;
        done.expect_one_line_error(words)
    };
    wrong(&["--net", "tap=t16,queues=2"], &["t16", "multi_queue"])?;
    wrong(
        &["--net", "stream=/nonexistent/passt"],
        &["net0", "cannot connect to /nonexistent/passt", "passt"],
    )?;
    wrong(&["--net", "stream=/s,tap=t16"], &["net0", "not to both"])?;
    wrong(&["--net", "tap=lo"], &["lo", "not a tap"])?;
    wrong(&["--net", "tap=t16,mac=03:00:00:00:00:00"], &["group"])?;
    wrong(&["--net", "fd=9"], &["fd:9", "not an open descriptor"])?;
    wrong(&["--net", "fds=9:9"], &["fd:9", "twice"])?;
    wrong(
        &[
            "--net",
            "tap=t16,mac=02:00:00:00:00:01",
            "--net",
            "tap=t17,mac=02:00:00:00:00:01",
        ],
        &["net1", "02:00:00:00:00:01"],
    )?;
    wrong(
        &["--net", "tap=t16,id=a", "--net", "tap=t17,id=a"],
        &["two devices have this id"],
    )?;
    wrong(
        &["--net", "tap=t16", "--net", "tap=t16"],
        &["t16", "in use"],
    )?;
    let held = open("t16", TAP | NO_PI | VNET_HDR)?;
    wrong(&["--net", "tap=t16"], &["t16", "in use"])?;
    let with = |files: &[&File], key: &str, words: &[&str]| -> Verdict {
        let mut launch = ctx.guest("poweroff");
        let mut numbers = Vec::new();
        for file in files {
            numbers.push(launch.pass(file)?.trim_start_matches("fd:").to_owned());
        }
        let sign = if key.ends_with(':') { "" } else { "=" };
        let net = format!("{key}{sign}{}", numbers.join(":"));
        launch
            .args(["--net", &net])
            .run()?
            .expect_one_line_error(words)
    };
    let flags = TAP | NO_PI | VNET_HDR | MULTI_QUEUE;
    let multi_queue = open("t17", flags)?;
    with(&[&File::open("/dev/null")?], "fd", &["it is not a tap"])?;
    with(
        &[&File::open("/dev/null")?],
        "mtu=1500,stream=fd:",
        &["not a connected stream socket"],
    )?;
    with(&[&held, &multi_queue], "fds", &["one queue"])?;
    let other = Tap::new(18, &["multi_queue"])?;
    let other_queue = open("t18", flags)?;
    with(&[&multi_queue, &other_queue], "fds", &["t17", "t18"])?;
    let bare = Tap::new(19, &[])?;
    with(
        &[&open("t19", TAP | NO_PI)?],
        "fd",
        &["t19", "IFF_VNET_HDR"],
    )?;
    with(
        &[&File::open("/dev/null")?],
        "tap=t19,vhostfd",
        &["VHOST_SET_OWNER"],
    )?;
    for (tap, word) in [("t16", "not this user's"), ("t99", "there is no tap t99")] {
        let done = nobodys(ctx)?.args(["--net", &format!("tap={tap}")]).run()?;
        done.expect_one_line_error(&[tap, word])?;
    }
    drop((single, multi, other, bare));
    Ok(())
}
