//! The Debian userland of guests, and scripts that run in it.

use std::time::Duration;

use crate::batch::Test;
use crate::context::{Ctx, Kernel};
use crate::outcome::{Outcome, Verdict};
use crate::{ensure, tests::SOON};

pub(crate) const TESTS: &[Test] = &[
    Test::new("userland::a_script_runs_under_our_kernel", ours),
    Test::new("userland::a_script_runs_under_debians_kernel", stock),
    Test::new("userland::a_command_that_fails_fails_the_script", failing),
    Test::new("userland::a_script_and_its_test_talk", talking),
];

/// What fails here fails every test that has a script.
const EVERYTHING: &str = r#"
fact release "$(uname -r)"
fact root "$(stat -f -c %T /)"
grep -q bookworm /etc/os-release
echo written > /etc/written && grep -q written /etc/written
ip -brief address show lo | grep -q 127.0.0.1
fact file "$(/run/files/hello)"
for program in fio iperf3 git gcc make python3 socat ethtool mkfs.ext4 setfattr setfacl strace modprobe; do
    command -v $program > /dev/null
done
"#;

fn ours(ctx: &Ctx) -> Verdict {
    everything(ctx, Kernel::OwnBzimage)
}

fn stock(ctx: &Ctx) -> Verdict {
    everything(ctx, Kernel::StockBzimage)
}

fn everything(ctx: &Ctx, kernel: Kernel) -> Verdict {
    let launch = ctx.script(EVERYTHING).kernel(kernel);
    let launch = launch.script_file("hello", b"#!/bin/sh\necho of the test\n");
    let done = launch.run()?;
    done.expect_code(0)?;
    done.expect_line("END script")?;
    let facts = done.facts()?;
    ensure!(
        facts.get("release")?.ends_with("-testudo") != kernel.is_stock(),
        "{facts:?}"
    );
    ensure!(facts.get("root")? == "overlayfs", "{facts:?}");
    ensure!(facts.get("file")? == "of the test", "{facts:?}");
    Ok(())
}

fn failing(ctx: &Ctx) -> Verdict {
    let done = ctx.script("fact before 1\nfalse\nfact after 1").run()?;
    done.expect_line("script: line 2: `false` returned 1")?;
    ensure!(!done.stdout.contains("FACT after"), "it went on");
    match done.facts() {
        Err(Outcome::Failed(why)) if why.contains("returned 1") => Ok(()),
        other => Err(Outcome::Failed(format!("the facts are {other:?}"))),
    }
}

fn talking(ctx: &Ctx) -> Verdict {
    let mut vm = ctx
        .script("echo ready\nread -r word\nfact heard \"$word\"")
        .spawn()?;
    vm.wait_for("ready", SOON)?;
    vm.send(b"hello\n")?;
    let done = vm.finish(Duration::from_secs(60))?;
    ensure!(done.facts()?.get("heard")? == "hello", "{}", done.stdout);
    Ok(())
}
