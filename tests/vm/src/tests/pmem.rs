//! Files that guests reach as memory.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::batch::Test;
use crate::context::{Ctx, Kernel};
use crate::ensure;
use crate::outcome::{Outcome, Verdict};
use crate::tests::SOON;

/// The file that guests read, in KiB: far more than what the page cache grows by for metadata.
const DATA_KIB: usize = 16 << 10;
const CACHE_LIMIT_KIB: u64 = 1 << 10;

pub(crate) const TESTS: &[Test] = &[
    Test::new("pmem::ext4_by_dax", |c| ext4(c, Kernel::OwnBzimage)),
    Test::new("pmem::ext4_by_dax_stock", |c| ext4(c, Kernel::StockBzimage)),
    Test::new("pmem::erofs_by_dax", |c| erofs(c, Kernel::OwnBzimage)),
    Test::new("pmem::erofs_by_dax_stock", |c| {
        erofs(c, Kernel::StockBzimage)
    }),
    Test::new(
        "pmem::cve_2026_24834_a_read_only_file_stays_as_it_is",
        readonly,
    ),
    Test::new("pmem::the_tail_beyond_the_file_is_memory", tail),
    Test::new("pmem::a_file_that_shrinks_ends_the_vm", shrink),
    Test::new("pmem::two_vms_share_one_file_read_only_or_not_at_all", busy),
];

/// Bytes of which no two pages are alike, and their FNV-1a.
fn data() -> (Vec<u8>, String) {
    let bytes: Vec<u8> = (0..DATA_KIB * 128)
        .flat_map(|n| (n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .collect();
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    (bytes, format!("{hash:016x}"))
}

fn tool(command: &mut Command) -> Verdict {
    let program = command.get_program().display().to_string();
    let done = match command.output() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(Outcome::Skipped(format!("{program} is not installed")));
        }
        done => done?,
    };
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "{program}: {}", said.trim());
    Ok(())
}

/// A folder with one file `data`, and the file's hash.
fn tree(ctx: &Ctx) -> Verdict<(PathBuf, String)> {
    let dir = ctx.path("tree");
    fs::create_dir(&dir)?;
    let (bytes, hash) = data();
    fs::write(dir.join("data"), bytes)?;
    Ok((dir, hash))
}

fn sparse(path: &Path, bytes: u64) -> Verdict<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)?;
    file.set_len(bytes)?;
    Ok(file)
}

fn argument(path: &Path, more: &str) -> String {
    format!("path={}{more}", path.display())
}

fn reads_without_cache(done: &crate::running::Finished, hash: &str) -> Verdict {
    done.expect_code(0)?;
    let facts = done.facts()?;
    let options = facts.get("dax.options")?;
    ensure!(options.contains("dax=always"), "mounted with {options}");
    ensure!(facts.get("file.hash")? == hash, "the file reads otherwise");
    let grown: u64 = facts.number("file.cache_growth_kib")?;
    ensure!(
        grown < CACHE_LIMIT_KIB,
        "reading {DATA_KIB} KiB took {grown} KiB of the guest's page cache"
    );
    Ok(())
}

fn ext4(ctx: &Ctx, kernel: Kernel) -> Verdict {
    let (dir, hash) = tree(ctx)?;
    let image = ctx.path("image");
    drop(sparse(&image, 64 << 20)?);
    // Without a journal and lazy work the guest has little to do before it reads.
    tool(
        Command::new("mkfs.ext4")
            .args(["-q", "-b", "4096", "-O", "^has_journal", "-d"])
            .arg(&dir)
            .arg(&image),
    )?;
    let done = ctx
        .guest("dax=pmem0:ext4,read=data,write=new:64,poweroff")
        .kernel(kernel)
        .args(["--pmem", &argument(&image, "")])
        .spawn()?
        .finish(Duration::from_secs(100))?;
    reads_without_cache(&done, &hash)?;
    let copy = ctx.path("new");
    tool(
        Command::new("debugfs")
            .args(["-R", &format!("dump /new {}", copy.display())])
            .arg(&image),
    )?;
    let written = fs::read(&copy)?;
    ensure!(
        written == [b'w'; 64 << 10],
        "what the guest wrote has {} bytes in the image",
        written.len()
    );
    Ok(())
}

