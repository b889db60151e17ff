//! What is changed while the guest runs.

use std::fs;
use std::time::Duration;

use super::{MIB, counter, disk, image};
use crate::batch::Test;
use crate::context::Ctx;
use crate::ensure;
use crate::outcome::Verdict;
use crate::tests::SOON;

pub(super) const TESTS: &[Test] = &[
    Test::new("blk::a_new_size_is_seen_by_the_guest", resize),
    Test::new("blk::limits_hold_and_are_changed", limits),
];

fn resize(ctx: &Ctx) -> Verdict {
    let path = image(ctx, "disk", 8)?;
    let fixed = image(ctx, "fixed", 8)?;
    let vm = ctx
        .script(
            "size() { until [ $(blockdev --getsize64 /dev/vdb) = $(($1<<20)) ]; do sleep 0.05; done; \
                 echo SIZE $1; }\n\
             echo READY; size 16\n\
             printf grown | dd of=/dev/vdb bs=512 seek=$((16*2048-1)) conv=sync,fsync status=none\n\
             echo WRITTEN; size 4\n\
             until [ $(blockdev --getsize64 /dev/vdc) = $((12<<20)) ]; do sleep 0.05; done",
        )
        .args(disk(&path, "id=data"))
        .args(disk(&fixed, "ro,id=fixed"))
        .control()
        .spawn()?;
    vm.wait_for("READY", SOON)?;
    vm.ctl_ok(&["resize-disk", "data", "16M"])?;
    vm.wait_for("WRITTEN", SOON)?;
    let grown = fs::read(&path)?;
    ensure!(
        grown.len() as u64 == 16 * MIB,
        "the file has {}",
        grown.len()
    );
    ensure!(
        grown[grown.len() - 512..].starts_with(b"grown"),
        "not written"
    );
    for (args, words) in [
        (["resize-disk", "data", "1000"], &["data", "multiple"][..]),
        (["resize-disk", "nobody", "4M"], &["nobody", "no device"]),
        (["resize-disk", "rng", "4M"], &["rng", "cannot be resized"]),
        (["resize-disk", "fixed", "4M"], &["fixed", "8388608 bytes"]),
    ] {
        let refused = vm.ctl(&args)?;
        refused.expect_one_line_error(words)?;
    }
    vm.ctl_ok(&["resize-disk", "data", "4M"])?;
    vm.wait_for("SIZE 4", SOON)?;
    ensure!(
        fs::metadata(&path)?.len() == 4 * MIB,
        "the file did not shrink"
    );
    fs::File::options()
        .write(true)
        .open(&fixed)?
        .set_len(12 * MIB)?;
    vm.ctl_ok(&["resize-disk", "fixed", "12M"])?;
    let done = vm.finish(SOON)?;
    done.expect_code(0)?;
    done.facts().map(|_| ())
}

fn limits(ctx: &Ctx) -> Verdict {
    let path = image(ctx, "disk", 8)?;
    let vm = ctx
        .script(
            "timed() { local s=$(date +%s%N); \"$@\"; took=$((($(date +%s%N)-s)/1000000)); }\n\
             rd() { dd if=/dev/vdb of=/dev/null bs=$1 count=$2 iflag=direct status=none; }\n\
             timed rd 4k 60; fact iops $took\n\
             echo ONE; until [ -b /dev/vdb ] && [ $(blockdev --getsize64 /dev/vdb) = $((4<<20)) ]; do sleep 0.05; done\n\
             timed rd 64k 32; fact bw $took\n\
             echo TWO; until [ $(blockdev --getsize64 /dev/vdb) = $((2<<20)) ]; do sleep 0.05; done\n\
             timed rd 4k 60; fact free $took",
        )
        .args(disk(&path, "iops=20,iops-burst=10"))
        .args(["--disk", &format!("path={},id=x", image(ctx, "x", 1)?.display())])
        .control()
        .spawn()?;
    vm.wait_for("ONE", SOON)?;
    let stalls = counter(&vm, "disk1", "queue0.stalls")?;
    ensure!(stalls > 20, "only {stalls} requests had to wait");
    vm.ctl_ok(&["limits", "disk1", "--bw", "1M", "--bw-burst", "128K"])?;
    vm.ctl_ok(&["resize-disk", "disk1", "4M"])?;
    vm.wait_for("TWO", SOON)?;
    let refused = vm.ctl(&["limits", "disk1", "--direction", "rx", "--iops", "1"])?;
    refused.expect_one_line_error(&["disk1", "no direction"])?;
    vm.ctl(&["limits", "disk1", "--iops", "0"])?
        .expect_one_line_error(&["disk1", "a limit of 0"])?;
    vm.ctl_ok(&["limits", "disk1"])?;
    vm.ctl_ok(&["resize-disk", "disk1", "2M"])?;
    let done = vm.finish(Duration::from_secs(60))?;
    done.expect_code(0)?;
    let facts = done.facts()?;
    // 60 requests at 20 a second, less the burst; the first reads of the guest have had some of it.
    let iops: u64 = facts.number("iops")?;
    ensure!(iops >= 2400, "60 requests took {iops} ms");
    let bw: u64 = facts.number("bw")?;
    ensure!(bw >= 1700, "2 MiB took {bw} ms");
    let free: u64 = facts.number("free")?;
    ensure!(
        free * 2 < iops,
        "60 requests took {free} ms without a limit, {iops} ms with one"
    );
    Ok(())
}
