//! Data and what the guest is told about its disks.

use std::os::unix::fs::MetadataExt;

use super::{Loop, MIB, disk, host, image, marked, same};
use crate::batch::Test;
use crate::context::Ctx;
use crate::ensure;
use crate::outcome::Verdict;
use std::fs;

pub(super) const TESTS: &[Test] = &[
    Test::new(
        "blk::what_the_host_wrote_and_the_guest_copied_is_the_same",
        copies,
    ),
    Test::new("blk::the_guest_is_told_what_a_disk_is", told),
    Test::new("blk::a_read_only_disk_is_not_written", readonly),
    Test::new("blk::discards_and_zeroes_reach_the_host", discards),
    Test::new("blk::block_devices_and_o_direct", direct),
    Test::new("blk::a_file_handed_over_by_descriptor", descriptor),
];

/// From a disk the host filled to disks of every engine, with every size of block.
fn copies(ctx: &Ctx) -> Verdict {
    let from = marked(ctx, "from", 4)?;
    let kinds = [
        "engine=io_uring",
        "engine=sync",
        "engine=io_uring,queues=4,threads=4",
        "engine=sync,queues=4,threads=2",
        "cache=writethrough",
        "block-size=4096",
    ];
    let mut launch = ctx.script(
        "copy() { dd if=/dev/vdb of=/dev/$1 bs=$2 iflag=direct oflag=direct status=none; }\n\
         copy vdc 4k; copy vdd 64k; copy vde 1M\n\
         for n in 0 1 2 3; do dd if=/dev/vdb of=/dev/vdf bs=64k skip=$((n*16)) seek=$((n*16)) \
             count=16 iflag=direct oflag=direct status=none & done; wait\n\
         cat /dev/vdb > /dev/vdg; copy vdh 128k; sync\n\
         for d in vdc vdd vde vdf vdg vdh; do cmp /dev/vdb /dev/$d; done\n\
         fact errors $(dmesg | grep -c 'I/O error' || true)",
    );
    launch = launch.args(["--cpus", "4"]).args(disk(&from, "ro"));
    let mut copies = Vec::new();
    for (n, kind) in kinds.iter().enumerate() {
        let to = image(ctx, &format!("to{n}"), 4)?;
        launch = launch.args(disk(&to, kind));
        copies.push(to);
    }
    let done = launch.run()?;
    done.expect_code(0)?;
    ensure!(done.facts()?.number::<u32>("errors")? == 0, "I/O errors");
    copies.iter().try_for_each(|copy| same(&from, copy))
}

fn told(ctx: &Ctx) -> Verdict {
    let plain = image(ctx, "plain", 8)?;
    let large = image(ctx, "large", 16)?;
    let done = ctx
        .script(
            "tell() { fact $1.$2 \"$(tr -d '\\0' < /sys/block/$1/$2)\"; }\n\
             for d in vdb vdc; do\n\
               for f in serial size ro cache_type queue/logical_block_size queue/physical_block_size \
                   queue/discard_max_bytes queue/write_zeroes_max_bytes queue/discard_granularity; do\n\
                 tell $d $f\n\
               done\n\
               fact $d.queues $(ls /sys/block/$d/mq | wc -l)\n\
             done\n\
             echo 'write through' > /sys/block/vdb/cache_type; fact after \"$(cat /sys/block/vdb/cache_type)\"\n\
             dd if=/dev/zero of=/dev/vdb bs=4k count=1 oflag=direct status=none",
        )
        .args(["--cpus", "4"])
        .args(disk(&plain, "serial=number-1"))
        .args(disk(
            &large,
            "ro,id=big,queues=4,block-size=2048,physical-block-size=8192",
        ))
        .run()?;
    done.expect_code(0)?;
    let facts = done.facts()?;
    for (key, value) in [
        ("vdb.serial", "number-1"),
        ("vdb.size", "16384"),
        ("vdb.ro", "0"),
        ("vdb.cache_type", "write back"),
        ("vdb.queue/logical_block_size", "512"),
        ("vdb.queue/physical_block_size", "4096"),
        ("vdb.queue/discard_granularity", "4096"),
        ("vdb.queues", "1"),
        ("vdc.serial", "big"),
        ("vdc.size", "32768"),
        ("vdc.ro", "1"),
        ("vdc.queue/logical_block_size", "2048"),
        ("vdc.queue/physical_block_size", "8192"),
        ("vdc.queue/discard_max_bytes", "0"),
        ("vdc.queues", "4"),
        ("after", "write through"),
    ] {
        let is = facts.get(key)?;
        ensure!(is == value, "{key} is {is}, not {value}");
    }
    for key in [
        "vdb.queue/discard_max_bytes",
        "vdb.queue/write_zeroes_max_bytes",
    ] {
        ensure!(facts.number::<u64>(key)? >= MIB, "{key} is small");
    }
    Ok(())
}

