//! Files that the host changes while the guest has them mapped.

use std::fs;
use std::os::unix::fs::FileExt;

use super::{PATIENCE, counter, folder, share};
use crate::context::Ctx;
use crate::ensure;
use crate::outcome::Verdict;

/// Two processes on two CPUs touch what is gone at the same time.
const SCRIPT: &str = r#"cat > /tmp/touch.py <<'END'
import mmap, os, sys
fd = os.open("/mnt/big", os.O_RDWR)
m = mmap.mmap(fd, 8 << 20)
at = range(0, 8 << 20, 1 << 18)
print("FACT before=%d" % sum(m[n] for n in at))
print("SHORTEN")
sys.stdin.readline()
if os.fork() == 0:
    sum(m[n + 4096] for n in at)
    os._exit(0)
print("FACT after=%d" % sum(m[n] for n in at))
m[6 << 20] = 9
print("FACT child=%d" % os.wait()[1])
os.ftruncate(fd, 8 << 20)
m[7 << 20] = 5
m.flush()
print("FACT grown=%d" % (m[6 << 20] + m[7 << 20]))
END
mount -t virtiofs -o dax share /mnt
python3 -u /tmp/touch.py
echo DONE; read -r _
umount /mnt"#;

pub(super) fn dax(ctx: &Ctx) -> Verdict {
    let host = folder(ctx, "share")?;
    fs::write(host.join("big"), vec![1; 8 << 20])?;
    let file = fs::File::options()
        .write(true)
        .read(true)
        .open(host.join("big"))?;
    let launch = ctx.script(SCRIPT).control();
    let launch = launch.args(["--cpus", "2", "--fs", &share(&host, ",dax=64M")]);
    let mut vm = launch.spawn()?;
    vm.wait_for("SHORTEN", PATIENCE)?;
    file.set_len((1 << 20) + 100)?;
    vm.send(b"\n")?;
    vm.wait_for("DONE", PATIENCE)?;
    let mended = counter(&vm, "dax_mended")?;
    vm.send(b"\n")?;
    let done = vm.finish(PATIENCE)?;
    done.expect_code(0)?;
    let facts = done.facts()?;
    // 32 places of a byte each, 5 of them in what is left.
    for (key, value) in [
        ("before", "32"),
        ("after", "5"),
        ("child", "0"),
        ("grown", "5"),
    ] {
        ensure!(facts.get(key)? == value, "{key}: {facts:?}");
    }
    ensure!(mended > 1700, "{mended} pages were mended");
    let said = done.stderr.matches("a file became shorter").count();
    ensure!(said == 1, "it says: {}", done.stderr);
    let mut bytes = [0; 2];
    file.read_exact_at(&mut bytes[..1], 6 << 20)?;
    file.read_exact_at(&mut bytes[1..], 7 << 20)?;
    ensure!(bytes == [0, 5], "the host has {bytes:?}");
    Ok(())
}
