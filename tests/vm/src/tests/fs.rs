//! Shared folders (virtio-fs), seen from the guest and from the host.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::batch::Test;
use crate::context::Ctx;
use crate::ensure;
use crate::launch::Launch;
use crate::outcome::{Outcome, Verdict};
use crate::running::{Finished, Running};

/// Runs in the guest.
const POSIX: &str = include_str!("fs/posix.py");
/// For a guest to get somewhere.
const PATIENCE: Duration = Duration::from_secs(150);
/// A compiler in an emulated guest takes its time.
const LONG: Duration = Duration::from_secs(280);

mod ordinary;
mod shortened;

pub(crate) const TESTS: &[Test] = &[
    Test::new("fs::a_folder_is_shared", shared).seconds(300),
    Test::new("fs::posix", |c| posix(c, "", "auto", "")).seconds(300),
    Test::new("fs::posix_without_a_cache", |c| {
        posix(c, ",cache=none,queues=2", "none", "")
    })
    .seconds(300),
    Test::new("fs::posix_with_writeback", |c| {
        posix(c, ",cache=always,writeback", "always", "")
    })
    .seconds(300),
    Test::new("fs::posix_with_dax", |c| {
        posix(c, ",dax=64M", "auto", "-o dax=always")
    })
    .seconds(300),
    Test::new("fs::acls_are_heeded", acls).seconds(300),
    Test::new("fs::an_ordinary_user_shares_a_folder", ordinary::user).seconds(300),
    Test::new("fs::a_read_only_folder_is_not_changed", readonly).seconds(300),
    Test::new("fs::changes_of_the_host_are_seen_as_the_cache_says", caches).seconds(300),
    Test::new("fs::dax_leaves_the_page_cache_alone", dax).seconds(300),
    Test::new(
        "fs::a_file_shortened_under_dax_ends_nothing",
        shortened::dax,
    )
    .seconds(300),
    Test::new("fs::ten_thousand_files", many).seconds(300),
    Test::new("fs::a_tree_is_walked_and_forgotten", walk).seconds(300),
    Test::new("fs::a_reboot_forgets", reboot).seconds(300),
    Test::new("fs::pause_under_load", pause).seconds(300),
    Test::new("fs::git_and_a_compiler", build).seconds(300),
    Test::new("fs::what_cannot_be_shared_is_one_line", wrong).seconds(300),
];

/// An empty folder of the test's.
fn folder(ctx: &Ctx, name: &str) -> Verdict<PathBuf> {
    let path = ctx.path(name);
    fs::create_dir(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

fn share(folder: &Path, options: &str) -> String {
    format!("tag=share,path={}{options}", folder.display())
}

/// A guest with a folder by the name `share`, which it has on /mnt while the script runs.
fn guest<'a>(ctx: &'a Ctx, folder: &Path, options: &str, script: &str) -> Launch<'a> {
    let script = format!("mount -t virtiofs share /mnt\ncd /mnt\n{script}\ncd /\numount /mnt\n");
    ctx.script(&script).args(["--fs", &share(folder, options)])
}

/// What a counter of the device says.
fn counter(vm: &Running<'_>, name: &str) -> Verdict<u64> {
    let all: Value = serde_json::from_str(&vm.ctl_ok(&["counters"])?)?;
    let value = all.get("fs0").and_then(|device| device.get(name));
    value
        .and_then(Value::as_u64)
        .ok_or_else(|| Outcome::Failed(format!("no counter {name} in {all}")))
}

fn shared(ctx: &Ctx) -> Verdict {
    let host = folder(ctx, "share")?;
    fs::write(host.join("from-host"), "hello\n")?;
    let script = r#"fact hello "$(cat from-host)"
         echo back > from-guest
         chown 1000:1001 from-guest
         chmod 640 from-guest
         mkdir d; ln -s ../../etc/passwd d/link; mkfifo d/fifo
         head -c 3000000 /dev/urandom > d/big
         fact sum "$(md5sum < d/big | cut -d' ' -f1)"
         fact ls "$(ls -a d | xargs)"
         df -k . | tail -1"#;
    let facts = guest(ctx, &host, "", script).run()?.facts()?;
    ensure!(facts.get("hello")? == "hello", "{}", facts.get("hello")?);
    let ls = facts.get("ls")?;
    ensure!(ls == ". .. big fifo link", "{ls}");
    let made = fs::metadata(host.join("from-guest"))?;
    ensure!(
        (made.uid(), made.gid(), made.mode() & 0o7777) == (1000, 1001, 0o640),
        "{made:?}"
    );
    let back = fs::read(host.join("from-guest"))?;
    ensure!(back == b"back\n", "the guest wrote {back:?}");
    let mut sum = std::process::Command::new("md5sum");
    let sum = sum.arg(host.join("d/big")).output()?;
    let sum = String::from_utf8_lossy(&sum.stdout).into_owned();
    ensure!(sum.starts_with(facts.get("sum")?), "{sum}");
    Ok(())
}

