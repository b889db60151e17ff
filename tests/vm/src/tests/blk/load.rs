//! Load, and what happens in the middle of it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;

use super::{Loop, counter, disk, host, image, marked};
use crate::batch::Test;
use crate::context::Ctx;
use crate::ensure;
use crate::outcome::{Outcome, Verdict};
use crate::tests::SOON;

const LATER: Duration = Duration::from_secs(110);

pub(super) const TESTS: &[Test] = &[
    Test::new("blk::fio_verifies_every_engine", fio),
    Test::new("blk::fio_verifies_past_the_cache", fio_direct),
    Test::new("blk::auto_does_at_once_what_is_cached", cached),
    Test::new("blk::a_pause_under_load_loses_nothing", pause),
    Test::new("blk::a_reboot_under_load_boots_again", reboot),
    Test::new("blk::a_power_cut_keeps_what_was_flushed", power_cut),
];

/// Sets `v` and `jobs`: how fio writes, reads back and compares.
const FIO: &str = "v='--eta=never --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --output=/run/fio.txt'\n\
    check() { fio $v \"$@\" || { cat /run/fio.txt; return 1; }; }\n";

fn fio(ctx: &Ctx) -> Verdict {
    let script = format!(
        "{FIO}\
         for d in vdb vdc; do\n\
           check --name=rand --filename=/dev/$d --rw=randwrite --bs=4k --size=512K --iodepth=16\n\
           check --name=seq --filename=/dev/$d --rw=write --bs=128k --size=1M --iodepth=4\n\
           check --name=mixed --filename=/dev/$d --rw=randwrite --bsrange=512-64k --blockalign=512 --size=1M \
               --iodepth=8\n\
           check --name=trim --filename=/dev/$d --rw=trimwrite --bs=16k --size=1M --iodepth=4\n\
           check --name=queues --filename=/dev/$d --rw=randwrite --bs=4k --size=256K --offset_increment=2M \
               --numjobs=4 --iodepth=8 --group_reporting\n\
         done\n\
         fact errors $(dmesg | grep -c 'I/O error' || true)"
    );
    let mut launch = ctx.script(&script).args(["--cpus", "4"]);
    for (name, engine) in [("uring", "io_uring"), ("sync", "sync")] {
        let how = format!("engine={engine},queues=4,threads=2");
        launch = launch.args(disk(&image(ctx, name, 8)?, &how));
    }
    let done = launch.spawn()?.finish(LATER)?;
    done.expect_code(0)?;
    ensure!(done.facts()?.number::<u32>("errors")? == 0, "I/O errors");
    Ok(())
}

fn fio_direct(ctx: &Ctx) -> Verdict {
    let uring = Loop::new(&image(ctx, "uring", 8)?, &[])?;
    let sync = Loop::new(&image(ctx, "sync", 8)?, &["--sector-size", "4096"])?;
    let script = format!(
        "{FIO}\
         for d in vdb vdc; do\n\
           check --name=rand --filename=/dev/$d --rw=randwrite --bs=4k --size=512K --iodepth=16\n\
           check --name=seq --filename=/dev/$d --rw=write --bs=256k --size=1M --iodepth=4\n\
         done\n\
         fact errors $(dmesg | grep -c 'I/O error' || true)"
    );
    let done = ctx
        .script(&script)
        .args(disk(uring.path(), "direct,engine=io_uring"))
        .args(disk(sync.path(), "direct,engine=sync"))
        .spawn()?
        .finish(LATER)?;
    done.expect_code(0)?;
    ensure!(done.facts()?.number::<u32>("errors")? == 0, "I/O errors");
    Ok(())
}

/// A mounted file system; gone when this is.
struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