fn erofs(ctx: &Ctx, kernel: Kernel) -> Verdict {
    let (dir, hash) = tree(ctx)?;
    let image = ctx.path("image");
    // Chunks are where DAX can reach them; the tails of whole files are not.
    tool(
        Command::new("mkfs.erofs")
            .args(["--quiet", "--chunksize=4096"])
            .arg(&image)
            .arg(&dir),
    )?;
    let before = fs::read(&image)?;
    let done = ctx
        .guest("dax=pmem0:erofs:ro,read=data,poweroff")
        .kernel(kernel)
        .args(["--pmem", &argument(&image, ",ro")])
        .spawn()?
        .finish(Duration::from_secs(100))?;
    reads_without_cache(&done, &hash)?;
    ensure!(fs::read(&image)? == before, "the image has changed");
    Ok(())
}

/// The guest's driver knows of no read-only device, and writes: nobody takes it, and the VM goes on.
fn readonly(ctx: &Ctx) -> Verdict {
    let image = ctx.path("image");
    let content = vec![7; 4 << 20];
    fs::write(&image, &content)?;
    let vm = ctx
        .guest("poke=pmem0,say=still-here,sleep-forever")
        .args(["--pmem", &argument(&image, ",ro,id=root")])
        .control()
        .spawn()?;
    vm.wait_for("SLEEPING", SOON)?;
    let console = vm.console();
    ensure!(console.contains("still-here"), "{console}");
    ensure!(
        console.contains("FACT poke.changed=false"),
        "the guest sees its write: {console}"
    );
    ensure!(fs::read(&image)? == content, "the host's file has changed");
    let counters: Value = serde_json::from_str(&vm.ctl_ok(&["counters"])?)?;
    let ignored = counters
        .get("vcpu-0")
        .and_then(|v| v.get("ignored_writes"))
        .and_then(Value::as_u64);
    ensure!(ignored > Some(0), "ignored writes: {ignored:?}");
    vm.ctl_ok(&["stop"])?;
    vm.finish(SOON)?.expect_code(0)
}

/// A guest may use all that it is told of; beyond the file's end nothing of it is kept.
fn tail(ctx: &Ctx) -> Verdict {
    let image = ctx.path("image");
    let bytes = (2 << 20) + 100;
    drop(sparse(&image, bytes)?);
    let done = ctx
        .guest("poke=pmem0,poke=pmem0:end,poweroff")
        .args(["--pmem", &argument(&image, "")])
        .spawn()?
        .finish(SOON)?;
    done.expect_code(0)?;
    let facts = done.facts()?;
    ensure!(facts.get("poke.changed")? == "true", "it took no write");
    ensure!(facts.get("poke.end_changed")? == "true", "nor at its end");
    let file = File::open(&image)?;
    ensure!(file.metadata()?.len() == bytes, "the file has grown");
    let mut start = [0; 4];
    file.read_exact_at(&mut start, 0)?;
    ensure!(start == [0xa5; 4], "the file's start is {start:x?}");
    Ok(())
}

/// Memory that the host cannot provide any more: the guest waits for it, or KVM gives up. The VMM
/// does not crash and is still there to be asked.
fn shrink(ctx: &Ctx) -> Verdict {
    let image = ctx.path("image");
    let file = sparse(&image, 4 << 20)?;
    let mut vm = ctx
        .guest("echo,poke=pmem0,poweroff")
        .args(["--pmem", &argument(&image, "")])
        .control()
        .spawn()?;
    vm.wait_for("ECHO ready", SOON)?;
    file.set_len(0)?;
    vm.send(b"quit\n")?;
    vm.wait_for("END echo", SOON)?;
    std::thread::sleep(Duration::from_secs(2));
    let stopped = vm.ctl(&["stop"])?;
    let done = vm.finish(SOON)?;
    let expected = if stopped.status.success() { 0 } else { 1 };
    done.expect_code(expected)?;
    ensure!(
        !done.stdout.contains("poke.changed"),
        "the guest wrote to what is not there"
    );
    Ok(())
}

fn busy(ctx: &Ctx) -> Verdict {
    let image = ctx.path("image");
    drop(sparse(&image, 2 << 20)?);
    let first = ctx
        .guest("sleep-forever")
        .args(["--pmem", &argument(&image, ",ro")])
        .spawn()?;
    first.wait_for("SLEEPING", SOON)?;
    ctx.guest("poweroff")
        .args(["--pmem", &argument(&image, ",ro")])
        .run()?
        .expect_code(0)?;
    ctx.guest("poweroff")
        .args(["--pmem", &argument(&image, "")])
        .run()?
        .expect_one_line_error(&["pmem0", "in use by another process"])
}