/// What POSIX says of files, in the guest. The folder is on a tmpfs: this lab's own root is an
/// overlay, which makes no whiteouts.
fn posix(ctx: &Ctx, options: &str, cache: &str, mount: &str) -> Verdict {
    let host = tempfile::tempdir_in("/dev/shm")?;
    let host = host.path();
    let script = format!(
        "mount -t virtiofs {mount} share /mnt
         cd /mnt
         python3 /run/files/posix.py {cache}
         fact left $(ls | wc -l)
         cd /
         umount /mnt"
    );
    let launch = ctx
        .script(&script)
        .script_file("posix.py", POSIX.as_bytes());
    let launch = launch.args(["--fs", &share(host, options)]);
    let done = launch.spawn()?.finish(LONG)?;
    let facts = done.facts()?;
    let failed: Vec<&str> = done
        .stdout
        .lines()
        .filter(|line| line.starts_with("NOT "))
        .collect();
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    let (cases, failed) = (facts.number::<u32>("cases")?, facts.get("failed")?);
    ensure!(
        cases >= 26 && failed == "0",
        "{cases} cases, {failed} failed"
    );
    ensure!(facts.get("left")? == "0", "cases left something behind");
    Ok(())
}

fn acls(ctx: &Ctx) -> Verdict {
    let host = folder(ctx, "share")?;
    let script = r#"echo secret > f; chmod 600 f
         setfacl -m u:1234:r f
         fact may "$(setpriv --reuid 1234 --clear-groups cat f)"
         fact maynot "$(setpriv --reuid 1235 --clear-groups cat f 2>&1 | grep -c denied)"
         mkdir d; setfacl -d -m u:1234:rwx,g::r d
         umask 077; touch d/inherits
         fact inherited "$(getfacl -c d/inherits | grep -c user:1234:rw)""#;
    let done = guest(ctx, &host, ",acl", script).run()?;
    let facts = done.facts()?;
    for (key, value) in [("may", "secret"), ("maynot", "1"), ("inherited", "1")] {
        ensure!(facts.get(key)? == value, "{key}: {}", facts.get(key)?);
    }
    Ok(())
}

fn readonly(ctx: &Ctx) -> Verdict {
    let host = folder(ctx, "share")?;
    fs::write(host.join("f"), "content")?;
    fs::create_dir(host.join("d"))?;
    let before = fs::metadata(host.join("f"))?;
    let script = r#"fact content "$(cat f)"
        n=0
        refused() { if "$@" 2> /tmp/said; then echo "NOT refused: $*"; return 1; fi
            grep -q 'Read-only file system' /tmp/said || { cat /tmp/said; return 1; }
            n=$((n + 1)); }
        refused bash -c 'echo x > f'
        refused bash -c 'echo x >> f'
        refused bash -c 'echo x > new'
        refused truncate -s 0 f
        refused chmod 600 f
        refused chown 1 f
        refused touch f
        refused touch new
        refused rm f
        refused mv f g
        refused ln f g
        refused ln -s f g
        refused mkdir e
        refused rmdir d
        refused mkfifo p
        refused mknod w c 0 0
        refused setfattr -n user.a -v 1 f
        refused fallocate -l 10M f
        refused python3 -c 'import os; os.open(".", os.O_TMPFILE | os.O_RDWR)'
        fact refused "$n""#;
    let facts = guest(ctx, &host, ",ro", script).run()?.facts()?;
    ensure!(facts.get("content")? == "content", "reading");
    ensure!(facts.get("refused")? == "19", "{}", facts.get("refused")?);
    let after = fs::metadata(host.join("f"))?;
    ensure!(
        (
            after.size(),
            after.mode(),
            after.mtime_nsec(),
            after.ctime_nsec()
        ) == (
            before.size(),
            before.mode(),
            before.mtime_nsec(),
            before.ctime_nsec()
        ),
        "{after:?}"
    );
    ensure!(fs::read_dir(&host)?.count() == 2, "something is new");
    Ok(())
}