/// On a disk's file system, where a read waits unless the page cache has it. (The tests' own files are
/// in memory, where none does.)
fn cached(ctx: &Ctx) -> Verdict {
    const READS: u64 = 64;
    let device = Loop::new(&image(ctx, "ext4", 64)?, &[])?;
    host("mkfs.ext4", &["-q", &device.path().to_string_lossy()])?;
    let folder = ctx.path("mounted");
    fs::create_dir(&folder)?;
    let (from, to) = (device.path().to_string_lossy(), folder.to_string_lossy());
    host("mount", &["-t", "ext4", &*from, &*to])?;
    let mounted = Mounted(folder.clone());
    let path = folder.join("disk");
    fs::copy(marked(ctx, "content", 8)?, &path)?;
    File::open(&path)?.sync_all()?;
    fs::write("/proc/sys/vm/drop_caches", "1")?;
    let read =
        format!("dd if=/dev/vdb of=/dev/null bs=64k count={READS} iflag=direct 2> /dev/null\n");
    let script = format!(
        "{read}echo COLD; read -r _\n{read}echo WARM; read -r _\n\
         fact sum $(dd if=/dev/vdb bs=64k iflag=direct 2> /dev/null | sha256sum | cut -d' ' -f1)\n\
         {FIO}check --name=rand --filename=/dev/vdb --rw=randwrite --bs=4k --size=512K --iodepth=16\n\
         fact errors $(dmesg | grep -c 'I/O error' || true)"
    );
    let sum = host("sha256sum", &[&*path.to_string_lossy()])?;
    fs::write("/proc/sys/vm/drop_caches", "1")?;
    let launch = ctx.script(&script).args(disk(&path, "id=data,engine=auto"));
    let mut vm = launch.control().spawn()?;
    vm.wait_for("COLD", SOON)?;
    let cold = counter(&vm, "data", "cached_reads")?;
    vm.send(b"\n")?;
    vm.wait_for("WARM", SOON)?;
    let warm = counter(&vm, "data", "cached_reads")? - cold;
    println!("     cached reads: {cold} of a cold disk's, {warm} of {READS} a second time");
    ensure!(warm >= READS, "{warm} of {READS} reads were done at once");
    ensure!(
        counter(&vm, "data", "reads")? > cold + warm,
        "every read was done at once, also when nothing was cached"
    );
    vm.send(b"\n")?;
    let done = vm.finish(LATER)?;
    done.expect_code(0)?;
    let facts = done.facts()?;
    ensure!(sum.starts_with(facts.get("sum")?), "{sum}");
    ensure!(facts.number::<u32>("errors")? == 0, "I/O errors");
    drop(mounted);
    Ok(())
}

fn pause(ctx: &Ctx) -> Verdict {
    let script = format!(
        "{FIO}\
         echo LOAD\n\
         check --name=a --filename=/dev/vdb --rw=randrw --bs=4k --size=512K --offset_increment=2M --numjobs=4 \
             --iodepth=8 --group_reporting --loops=1000 --time_based --runtime=8\n\
         fact errors $(dmesg | grep -c 'I/O error' || true)"
    );
    let path = image(ctx, "disk", 8)?;
    let vm = ctx
        .script(&script)
        .args(["--cpus", "2"])
        .args(disk(&path, "queues=2,threads=2,id=data,engine=io_uring"))
        .control()
        .spawn()?;
    vm.wait_for("LOAD", SOON)?;
    let mut served = 0;
    // The first rounds may come before fio has begun.
    while served < 2 {
        let before = counter(&vm, "data", "writes")?;
        vm.ctl_ok(&["pause"])?;
        let at = counter(&vm, "data", "writes")?;
        let content = fs::read(&path)?;
        std::thread::sleep(Duration::from_millis(100));
        ensure!(counter(&vm, "data", "writes")? == at, "served while paused");
        ensure!(fs::read(&path)? == content, "written while paused");
        vm.ctl_ok(&["resume"])?;
        served += u32::from(before > 0 && at > before);
        ensure!(
            !vm.console().contains("SCRIPT end"),
            "the load ended after {served} pauses under load"
        );
    }
    let done = vm.finish(LATER)?;
    done.expect_code(0)?;
    ensure!(done.facts()?.number::<u32>("errors")? == 0, "I/O errors");
    Ok(())
}

