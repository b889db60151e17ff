//! Devices whose queues another process serves: Debian's virtiofsd and qemu-storage-daemon, and a
//! network back-end of our own.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::batch::Test;
use crate::context::{Ctx, SharedChild, lock};
use crate::ensure;
use crate::launch::Launch;
use crate::net_backend::NetBackend;
use crate::outcome::{Outcome, Verdict};
use crate::running::Running;
use crate::tests::{SOON, mem};

pub(crate) const TESTS: &[Test] = &[
    Test::new("vhost_user::virtiofsd_serves_a_folder", folder),
    Test::new("vhost_user::a_storage_daemon_serves_a_disk", disk),
    Test::new("vhost_user::packets_go_both_ways", packets),
    Test::new(
        "vhost_user::a_guest_that_boots_again_has_its_devices",
        again,
    ),
    Test::new("vhost_user::a_back_end_reaches_memory_that_comes", growing).seconds(240),
    Test::new("vhost_user::wrong_back_ends_are_named", wrong),
];

const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";
const STORAGE_DAEMON: &str = "/usr/bin/qemu-storage-daemon";
const LIMIT: Duration = Duration::from_secs(90);

/// Memory that a back-end can map, and what a script needs of it.
fn shared<'a>(launch: Launch<'a>, device: &str) -> Launch<'a> {
    launch
        .args(["--memory", "512M,shared", "--vhost-user", device])
        .control()
}