fn caches(ctx: &Ctx) -> Verdict {
    let host = folder(ctx, "share")?;
    fs::write(host.join("f"), "old")?;
    let modes = ["none", "auto", "always"];
    let script = r#"for m in none auto always; do mkdir /$m; mount -t virtiofs $m /$m; done
         for m in none auto always; do cat /$m/f > /dev/null; ls /$m > /dev/null; done
         echo READ
         while [ ! -e /none/go ]; do sleep 0.1; done
         fact now-none "$(cat /none/f)"
         sleep 1.2
         for m in none auto always; do fact later-$m "$(cat /$m/f)"; done
         fact new-none "$(ls /none | xargs)"
         fact new-auto "$(ls /auto | xargs)""#;
    let mut launch = ctx.script(script);
    for mode in modes {
        let fs = format!("tag={mode},path={},cache={mode}", host.display());
        launch = launch.args(["--fs", &fs]);
    }
    let vm = launch.spawn()?;
    vm.wait_for("READ", PATIENCE)?;
    fs::write(host.join("f"), "young")?;
    fs::write(host.join("go"), "")?;
    let facts = vm.finish(PATIENCE)?.facts()?;
    for (key, value) in [
        ("now-none", "young"),
        ("later-none", "young"),
        ("later-auto", "young"),
        ("later-always", "old"),
        ("new-none", "f go"),
        ("new-auto", "f go"),
    ] {
        ensure!(facts.get(key)? == value, "{key}: {}", facts.get(key)?);
    }
    Ok(())
}

/// A file of 1 GiB, most of it a hole, read at 16,384 places (64 MiB of pages), in part as a stream, and
/// written to, through the window.
fn dax(ctx: &Ctx) -> Verdict {
    const SIZE: u64 = 1 << 30;
    let host = folder(ctx, "share")?;
    let file = fs::File::create_new(host.join("big"))?;
    file.set_len(SIZE)?;
    for at in [0, 333 << 20, SIZE - 5] {
        file.write_all_at(b"here!", at)?;
    }
    let script = r#"cat > /tmp/dax.py <<'END'
import mmap, os
def cached():
    return next(int(l.split()[1]) for l in open("/proc/meminfo") if l.startswith("Cached:"))
before = cached()
fd = os.open("/mnt/big", os.O_RDWR)
m = mmap.mmap(fd, 0)
found = sum(m[at:at + 5] == b"here!" for at in [0, 333 << 20, len(m) - 5])
total = sum(m[at] for at in range(0, len(m), 64 << 10))
m[5 << 20:(5 << 20) + 7] = b"written"
m.flush()
parts = os.open("/mnt/big", os.O_RDONLY)
read = 0
while read < 48 << 20:
    read += len(os.read(parts, 4 << 20))
print(f"FACT found={found}")
print(f"FACT total={total}")
print(f"FACT read={read}")
print(f"FACT grown={cached() - before}")
END
mount -t virtiofs -o dax share /mnt
python3 /tmp/dax.py
echo MEASURED; read -r go
umount /mnt"#;
    let launch = ctx.script(script).control();
    let launch = launch.args(["--fs", &share(&host, ",dax=256M")]);
    let mut vm = launch.spawn()?;
    vm.wait_for("MEASURED", LONG)?;
    let mapped = counter(&vm, "dax_granules")?;
    vm.send(b"go\n")?;
    let facts = vm.finish(PATIENCE)?.facts()?;
    ensure!(facts.get("found")? == "3", "{}", facts.get("found")?);
    ensure!(
        facts.number::<u64>("read")? == 48 << 20,
        "{}",
        facts.get("read")?
    );
    let grown: i64 = facts.number("grown")?;
    ensure!(grown < 8 << 10, "the page cache has grown by {grown} KiB");
    ensure!((1..=128).contains(&mapped), "{mapped} granules are mapped");
    let mut written = [0; 7];
    file.read_exact_at(&mut written, 5 << 20)?;
    ensure!(&written == b"written", "the guest wrote {written:?}");
    Ok(())
}

fn many(ctx: &Ctx) -> Verdict {
    let host = folder(ctx, "share")?;
    let script = r#"cat > /tmp/many.py <<'END'
import os, time
def each(what, f, files):
    start = time.monotonic()
    for n in files:
        f(f"d{n % 10}/f{n}", n)
    print(f"FACT {what}_us={int((time.monotonic() - start) * 1e6 / len(files))}")
def write(name, n):
    with open(name, "x") as f:
        f.write(str(n))
def read(name, n):
    assert open(name).read() == str(n)
for d in range(10):
    os.mkdir(f"d{d}")
each("create", write, range(10000))
each("stat", lambda name, n: os.stat(name), range(10000))
each("read", read, range(0, 10000, 5))
assert sum(len(os.listdir(f"d{d}")) for d in range(10)) == 10000
each("unlink", lambda name, n: os.unlink(name), range(0, 10000, 2))
END
python3 /tmp/many.py
echo 2 > /proc/sys/vm/drop_caches"#;
    let facts = guest(ctx, &host, "", script)
        .spawn()?
        .finish(LONG)?
        .facts()?;
    for what in ["create", "stat", "read", "unlink"] {
        println!("  {what}: {} us each", facts.get(&format!("{what}_us"))?);
    }
    let mut left = 0;
    for dir in 0..10 {
        left += fs::read_dir(host.join(format!("d{dir}")))?.count();
    }
    ensure!(left == 5000, "{left} files are left");
    Ok(())
}