/// A guest that resets itself with requests in flight finds its disks working again.
fn reboot(ctx: &Ctx) -> Verdict {
    let mark = image(ctx, "mark", 1)?;
    let done = ctx
        .script(
            "if [ \"$(dd if=/dev/vdc bs=6 count=1 status=none | tr -d '\\0')\" = second ]; then\n\
               dd if=/dev/vdb of=/dev/null bs=1M iflag=direct status=none; fact boot 2; exit 0\n\
             fi\n\
             printf second | dd of=/dev/vdc conv=fsync,notrunc status=none\n\
             fio --name=a --eta=never --filename=/dev/vdb --ioengine=libaio --direct=1 --rw=randwrite --bs=4k --iodepth=32 \
                 --numjobs=2 --time_based --runtime=60 --output=/dev/null &\n\
             until [ $(awk '{print $5}' /sys/block/vdb/stat) -gt 200 ]; do sleep 0.02; done\n\
             fact boot 1; echo 1 > /proc/sys/kernel/sysrq; sleep 0.2; echo b > /proc/sysrq-trigger; sleep 60",
        )
        .args(["--cpus", "2", "--on-reset", "reboot"])
        .args(disk(&image(ctx, "disk", 8)?, "queues=2,threads=2,cache=writethrough"))
        .args(disk(&mark, ""))
        .spawn()?
        .finish(LATER)?;
    done.expect_code(0)?;
    ensure!(done.stdout.contains("FACT boot=1"), "no first boot");
    ensure!(done.stdout.contains("FACT boot=2"), "no second boot");
    Ok(())
}

/// Blocks of each writer.
const PLACES: u64 = 200;

/// Four writers in the guest, each of which says what it has flushed; then the VMM is killed.
const WRITERS: &str = r#"cat > /run/w.py <<'E'
import os, sys
w = int(sys.argv[1])
f = os.open('/dev/vdb', os.O_RDWR)
for n in range(1, 1 << 20):
    at = (w << 20) + (n % 200) * 4096
    os.pwrite(f, n.to_bytes(8, 'little') * 512, at)
    os.fdatasync(f)
    os.write(1, b'ACK %d %d.\n' % (w, n))
E
for w in 0 1 2 3; do python3 /run/w.py $w & done; wait
"#;

fn power_cut(ctx: &Ctx) -> Verdict {
    for (n, how) in [
        "engine=io_uring,queues=2",
        "engine=sync",
        "cache=writethrough",
    ]
    .iter()
    .enumerate()
    {
        let path = image(ctx, &format!("disk{n}"), 4)?;
        let vm = ctx
            .script(WRITERS)
            .args(["--cpus", "2"])
            .args(disk(&path, how))
            .spawn()?;
        vm.wait_for_times("ACK ", 60, SOON)?;
        vm.signal(Signal::KILL)?;
        let done = vm.finish(SOON)?;
        ensure!(done.signal() == Some(9), "ended by itself");
        check_acknowledged(&path, &done.stdout).map_err(|e| match e {
            Outcome::Failed(why) => Outcome::Failed(format!("{how}: {why}")),
            skipped => skipped,
        })?;
    }
    Ok(())
}

/// All that a writer said it had flushed is there, as far as it has not been overwritten since.
fn check_acknowledged(path: &Path, said: &str) -> Verdict {
    let mut last = [0_u64; 4];
    for line in said.lines() {
        // The last line may be cut.
        let ack = line.strip_prefix("ACK ").and_then(|l| l.strip_suffix('.'));
        let Some((writer, number)) = ack.and_then(|ack| ack.split_once(' ')) else {
            continue;
        };
        if let (Ok(writer), Ok(number)) = (writer.parse::<usize>(), number.parse::<u64>())
            && let Some(last) = last.get_mut(writer)
        {
            *last = (*last).max(number);
        }
    }
    let acknowledged: u64 = last.iter().sum();
    ensure!(acknowledged >= 40, "only {last:?} were acknowledged");
    let file = File::open(path)?;
    for (writer, last) in (0_u64..).zip(last) {
        for number in last.saturating_sub(PLACES - 1).max(1)..=last {
            let mut block = [0; 4096];
            file.read_exact_at(&mut block, (writer << 20) + (number % PLACES) * 4096)?;
            let mut found = block
                .chunks(8)
                .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()));
            // The next round may have begun to overwrite it.
            ensure!(
                found.all(|f| f == number || f == number + PLACES),
                "{number} of writer {writer} was flushed, and is not there"
            );
        }
    }
    Ok(())
}