fn readonly(ctx: &Ctx) -> Verdict {
    let path = marked(ctx, "disk", 1)?;
    let before = fs::read(&path)?;
    let done = ctx
        .script(
            "fact ro $(blockdev --getro /dev/vdb)\n\
             if dd if=/dev/zero of=/dev/vdb bs=4k count=1 oflag=direct status=none; then fact wrote 1; \
             else fact wrote 0; fi\n\
             blockdev --setrw /dev/vdb || true\n\
             dd if=/dev/zero of=/dev/vdb bs=4k count=1 oflag=direct status=none || true\n\
             fact hash $(sha256sum < /dev/vdb | cut -c1-64)",
        )
        .args(disk(&path, "ro"))
        .run()?;
    done.expect_code(0)?;
    let facts = done.facts()?;
    ensure!(
        facts.get("ro")? == "1" && facts.get("wrote")? == "0",
        "written"
    );
    ensure!(fs::read(&path)? == before, "the file has changed");
    let hash = host("sha256sum", &[&path.to_string_lossy()])?;
    ensure!(
        hash.starts_with(facts.get("hash")?),
        "the guest read something else"
    );
    Ok(())
}

/// What a guest gives up is given up on the host, and what it did not name stays.
fn discards(ctx: &Ctx) -> Verdict {
    let engines = ["engine=io_uring", "engine=sync"];
    let mut launch = ctx.script(
        "for d in vdb vdc; do\n\
           blkdiscard -o 1M -l 2M /dev/$d; blkdiscard -z -o 4M -l 1M /dev/$d\n\
           python3 - /dev/$d <<'E'\n\
import fcntl,os,struct,sys\n\
f=os.open(sys.argv[1],os.O_RDWR)\n\
assert os.pread(f,1<<20,4<<20)==bytes(1<<20)\n\
fcntl.ioctl(f,0x127f,struct.pack('QQ',6<<20,4096))\n\
E\n\
         done",
    );
    let mut paths = Vec::new();
    for (n, engine) in engines.iter().enumerate() {
        let path = marked(ctx, &format!("disk{n}"), 8)?;
        launch = launch.args(disk(&path, engine));
        paths.push(path);
    }
    let before = fs::metadata(&paths[0])?.blocks();
    launch.run()?.expect_code(0)?;
    let whole = fs::read(marked(ctx, "as-it-was", 8)?)?;
    for path in &paths {
        let freed = before - fs::metadata(path)?.blocks().min(before);
        ensure!(freed >= 2 * MIB / 512, "only {freed} sectors were given up");
        let now = fs::read(path)?;
        let mib = usize::try_from(MIB)?;
        for gone in [mib..3 * mib, 4 * mib..5 * mib, 6 * mib..6 * mib + 4096] {
            ensure!(
                now[gone.clone()].iter().all(|b| *b == 0),
                "{gone:?} is not zero"
            );
        }
        for kept in [
            0..mib,
            3 * mib..4 * mib,
            5 * mib..6 * mib,
            6 * mib + 4096..8 * mib,
        ] {
            ensure!(
                now[kept.clone()] == whole[kept.clone()],
                "{kept:?} has changed"
            );
        }
    }
    Ok(())
}