fn count(path: &Path) -> Verdict<u64> {
    let mut all = 1;
    if fs::symlink_metadata(path)?.is_dir() {
        for entry in fs::read_dir(path)? {
            all += count(&entry?.path())?;
        }
    }
    Ok(all)
}

/// The whole userland, which is some ten thousand files, is known to the guest at once.
fn walk(ctx: &Ctx) -> Verdict {
    let usr = ctx.images.userland_folder.join("usr");
    let expected = count(&usr)?;
    let script = r#"mount -t virtiofs share /mnt
         fact found "$(find /mnt -ls | wc -l)"
         fact sum "$(cd /mnt/bin; md5sum bash python3* git | md5sum | cut -c-32)"
         fact own "$(cd /usr/bin; md5sum bash python3* git | md5sum | cut -c-32)"
         echo WALKED; read -r go
         umount /mnt
         echo UNMOUNTED; read -r go"#;
    let launch = ctx.script(script).control();
    let mut vm = launch.args(["--fs", &share(&usr, ",ro")]).spawn()?;
    vm.wait_for("WALKED", LONG)?;
    let known = counter(&vm, "nodes")?;
    vm.send(b"go\n")?;
    vm.wait_for("UNMOUNTED", PATIENCE)?;
    let left = [counter(&vm, "nodes")?, counter(&vm, "open_files")?];
    vm.send(b"go\n")?;
    let facts = vm.finish(PATIENCE)?.facts()?;
    let found: u64 = facts.number("found")?;
    ensure!(found == expected, "{found} files, {expected} on the host");
    ensure!(facts.get("sum")? == facts.get("own")?, "contents differ");
    ensure!(known > expected / 2, "{known} nodes of {expected}");
    ensure!(left == [0, 0], "{left:?} nodes and files after umount");
    Ok(())
}

/// The guest resets itself while it has files open; the next boot begins with nothing.
fn reboot(ctx: &Ctx) -> Verdict {
    let host = folder(ctx, "share")?;
    let script = "mount -t virtiofs share /mnt
         echo boot >> /mnt/boots
         exec 9> /mnt/open
         if [ $(wc -l < /mnt/boots) = 1 ]; then sync; echo b > /proc/sysrq-trigger; sleep 100; fi
         echo SECOND; read -r go";
    let launch = ctx.script(script).control().args(["--on-reset", "reboot"]);
    let mut vm = launch.args(["--fs", &share(&host, "")]).spawn()?;
    vm.wait_for("SECOND", PATIENCE)?;
    let open = counter(&vm, "open_files")?;
    vm.send(b"go\n")?;
    vm.finish(PATIENCE)?.expect_code(0)?;
    let boots = fs::read_to_string(host.join("boots"))?;
    ensure!(boots == "boot\nboot\n", "{boots:?}");
    ensure!(open == 1, "{open} files are open in the second boot");
    Ok(())
}

/// The VM is stopped again and again while it writes; nothing is lost, and its threads are
/// filtered.
fn pause(ctx: &Ctx) -> Verdict {
    let host = folder(ctx, "share")?;
    let script = r#"echo BEGUN
         for n in $(seq 150); do echo $n > f$n; cat f$n >> all; done
         fact sum "$(md5sum < all | cut -d' ' -f1)"
         fact own "$(seq 150 | md5sum | cut -d' ' -f1)""#;
    let launch = guest(ctx, &host, ",queues=2", script).control();
    let vm = launch.spawn()?;
    vm.wait_for("BEGUN", PATIENCE)?;
    let mut threads = Vec::new();
    for task in fs::read_dir(format!("/proc/{}/task", vm.pid()))? {
        let task = task?.path();
        let name = fs::read_to_string(task.join("comm"))?.trim().to_owned();
        if name.starts_with("fs-") {
            let status = fs::read_to_string(task.join("status"))?;
            ensure!(status.contains("Seccomp:\t2"), "{name} is not filtered");
            threads.push(name);
        }
    }
    threads.sort();
    ensure!(threads == ["fs-share", "fs-share-1"], "{threads:?}");
    for _ in 0..5 {
        vm.ctl_ok(&["pause"])?;
        let before = counter(&vm, "queue1.chains")?;
        std::thread::sleep(Duration::from_millis(100));
        ensure!(
            counter(&vm, "queue1.chains")? == before,
            "served while paused"
        );
        vm.ctl_ok(&["resume"])?;
        std::thread::sleep(Duration::from_millis(50));
    }
    let facts = vm.finish(PATIENCE)?.facts()?;
    ensure!(facts.get("sum")? == facts.get("own")?, "something is lost");
    Ok(())
}

