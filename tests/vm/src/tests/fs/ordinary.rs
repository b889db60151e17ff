//! A VMM that an ordinary user starts, with every kind of device such a user can have.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;

use super::{PATIENCE, counter, share};
use crate::context::Ctx;
use crate::ensure;
use crate::launch::USER;
use crate::outcome::Verdict;

/// What the folder's owner may do is done, what it may not do is refused as its kernel refuses it.
const SCRIPT: &str = r#"mount -t virtiofs share /mnt
cd /mnt
denied() { "$@" 2>&1 | grep -c "$why" || true; }
fact hello "$(cat from-host)"
echo back > from-guest
chmod 640 from-guest
chown 1000:1000 from-guest
mkdir d
ln -s /etc/shadow d/link
mkfifo d/fifo
ln from-guest d/hard
setfattr -n user.colour -v blue from-guest
head -c 3000000 /dev/urandom > d/big
fact sum "$(md5sum < d/big | cut -d' ' -f1)"
mv d/big d/large
chmod 777 d
setpriv --reuid 1234 --regid 1234 --clear-groups sh -c 'echo theirs > d/by-another'
why='Operation not permitted'
fact chown "$(denied chown 1001 from-guest)"
fact chgrp "$(denied chgrp 1001 from-guest)"
fact device "$(denied mknod device c 1 3)"
fact block "$(denied mknod device b 7 0)"
fact trusted "$(denied setfattr -n trusted.a -v 1 from-guest)"
fact roots "$(denied chmod 777 roots)"
why='Permission denied'
fact read "$(denied cat roots)"
fact write "$(denied sh -c 'echo x >> roots')"
fact inside "$(denied touch closed/new)"
fact listed "$(denied ls closed)"
fact disk "$(head -c 7 /dev/vdb)"
echo -n written | dd of=/dev/vdb seek=1 bs=512 conv=notrunc,fsync 2> /dev/null
fact cid "$(python3 -c 'import fcntl,struct; print(struct.unpack("I", fcntl.ioctl(open("/dev/vsock"), 0x7b9, b"    "))[0])')"
fact carrier "$(ip link set eth0 up; cat /sys/class/net/eth0/carrier)"
cd /
umount /mnt
mount -t virtiofs -o dax share /mnt
python3 -c 'import mmap, os
m = mmap.mmap(os.open("/mnt/from-host", os.O_RDWR), 0)
print("FACT dax=" + m[:5].decode())
m[:5] = b"HELLO"'
echo READY; read -r _
umount /mnt"#;

pub(super) fn user(ctx: &Ctx) -> Verdict {
    let home = ctx.home()?;
    let own = |name: &str| -> Verdict<std::path::PathBuf> {
        let path = home.join(name);
        chown(&path, Some(USER), Some(USER))?;
        Ok(path)
    };
    fs::create_dir(home.join("share"))?;
    let host = own("share")?;
    fs::write(host.join("from-host"), "hello\n")?;
    chown(host.join("from-host"), Some(USER), Some(USER))?;
    // Of another user's, in the middle of it.
    fs::write(host.join("roots"), "secret\n")?;
    fs::set_permissions(host.join("roots"), fs::Permissions::from_mode(0o600))?;
    fs::create_dir(host.join("closed"))?;
    fs::set_permissions(host.join("closed"), fs::Permissions::from_mode(0o700))?;
    let mut disk = b"content".to_vec();
    disk.resize(1 << 20, 0);
    fs::write(home.join("disk.img"), disk)?;
    let disk = own("disk.img")?;
    let (here, _there) = UnixStream::pair()?;
    let mut launch = ctx.script(SCRIPT).as_user()?;
    let net = launch.pass(&OwnedFd::from(here).into())?;
    let socket = home.join("vsock");
    let launch = launch.args(["--fs", &share(&host, ",dax=64M,queues=2")]);
    let launch = launch.args(["--disk", &format!("path={}", disk.display())]);
    let launch = launch.args(["--net", &format!("stream={net}")]);
    let launch = launch.args(["--vsock", &format!("cid=77,socket={}", socket.display())]);
    let launch = launch.args(["--balloon", "size=16M"]);
    let mut vm = launch.spawn()?;
    vm.wait_for("READY", PATIENCE)?;
    let status = fs::read_to_string(format!("/proc/{}/status", vm.pid()))?;
    for line in [
        "Uid:\t1000\t1000\t1000\t1000",
        "Groups:\t \n",
        "CapPrm:\t0000000000000000",
        "CapEff:\t0000000000000000",
    ] {
        ensure!(status.contains(line), "{line:?} is not in {status}");
    }
    ensure!(counter(&vm, "dax_granules")? > 0, "no file was mapped");
    vm.send(b"\n")?;
    let done = vm.finish(PATIENCE)?;
    done.expect_code(0)?;
    let facts = done.facts()?;
    for refused in [
        "chown", "chgrp", "device", "block", "trusted", "roots", "read", "write", "inside",
        "listed",
    ] {
        ensure!(facts.get(refused)? == "1", "{refused}: {facts:?}");
    }
    for (key, value) in [
        ("hello", "hello"),
        ("disk", "content"),
        ("cid", "77"),
        ("carrier", "1"),
        ("dax", "hello"),
    ] {
        ensure!(facts.get(key)? == value, "{key}: {facts:?}");
    }
    for name in [
        "from-guest",
        "d",
        "d/link",
        "d/fifo",
        "d/large",
        "d/by-another",
    ] {
        let made = fs::symlink_metadata(host.join(name))?;
        ensure!(
            (made.uid(), made.gid()) == (USER, USER),
            "{name} is {}:{}'s",
            made.uid(),
            made.gid()
        );
    }
    let made = fs::metadata(host.join("from-guest"))?;
    ensure!(
        (made.mode() & 0o7777, made.nlink()) == (0o640, 2),
        "{made:?}"
    );
    let fifo = fs::metadata(host.join("d/fifo"))?;
    ensure!(fifo.file_type().is_fifo(), "{fifo:?}");
    ensure!(
        fs::read(host.join("from-host"))? == b"HELLO\n",
        "the window"
    );
    ensure!(
        fs::read(host.join("roots"))? == b"secret\n",
        "roots has changed"
    );
    ensure!(fs::read(&disk)?[512..519] == *b"written", "the disk");
    let mut sum = std::process::Command::new("md5sum");
    let sum = sum.arg(host.join("d/large")).output()?;
    let sum = String::from_utf8_lossy(&sum.stdout).into_owned();
    ensure!(sum.starts_with(facts.get("sum")?), "{sum}");
    Ok(())
}