/// A loop device as it is; one with blocks of 4 KiB past the cache; a file of a real file system.
fn direct(ctx: &Ctx) -> Verdict {
    let from = marked(ctx, "from", 4)?;
    let plain = Loop::new(&image(ctx, "plain", 4)?, &[])?;
    let large = Loop::new(&image(ctx, "large", 4)?, &["--sector-size", "4096"])?;
    let ext4 = Loop::new(&image(ctx, "ext4", 32)?, &[])?;
    host("mkfs.ext4", &["-q", &ext4.0])?;
    let at = ctx.path("mounted");
    fs::create_dir(&at)?;
    host("mount", &[&ext4.0, &at.to_string_lossy()])?;
    let outcome = direct_on(ctx, &from, [plain, large], &at);
    host("umount", &[&at.to_string_lossy()])?;
    outcome
}

fn direct_on(ctx: &Ctx, from: &std::path::Path, loops: [Loop; 2], at: &std::path::Path) -> Verdict {
    let file = at.join("disk");
    fs::File::create(&file)?.set_len(4 * MIB)?;
    let second = at.join("second");
    fs::File::create(&second)?.set_len(4 * MIB)?;
    let [plain, large] = loops;
    let done = ctx
        .script(
            "for d in vdc vdd vde vdf; do\n\
               cat /dev/vdb > /dev/$d; sync; cmp /dev/vdb /dev/$d\n\
               fact $d.block $(cat /sys/block/$d/queue/logical_block_size)\n\
               blkdiscard -o 2M -l 1M /dev/$d\n\
               blkdiscard -z -o 3M -l 64K /dev/$d\n\
             done\n\
             blockdev --getsize64 /dev/vdd",
        )
        .args(disk(from, "ro"))
        .args(disk(plain.path(), ""))
        .args(disk(large.path(), "direct"))
        .args(disk(&file, "direct,engine=io_uring"))
        .args(disk(&second, "direct,engine=sync"))
        .run()?;
    done.expect_code(0)?;
    let facts = done.facts()?;
    for (key, block) in [("vdc.block", "512"), ("vdd.block", "4096")] {
        let is = facts.get(key)?;
        ensure!(is == block, "{key} is {is}");
    }
    let whole = fs::read(from)?;
    let mib = usize::try_from(MIB)?;
    for path in [plain.path(), large.path(), &file, &second] {
        let now = fs::read(path)?;
        let name = path.display();
        ensure!(
            now[..2 * mib] == whole[..2 * mib],
            "{name} has not what was written"
        );
        let zeroed = &now[3 * mib..3 * mib + (64 << 10)];
        ensure!(zeroed.iter().all(|b| *b == 0), "{name} was not zeroed");
        let rest = 3 * mib + (64 << 10)..;
        ensure!(
            now[rest.clone()] == whole[rest],
            "{name}: too much was zeroed"
        );
    }
    Ok(())
}

fn descriptor(ctx: &Ctx) -> Verdict {
    let from = marked(ctx, "from", 1)?;
    let to = image(ctx, "to", 1)?;
    let mut launch = ctx.script("dd if=/dev/vdb of=/dev/vdc bs=64k oflag=direct status=none");
    let from_fd = launch.pass(&fs::File::open(&from)?)?;
    let to_fd = launch.pass(&fs::File::options().read(true).write(true).open(&to)?)?;
    let from_fd = from_fd.replace("fd:", "fd=");
    let done = launch
        .args(["--disk", &format!("{from_fd},ro")])
        .args(["--disk", &format!("path={to_fd}")])
        .run()?;
    done.expect_code(0)?;
    done.facts()?;
    same(&from, &to)
}
