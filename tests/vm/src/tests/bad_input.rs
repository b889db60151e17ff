//! Mistakes of people and scripts: each is one clear line on stderr that names the object and says what
//! to do, and exit code 1. Nothing hangs, nothing is left behind.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use crate::batch::Test;
use crate::context::{Ctx, Kernel};
use crate::outcome::Verdict;
use crate::tests::SOON;
use crate::{Outcome, ensure};

pub(crate) const TESTS: &[Test] = &[
    Test::new("bad_input::kernel_is_missing", |c| {
        run(
            c,
            &["--kernel", "/nonexistent/kernel"],
            &["/nonexistent/kernel"],
        )
    }),
    Test::new("bad_input::kernel_is_a_directory", |c| {
        run(c, &["--kernel", "/tmp"], &["/tmp", "directory"])
    }),
    Test::new("bad_input::kernel_is_not_named", |c| {
        run(c, &["--memory", "128M"], &["--kernel"])
    }),
    Test::new("bad_input::kernel_has_no_known_format", kernel_format),
    Test::new("bad_input::kernel_is_cut_off", kernel_cut),
    Test::new("bad_input::kernel_is_empty", kernel_empty),
    Test::new("bad_input::initrd_is_missing", |c| {
        own(
            c,
            &["--initrd", "/nonexistent/initrd"],
            &["/nonexistent/initrd"],
        )
    }),
    Test::new("bad_input::initrd_is_larger_than_memory", initrd_size),
    Test::new("bad_input::kernel_is_larger_than_memory", kernel_size),
    Test::new("bad_input::command_line_is_too_long", cmdline),
    Test::new("bad_input::unknown_flag", |c| {
        own(c, &["--frobnicate"], &["--frobnicate"])
    }),
    Test::new("bad_input::unknown_verb", |c| {
        plain(c, &["frobnicate"], &["frobnicate"])
    }),
    Test::new("bad_input::no_verb", |c| plain(c, &[], &[])),
    Test::new("bad_input::flag_without_value", |c| {
        own(c, &["--memory"], &["--memory"])
    }),
    Test::new("bad_input::cpus_0", |c| {
        own(c, &["--cpus", "0"], &["0 vCPUs", "254"])
    }),
    Test::new("bad_input::cpus_255", |c| {
        own(c, &["--cpus", "255"], &["255", "254"])
    }),
    Test::new("bad_input::cpus_many", |c| {
        own(c, &["--cpus", "two"], &["two"])
    }),
    Test::new("bad_input::topology_does_not_multiply", |c| {
        own(c, &["--cpus", "4,cores=3"], &["4"])
    }),
    Test::new("bad_input::memory_16m", |c| {
        own(c, &["--memory", "16M"], &["16M", "32M"])
    }),
    Test::new("bad_input::memory_is_no_size", |c| {
        own(c, &["--memory", "lots"], &["lots"])
    }),
    Test::new("bad_input::memory_option_is_unknown", |c| {
        own(c, &["--memory", "1G,huge"], &["huge"])
    }),
    Test::new("bad_input::memory_cannot_be_reserved", memory_reserved),
    Test::new("bad_input::no_1g_hugepages_here", |c| {
        own(c, &["--memory", "1G,hugepages=1G"], &["hugepages"])
    }),
    Test::new("bad_input::console_cannot_be_written", |c| {
        own(
            c,
            &["--console", "file:/nonexistent/dir/log"],
            &["/nonexistent/dir/log"],
        )
    }),
    Test::new("bad_input::console_is_unknown", |c| {
        own(c, &["--console", "tty"], &["tty"])
    }),
    Test::new("bad_input::control_folder_is_missing", |c| {
        own(
            c,
            &["--control", "/nonexistent/dir/ctl"],
            &["/nonexistent/dir/ctl"],
        )
    }),
    Test::new("bad_input::control_is_a_file", control_file),
    Test::new("bad_input::control_is_a_live_socket", control_live),
    Test::new(
        "bad_input::control_is_somebody_elses_socket",
        control_foreign,
    ),
    Test::new("bad_input::descriptor_is_not_open", |c| {
        own(c, &["--initrd", "fd:77"], &["fd:77"])
    }),
    Test::new("bad_input::descriptor_is_named_twice", descriptor_twice),
    Test::new("bad_input::kvm_is_missing", |c| {
        own(c, &["--kvm", "/nonexistent/kvm"], &["/nonexistent/kvm"])
    }),
    Test::new("bad_input::kvm_is_something_else", |c| {
        own(c, &["--kvm", "/dev/null"], &["/dev/null"])
    }),
    Test::new("bad_input::kvm_is_not_permitted", kvm_not_permitted),
    Test::new("bad_input::config_is_missing", |c| {
        run(
            c,
            &["--config", "/nonexistent/vm.json"],
            &["/nonexistent/vm.json"],
        )
    }),
    Test::new("bad_input::config_is_no_json", |c| {
        config(c, "{ boot: }", &["vm.json"])
    }),
    Test::new("bad_input::config_has_an_unknown_key", |c| {
        config(
            c,
            r#"{"boot":{"kernel":"/k","initramfs":"/i"}}"#,
            &["vm.json", "initramfs"],
        )
    }),
    Test::new("bad_input::config_has_a_wrong_type", |c| {
        config(c, r#"{"cpus":{"count":"four"}}"#, &["vm.json"])
    }),
];

/// `testudo-vmm` with these arguments only.
fn plain(ctx: &Ctx, args: &[&str], words: &[&str]) -> Verdict {
    ctx.vmm().args(args).run()?.expect_one_line_error(words)
}

/// `testudo-vmm run` with these arguments only.
fn run(ctx: &Ctx, args: &[&str], words: &[&str]) -> Verdict {
    ctx.vmm()
        .arg("run")
        .args(args)
        .run()?
        .expect_one_line_error(words)
}

/// The same with a kernel that is well.
fn own(ctx: &Ctx, args: &[&str], words: &[&str]) -> Verdict {
    let launch = ctx
        .vmm()
        .args(["run", "--kernel"])
        .arg(ctx.kernel(Kernel::OwnBzimage));
    launch.args(args).run()?.expect_one_line_error(words)
}

/// `--kernel` is a file of the test's folder with these bytes.
fn kernel_file(ctx: &Ctx, bytes: &[u8]) -> Verdict {
    let path = ctx.path("kernel");
    fs::write(&path, bytes)?;
    let path = path.to_string_lossy().into_owned();
    run(ctx, &["--kernel", &path], &[&path])
}

fn kernel_format(ctx: &Ctx) -> Verdict {
    let initramfs = ctx.images.initramfs.to_string_lossy().into_owned();
    run(ctx, &["--kernel", &initramfs], &[&initramfs])?;
    // An ELF file that is no kernel: the VMM itself.
    let vmm = ctx.images.vmm.to_string_lossy().into_owned();
    run(ctx, &["--kernel", &vmm], &[&vmm])
}

fn kernel_cut(ctx: &Ctx) -> Verdict {
    for kernel in [Kernel::OwnBzimage, Kernel::OwnVmlinux] {
        let image = fs::read(ctx.kernel(kernel))?;
        for length in [300, 4096, image.len() / 2] {
            kernel_file(ctx, &image[..length.min(image.len())])?;
        }
    }
    Ok(())
}

fn kernel_empty(ctx: &Ctx) -> Verdict {
    kernel_file(ctx, b"")
}

fn initrd_size(ctx: &Ctx) -> Verdict {
    let path = ctx.path("initrd");
    File::create(&path)?.set_len(64 << 20)?;
    let path = path.to_string_lossy().into_owned();
    own(ctx, &["--memory", "64M", "--initrd", &path], &[&path])
}

/// Debian's kernel needs more than this when it is loaded as it is.
fn kernel_size(ctx: &Ctx) -> Verdict {
    let kernel = ctx
        .kernel(Kernel::StockVmlinux)
        .to_string_lossy()
        .into_owned();
    run(ctx, &["--memory", "32M", "--kernel", &kernel], &[&kernel])
}

/// The kernel would cut it silently: its image says how much it takes (boot protocol, `cmdline_size`).
fn cmdline(ctx: &Ctx) -> Verdict {
    for length in [2048, 5000] {
        let long = "a".repeat(length);
        own(
            ctx,
            &["--cmdline", &long],
            &["command line", &length.to_string()],
        )?;
    }
    Ok(())
}

/// Where the host counts what it promises: labs do not, so that guests may be far larger than they.
fn memory_reserved(ctx: &Ctx) -> Verdict {
    const POLICY: &str = "/proc/sys/vm/overcommit_memory";
    let before = fs::read_to_string(POLICY)?;
    let counts = before.trim() != "1";
    if !counts && std::env::var_os("TESTUDO_LAB").is_none() {
        return Err(Outcome::Skipped(
            "this host promises any amount of memory".into(),
        ));
    }
    if !counts {
        fs::write(POLICY, "0")?;
    }
    let verdict = own(ctx, &["--memory", "512G,reserve"], &["memory"]);
    if !counts {
        fs::write(POLICY, before)?;
    }
    verdict
}

fn control_file(ctx: &Ctx) -> Verdict {
    let path = ctx.path("control");
    fs::write(&path, "precious")?;
    let name = path.to_string_lossy().into_owned();
    own(ctx, &["--control", &name], &[&name, "not a socket"])?;
    ensure!(
        fs::read_to_string(&path)? == "precious",
        "the file was touched"
    );
    Ok(())
}

fn control_live(ctx: &Ctx) -> Verdict {
    let vm = ctx.guest("sleep-forever").control().spawn()?;
    vm.wait_for("SLEEPING", SOON)?;
    let second = ctx.guest("poweroff").control().run()?;
    second.expect_one_line_error(&[&ctx.path("control").to_string_lossy(), "in use"])?;
    // The first has not noticed.
    vm.ctl_ok(&["info"])?;
    vm.ctl_ok(&["stop"])?;
    vm.finish(SOON)?.expect_code(0)
}

/// A stream socket on which somebody else listens is not ours to remove.
fn control_foreign(ctx: &Ctx) -> Verdict {
    let path = ctx.path("control");
    let _listener = UnixListener::bind(&path)?;
    let name = path.to_string_lossy().into_owned();
    own(ctx, &["--control", &name], &[&name])?;
    ensure!(path.exists(), "the socket was removed");
    Ok(())
}

fn descriptor_twice(ctx: &Ctx) -> Verdict {
    let mut launch = ctx.vmm().arg("run");
    let name = launch.pass(&File::open(ctx.kernel(Kernel::OwnBzimage))?)?;
    let done = launch.args(["--kernel", &name, "--initrd", &name]).run()?;
    done.expect_one_line_error(&[&name, "twice"])
}

/// As nobody, with copies of everything where nobody may read them.
fn kvm_not_permitted(ctx: &Ctx) -> Verdict {
    if !rustix::process::geteuid().is_root() {
        return Err(Outcome::Skipped(
            "only root can become somebody else".into(),
        ));
    }
    let mode = fs::metadata("/dev/kvm")?.permissions().mode();
    if mode & 0o006 != 0 {
        return Err(Outcome::Skipped(format!(
            "/dev/kvm is open to everybody ({mode:o})"
        )));
    }
    fs::set_permissions(ctx.dir(), fs::Permissions::from_mode(0o755))?;
    let copy = |from: &std::path::Path, name: &str, mode: u32| -> Verdict<PathBuf> {
        let to = ctx.path(name);
        fs::copy(from, &to)?;
        fs::set_permissions(&to, fs::Permissions::from_mode(mode))?;
        Ok(to)
    };
    let vmm = copy(&ctx.images.vmm, "vmm", 0o755)?;
    let kernel = copy(ctx.kernel(Kernel::OwnBzimage), "kernel", 0o644)?;
    let done = ctx
        .vmm()
        .program(&vmm)
        .args(["run", "--kernel"])
        .arg(&kernel)
        .as_nobody()
        .run()?;
    done.expect_one_line_error(&["/dev/kvm", "kvm"])
}

fn config(ctx: &Ctx, text: &str, words: &[&str]) -> Verdict {
    let path = ctx.path("vm.json");
    File::create(&path)?.write_all(text.as_bytes())?;
    let path = path.to_string_lossy().into_owned();
    run(ctx, &["--config", &path], words)
}
