//! Files, locks, wrong words, threads.

use std::fs::{self, File};

use super::{disk, image};
use crate::batch::Test;
use crate::context::Ctx;
use crate::ensure;
use crate::outcome::Verdict;
use crate::tests::SOON;

pub(super) const TESTS: &[Test] = &[
    Test::new("blk::a_disk_that_is_in_use_is_refused", locks),
    Test::new("blk::wrong_disks_are_one_clear_line", wrong),
    Test::new("blk::threads_have_names_and_filters", threads),
];

fn locks(ctx: &Ctx) -> Verdict {
    let path = image(ctx, "disk", 4)?;
    let start = |more: &str| ctx.guest("sleep-forever").args(disk(&path, more));
    let refused = |more: &str| {
        let done = start(more).run()?;
        done.expect_one_line_error(&["disk0", &path.to_string_lossy(), "is in use", "lock=off"])
    };
    let writer = start("").control().spawn()?;
    writer.wait_for("SLEEPING", SOON)?;
    refused("")?;
    refused("ro")?;
    let risky = start("lock=off").spawn()?;
    risky.wait_for("SLEEPING", SOON)?;
    drop(risky);
    writer.ctl_ok(&["stop"])?;
    writer.finish(SOON)?.expect_code(0)?;
    let readers = [start("ro").spawn()?, start("ro").spawn()?];
    for reader in &readers {
        reader.wait_for("SLEEPING", SOON)?;
    }
    refused("")?;
    // Twice in one VM is twice.
    let twice = ctx
        .guest("poweroff")
        .args(disk(&image(ctx, "other", 1)?, ""))
        .args(disk(&ctx.path("other"), "ro"))
        .run()?;
    twice.expect_one_line_error(&["disk1", "is in use"])
}

fn wrong(ctx: &Ctx) -> Verdict {
    let good = image(ctx, "good", 1)?;
    let empty = image(ctx, "empty", 0)?;
    let folder = ctx.dir().to_string_lossy().into_owned();
    let name = |path: &std::path::Path| path.to_string_lossy().into_owned();
    let pipe = ctx.path("pipe");
    super::host("mkfifo", &[&name(&pipe)])?;
    let of = |what: &str| format!("path={},{what}", name(&good));
    let table: Vec<(String, Vec<&str>)> = vec![
        (
            "path=/nonexistent/disk".into(),
            vec!["disk0", "cannot open disk /nonexistent/disk"],
        ),
        (format!("path={folder}"), vec!["disk0", "is a directory"]),
        (format!("path={folder},ro"), vec!["is a directory"]),
        (
            "path=/dev/null".into(),
            vec!["/dev/null", "a character device"],
        ),
        (format!("path={}", name(&pipe)), vec!["a pipe"]),
        (
            format!("path={}", name(&empty)),
            vec!["has 0 bytes", "truncate"],
        ),
        ("fd=99".into(), vec!["fd:99", "not an open descriptor"]),
        ("ro".into(), vec!["--disk", "name the disk's file"]),
        (of("queues=0"), vec!["disk0", "1 to 64 queues"]),
        (of("threads=2"), vec!["2 threads cannot share 1 queues"]),
        (
            of("engine=aio"),
            vec!["engine=aio", "auto, io_uring or sync"],
        ),
        (of("block-size=1000"), vec!["a block of 1000 bytes"]),
        (of("iops=0"), vec!["a limit of 0"]),
        (of("colour=red"), vec!["`colour`", "not known"]),
        (of("id=a/b"), vec!["a/b", "letters, digits"]),
        (of("id=rng"), vec!["rng", "two devices have this id"]),
    ];
    for (argument, words) in &table {
        let done = ctx.guest("poweroff").args(["--disk", argument]).run()?;
        done.expect_one_line_error(words)?;
    }
    let twice = ctx
        .guest("poweroff")
        .args(disk(&good, "id=one"))
        .args(disk(&image(ctx, "second", 1)?, "id=one"))
        .run()?;
    twice.expect_one_line_error(&["one", "two devices have this id"])?;
    // A file that may only be read.
    let mut launch = ctx.guest("poweroff");
    let reader = launch.pass(&File::open(&good)?)?;
    let done = launch.args(["--disk", &format!("path={reader}")]).run()?;
    done.expect_one_line_error(&["disk0", "not open for writing", "add ro"])
}

/// `top -H` shows who works, and nobody works without a filter.
fn threads(ctx: &Ctx) -> Verdict {
    let one = image(ctx, "one", 1)?;
    let many = image(ctx, "many", 1)?;
    let vm = ctx
        .guest("sleep-forever")
        .args(["--cpus", "2"])
        .args(disk(&one, "id=root"))
        .args(disk(&many, "id=a-long-name,queues=2,threads=2"))
        .spawn()?;
    vm.wait_for("SLEEPING", SOON)?;
    let mut names = Vec::new();
    for task in fs::read_dir(format!("/proc/{}/task", vm.pid()))? {
        let task = task?.path();
        let name = fs::read_to_string(task.join("comm"))?;
        if !name.starts_with("blk-") {
            continue;
        }
        let status = fs::read_to_string(task.join("status"))?;
        ensure!(status.contains("Seccomp:\t2"), "{name} has no filter");
        names.push(name.trim().to_owned());
    }
    names.sort();
    ensure!(
        names == ["blk-a-long-n-0", "blk-a-long-n-1", "blk-root"],
        "threads are called {names:?}"
    );
    Ok(())
}