/// Starts a back-end and waits for its socket.
fn peer(ctx: &Ctx, command: &mut Command, socket: &Path) -> Verdict<SharedChild> {
    let child = ctx.spawn(command.stdin(Stdio::null()).stdout(Stdio::null()))?;
    let begun = Instant::now();
    while !socket.exists() {
        ensure!(
            lock(&child).try_wait()?.is_none() && begun.elapsed() < SOON,
            "the back-end did not open its socket"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(child)
}

fn kill(child: &SharedChild) -> Verdict {
    let mut child = lock(child);
    child.kill()?;
    child.wait()?;
    Ok(())
}

fn virtiofsd(ctx: &Ctx) -> Verdict<(PathBuf, PathBuf, SharedChild)> {
    let (folder, socket) = (ctx.path("folder"), ctx.path("fs.sock"));
    fs::create_dir_all(&folder)?;
    let _ = fs::remove_file(&socket);
    let mut command = Command::new(VIRTIOFSD);
    command.args(["-f", "-o", "cache=none,log_level=err"]);
    command
        .arg("-o")
        .arg(format!("source={}", folder.display()));
    command.arg(format!("--socket-path={}", socket.display()));
    let child = peer(ctx, &mut command, &socket)?;
    Ok((folder, socket, child))
}

/// Goes on with the script, which waits for a word.
fn go_on(vm: &mut Running<'_>) -> Verdict {
    vm.send(b"go\n")
}

fn counter(vm: &Running<'_>, name: &str) -> Verdict<u64> {
    let counters: serde_json::Value = serde_json::from_str(&vm.ctl_ok(&["counters"])?)
        .map_err(|e| Outcome::Failed(format!("counters: {e}")))?;
    let value = counters["vhost-user0"][name].as_u64();
    value.ok_or_else(|| Outcome::Failed(format!("there is no counter {name}: {counters}")))
}

const FOLDER: &str = r#"
mkdir /mnt/shared
mount -t virtiofs shared /mnt/shared
cd /mnt/shared
fact read "$(cat from-host)"
head -c 4000000 /dev/urandom > from-guest
fact written "$(sha256sum < from-guest | cut -d' ' -f1)"
for n in $(seq 200); do echo $n > file-$n; done
fact files "$(ls | wc -l)"
(while [ ! -e /run/enough ]; do cp from-guest copy; cmp from-guest copy; done; echo copies-are-right) &
sleep 0.2
echo ready
read -r word
touch /run/enough
wait
echo settled
read -r word
echo "first error: $(cat from-host 2>&1 || true)"
echo "second error: $(ls /mnt/shared 2>&1 || true)"
fact survives "$(cat from-host > /dev/null 2>&1 && echo no || echo yes)"
cd /
umount -l /mnt/shared
echo unmounted
read -r word
"#;

fn folder(ctx: &Ctx) -> Verdict {
    let (folder, socket, daemon) = virtiofsd(ctx)?;
    fs::write(folder.join("from-host"), "hello")?;
    let device = format!("fs,socket={},tag=shared", socket.display());
    let mut vm = shared(ctx.script(FOLDER), &device).spawn()?;
    vm.wait_for("ready", LIMIT)?;
    for _ in 0..5 {
        vm.ctl_ok(&["pause"])?;
        std::thread::sleep(Duration::from_millis(50));
        vm.ctl_ok(&["resume"])?;
        std::thread::sleep(Duration::from_millis(100));
    }
    go_on(&mut vm)?;
    vm.wait_for("copies-are-right", LIMIT)?;
    vm.wait_for("settled", LIMIT)?;
    ensure!(counter(&vm, "connected")? == 1, "it is connected");
    let guests = fs::read(folder.join("from-guest"))?;
    ensure!(guests.len() == 4_000_000, "the file has {}", guests.len());
    let hash = sha256(&folder.join("from-guest"))?;
    kill(&daemon)?;
    go_on(&mut vm)?;
    vm.wait_for("unmounted", LIMIT)?;
    ensure!(
        (counter(&vm, "connected")?, counter(&vm, "lost")?) == (0, 1),
        "the loss is counted"
    );
    vm.ctl_ok(&["pause"])?;
    vm.ctl_ok(&["resume"])?;
    go_on(&mut vm)?;
    let done = vm.finish(LIMIT)?;
    done.expect_code(0)?;
    let facts = done.facts()?;
    ensure!(facts.get("read")? == "hello", "{facts:?}");
    ensure!(facts.get("written")? == hash, "{facts:?} is not {hash}");
    ensure!(facts.get("files")? == "202", "{facts:?}");
    ensure!(facts.get("survives")? == "yes", "{facts:?}");
    ensure!(
        done.stdout.contains("Transport endpoint is not connected"),
        "the guest was not told"
    );
    ensure!(
        done.stderr.contains("back-end lost"),
        "the VMM said nothing"
    );
    Ok(())
}

fn sha256(path: &Path) -> Verdict<String> {
    let output = Command::new("sha256sum").arg(path).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.split(' ').next().unwrap_or_default().to_owned())
}

fn storage_daemon(ctx: &Ctx, image: &Path, socket: &Path) -> Verdict<SharedChild> {
    let _ = fs::remove_file(socket);
    let mut command = Command::new(STORAGE_DAEMON);
    command.arg("--blockdev").arg(format!(
        "file,node-name=disk,filename={},discard=unmap",
        image.display()
    ));
    command.arg("--export").arg(format!(
        "vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues=2",
        socket.display()
    ));
    peer(ctx, &mut command, socket)
}

const DISK: &str = r#"
fact size "$(blockdev --getsize64 /dev/vdb)"
fact queues "$(ls /sys/block/vdb/mq | wc -l)"
fact mark "$(dd if=/dev/vdb bs=16 count=1 skip=256 2> /dev/null)"
fio --name=verify --filename=/dev/vdb --offset=8M --size=4M --rw=randwrite --bs=4k --direct=1 \
    --ioengine=libaio --iodepth=16 --verify=crc32c --do_verify=1 --eta=never --output=/run/fio &
sleep 1
echo ready
wait $!
fact fio "$(grep -c 'err= 0' /run/fio)"
echo -n "from the guest.." | dd of=/dev/vdb bs=16 seek=512 conv=fsync,notrunc 2> /dev/null
echo written
read -r word
dd if=/dev/vdb of=/dev/null bs=4k count=1 iflag=direct 2> /run/dd || true
fact lost "$(grep -c 'Input/output error' /run/dd)"
echo failed
read -r word
for n in $(seq 100); do
    dd if=/dev/vdb of=/dev/null bs=4k count=1 iflag=direct 2> /dev/null && break
    sleep 0.2
done
fact again "$(dd if=/dev/vdb bs=16 count=1 skip=512 iflag=fullblock 2> /dev/null)"
"#;

fn disk(ctx: &Ctx) -> Verdict {
    let (image, socket) = (ctx.path("disk.img"), ctx.path("blk.sock"));
    let file = fs::File::create_new(&image)?;
    file.set_len(64 << 20)?;
    file.write_all_at(b"from the host...", 4096)?;
    let daemon = storage_daemon(ctx, &image, &socket)?;
    let device = format!("blk,socket={},queues=2,reconnect", socket.display());
    let mut vm = shared(ctx.script(DISK), &device)
        .arg("--cpus")
        .arg("2")
        .spawn()?;
    vm.wait_for("ready", LIMIT)?;
    for _ in 0..5 {
        vm.ctl_ok(&["pause"])?;
        vm.ctl_ok(&["resume"])?;
        std::thread::sleep(Duration::from_millis(50));
    }
    vm.wait_for("written", LIMIT)?;
    let mut mark = [0; 16];
    fs::File::open(&image)?.read_exact_at(&mut mark, 8192)?;
    ensure!(mark == *b"from the guest..", "the disk has {mark:?}");
    kill(&daemon)?;
    go_on(&mut vm)?;
    vm.wait_for("failed", LIMIT)?;
    ensure!(counter(&vm, "lost")? == 1, "the loss is counted");
    let _daemon = storage_daemon(ctx, &image, &socket)?;
    go_on(&mut vm)?;
    let done = vm.finish(LIMIT)?;
    done.expect_code(0)?;
    let facts = done.facts()?;
    for (key, value) in [
        ("size", "67108864"),
        ("queues", "2"),
        ("mark", "from the host..."),
        ("fio", "1"),
        ("lost", "1"),
        ("again", "from the guest.."),
    ] {
        ensure!(facts.get(key)? == value, "{key}: {facts:?}");
    }
    Ok(())
}

const PACKETS: &str = r#"
fact mac "$(cat /sys/class/net/eth0/address)"
ip address add 192.0.2.2/24 dev eth0
ip link set eth0 up
ping -c 5 -i 0.1 -W 5 192.0.2.1
ping -c 200 -i 0.01 -s 1400 -W 5 -q 192.0.2.1 > /run/ping &
sleep 0.3
echo ready
wait $!
fact pings "$(grep -o '[0-9]* received' /run/ping | cut -d' ' -f1)"
fact carrier "$(cat /sys/class/net/eth0/carrier)"
echo pinged
read -r word
for n in $(seq 50); do [ "$(cat /sys/class/net/eth0/carrier)" = 0 ] && break; sleep 0.1; done
fact after "$(cat /sys/class/net/eth0/carrier)"
fact lost "$(ping -c 1 -W 1 192.0.2.1 > /dev/null 2>&1 && echo no || echo yes)"
"#;

fn packets(ctx: &Ctx) -> Verdict {
    let socket = ctx.path("net.sock");
    let backend = NetBackend::listen(&socket)?;
    let mac = "52:54:00:12:34:56";
    let device = format!("net,socket={},mac={mac}", socket.display());
    let mut vm = shared(ctx.script(PACKETS), &device).spawn()?;
    vm.wait_for("ready", LIMIT)?;
    for _ in 0..5 {
        vm.ctl_ok(&["pause"])?;
        vm.ctl_ok(&["resume"])?;
        std::thread::sleep(Duration::from_millis(100));
    }
    vm.wait_for("pinged", LIMIT)?;
    let seen = backend.end()?;
    go_on(&mut vm)?;
    let done = vm.finish(LIMIT)?;
    done.expect_code(0)?;
    let facts = done.facts()?;
    for (key, value) in [
        ("mac", mac),
        ("pings", "200"),
        ("carrier", "1"),
        ("after", "0"),
        ("lost", "yes"),
    ] {
        ensure!(facts.get(key)? == value, "{key}: {facts:?}");
    }
    ensure!(seen >= 205, "the back-end saw {seen} echo requests");
    Ok(())
}

fn again(ctx: &Ctx) -> Verdict {
    let (folder, socket, _daemon) = virtiofsd(ctx)?;
    fs::write(folder.join("from-host"), "hello")?;
    let script = r#"
mount -t virtiofs shared /mnt
n=$(cat /mnt/boots 2> /dev/null || echo 0)
echo $((n + 1)) > /mnt/boots
sync
fact boots "$(cat /mnt/boots)"
[ "$n" = 1 ] || { echo b > /proc/sysrq-trigger; sleep 60; }
"#;
    let device = format!("fs,socket={},tag=shared", socket.display());
    let done = shared(ctx.script(script), &device)
        .args(["--on-reset", "reboot"])
        .spawn()?
        .finish(LIMIT)?;
    done.expect_code(0)?;
    ensure!(done.facts()?.get("boots")? == "2", "{}", done.stdout);
    Ok(())
}

const GROWING: &str = r#"
mkdir /mnt/shared
mount -t virtiofs shared /mnt/shared
cd /mnt/shared
head -c 24000000 /dev/urandom > from-guest
fact written "$(sha256sum < from-guest | cut -d' ' -f1)"
(while [ ! -e /run/enough ]; do cp from-guest copy; cmp from-guest copy; echo COPY; done; echo RIGHT) &
sleep 0.2
echo ready
read -r word
touch /run/enough
wait
cd /
umount /mnt/shared
"#;

/// Memory comes and goes while virtiofsd reads and writes it; the guest's page cache is where it comes.
fn growing(ctx: &Ctx) -> Verdict {
    let (folder, socket, _daemon) = virtiofsd(ctx)?;
    let device = format!("fs,socket={},tag=shared", socket.display());
    let launch = ctx.script(GROWING).cmdline(mem::MOVABLE).control();
    let launch = launch.args(["--memory", "512M,max=1536M,shared"]);
    let mut vm = launch.args(["--vhost-user", &device]).spawn()?;
    vm.wait_for("ready", LIMIT)?;
    for (round, size) in (1..).zip([640, 1536, 1024, 512, 1536]) {
        mem::resize(&vm, size)?;
        vm.wait_for_times("COPY", round, LIMIT)?;
    }
    ensure!(counter(&vm, "connected")? == 1, "it is connected");
    go_on(&mut vm)?;
    vm.wait_for("RIGHT", LIMIT)?;
    let done = vm.finish(LIMIT)?;
    done.expect_code(0)?;
    let facts = done.facts()?;
    for name in ["from-guest", "copy"] {
        let hash = sha256(&folder.join(name))?;
        ensure!(facts.get("written")? == hash, "{name} is {hash}: {facts:?}");
    }
    Ok(())
}

fn wrong(ctx: &Ctx) -> Verdict {
    let socket = ctx.path("none.sock");
    let device = format!("blk,socket={}", socket.display());
    let nobody = ctx
        .guest("poweroff")
        .args(["--memory", "256M,shared", "--vhost-user", &device]);
    let path = socket.display().to_string();
    nobody.run()?.expect_one_line_error(&[
        "vhost-user0",
        "no vhost-user back-end answers at",
        &path,
    ])?;
    let private = ctx.guest("poweroff").args(["--vhost-user", &device]);
    private
        .run()?
        .expect_one_line_error(&["vhost-user0", "add `shared` to the memory"])?;
    // A back-end of another kind: virtiofsd keeps no disk's configuration.
    let (_folder, socket, _daemon) = virtiofsd(ctx)?;
    let device = format!("blk,socket={},id=root", socket.display());
    let other = ctx
        .guest("poweroff")
        .args(["--memory", "256M,shared", "--vhost-user", &device]);
    other
        .run()?
        .expect_one_line_error(&["root", "keeps no configuration space"])
}