fn build(ctx: &Ctx) -> Verdict {
    let host = folder(ctx, "share")?;
    let script = r#"export HOME=/tmp
        git config --global user.email g@example.org; git config --global user.name g
        git init -q one; cd one
        for n in $(seq 40); do
            echo "int f$n(int x) { return x + $n; }" > f$n.c
            echo "int f$n(int);" >> all.h
        done
        { echo '#include "all.h"'; echo '#include <stdio.h>'
          echo 'int main(void) { int s = 0;'
          for n in $(seq 40); do echo "s = f$n(s);"; done
          echo 'printf("%d\n", s); return 0; }'; } > main.c
        printf 'prog: $(patsubst %%.c,%%.o,$(wildcard *.c))\n\tcc -o $@ $^\n' > Makefile
        git add .; git commit -q -m one
        cd ..
        git clone -q one two; cd two
        make -s -j2 CFLAGS=-O0
        fact says "$(./prog)"
        git fsck --strict 2>&1 | tail -1
        fact status "$(git status --porcelain --untracked-files=no | wc -l)"
        fact commits "$(git log --oneline | wc -l)""#;
    let facts = guest(ctx, &host, ",cache=always,writeback", script)
        .spawn()?
        .finish(LONG)?
        .facts()?;
    for (key, value) in [("says", "820"), ("status", "0"), ("commits", "1")] {
        ensure!(facts.get(key)? == value, "{key}: {}", facts.get(key)?);
    }
    ensure!(host.join("two/prog").is_file(), "no program on the host");
    Ok(())
}

fn wrong(ctx: &Ctx) -> Verdict {
    let host = folder(ctx, "share")?;
    let file = host.join("file");
    fs::write(&file, "")?;
    let refuse = |shares: &[String], words: &[&str]| -> Verdict {
        let mut launch = ctx.guest("poweroff");
        for share in shares {
            launch = launch.args(["--fs", share]);
        }
        let done: Finished = launch.spawn()?.finish(LONG)?;
        done.expect_one_line_error(words)
    };
    let path = host.display();
    let one = |options: &str| vec![format!("path={path}{options}")];
    refuse(&one(""), &["--fs", "tag=NAME"])?;
    refuse(&["tag=a".into()], &["--fs", "path=FOLDER"])?;
    refuse(&one(",tag=a,cache=some"), &["none, auto or always"])?;
    refuse(&one(",tag=a,dax=3M"), &["fs0", "power of two"])?;
    refuse(&one(",tag=a,dax=1M"), &["fs0", "2M"])?;
    refuse(&one(",tag=a,queues=0"), &["fs0", "1 to 64 queues"])?;
    refuse(&one(",tag=a,ro,writeback"), &["fs0", "writeback"])?;
    refuse(&one(",tag=a,size=1"), &["`size`", "not known"])?;
    let long = format!(",tag={}", "t".repeat(37));
    refuse(&one(&long), &["fs0", "1 to 36 bytes"])?;
    refuse(
        &["tag=a,path=/nonexistent/x".into()],
        &["fs0", "cannot open folder /nonexistent/x", "No such file"],
    )?;
    refuse(
        &[format!("tag=a,path={}", file.display())],
        &["fs0", "Not a directory"],
    )?;
    refuse(
        &["tag=a,fd=77".into()],
        &["fs0", "fd:77", "not an open descriptor"],
    )?;
    let twice = [share(&host, ",id=a"), share(&host, ",id=b")];
    refuse(&twice, &["b", "another folder has the tag share"])?;
    let mut launch = ctx.guest("poweroff");
    let named = launch.pass(&fs::File::open(&file)?)?;
    let fd = named.trim_start_matches("fd:").to_owned();
    let launch = launch.args(["--fs", &format!("tag=a,fd={fd}")]);
    launch
        .run()?
        .expect_one_line_error(&["fs0", "not a directory"])
}
