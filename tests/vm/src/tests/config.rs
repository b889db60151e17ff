//! Flags, the configuration file and descriptors are three ways to say the same.

use std::fs::{self, File};
use std::io::Write;

use serde_json::{Value, json};

use crate::batch::Test;
use crate::context::{Ctx, Kernel};
use crate::ensure;
use crate::outcome::Verdict;

pub(crate) const TESTS: &[Test] = &[
    Test::new("config::a_file_boots", file_boots),
    Test::new("config::file_and_flags_plan_the_same", same_plan),
    Test::new("config::flags_override_the_file", flags_win),
    Test::new("config::the_schema_is_one", schema),
    Test::new("config::kernel_and_initrd_by_descriptor", descriptors),
    Test::new("config::console_by_descriptor", console_descriptor),
    Test::new("config::a_relative_path_is_taken_from_here", relative),
];

fn config(ctx: &Ctx, orders: &str) -> Value {
    json!({
        "boot": {
            "kernel": ctx.kernel(Kernel::OwnBzimage),
            "initrd": ctx.images.initramfs_bare,
            "cmdline": format!("console=ttyS0 quiet panic=-1 testudo.do={orders}"),
        },
        "cpus": { "count": 2 },
        "memory": { "size": "128M" },
    })
}

fn write(ctx: &Ctx, config: &Value) -> Verdict<std::path::PathBuf> {
    let path = ctx.path("vm.json");
    fs::write(&path, config.to_string())?;
    Ok(path)
}

fn file_boots(ctx: &Ctx) -> Verdict {
    let path = write(ctx, &config(ctx, "facts,poweroff"))?;
    let done = ctx.vmm().args(["run", "--config"]).arg(path).run()?;
    done.expect_code(0)?;
    ensure!(
        done.facts()?.number::<u32>("cpus_online")? == 2,
        "not two CPUs"
    );
    Ok(())
}

fn same_plan(ctx: &Ctx) -> Verdict {
    let config = config(ctx, "poweroff");
    let path = write(ctx, &config)?;
    let from_file = ctx
        .vmm()
        .args(["plan", "--json", "--config"])
        .arg(path)
        .run()?;
    from_file.expect_code(0)?;
    let text = |pointer: &str| {
        let value = config.pointer(pointer).and_then(Value::as_str);
        value.unwrap_or_default().to_owned()
    };
    let from_flags = ctx
        .vmm()
        .args(["plan", "--json", "--cpus", "2", "--memory", "128M"])
        .args(["--kernel", &text("/boot/kernel")])
        .args(["--initrd", &text("/boot/initrd")])
        .args(["--cmdline", &text("/boot/cmdline")])
        .run()?;
    from_flags.expect_code(0)?;
    let plan: Value = serde_json::from_str(&from_file.stdout)?;
    ensure!(plan.is_object(), "the plan is no object");
    ensure!(from_file.stdout == from_flags.stdout, "the plans differ");
    Ok(())
}

fn flags_win(ctx: &Ctx) -> Verdict {
    let path = write(ctx, &config(ctx, "facts,poweroff"))?;
    let done = ctx
        .vmm()
        .args(["run", "--cpus", "1", "--config"])
        .arg(path)
        .run()?;
    done.expect_code(0)?;
    ensure!(
        done.facts()?.number::<u32>("cpus_online")? == 1,
        "the file won"
    );
    Ok(())
}

fn schema(ctx: &Ctx) -> Verdict {
    let done = ctx.vmm().arg("schema").run()?;
    done.expect_code(0)?;
    let schema: Value = serde_json::from_str(&done.stdout)?;
    ensure!(schema.get("$schema").is_some(), "no $schema");
    for key in ["boot", "cpus", "memory", "console"] {
        ensure!(
            schema.pointer(&format!("/properties/{key}")).is_some(),
            "the schema has no {key}"
        );
    }
    Ok(())
}

fn descriptors(ctx: &Ctx) -> Verdict {
    for kernel in [Kernel::OwnBzimage, Kernel::OwnVmlinux] {
        let mut launch = ctx.guest("say=by-descriptor,poweroff");
        let image = launch.pass(&File::open(ctx.kernel(kernel))?)?;
        let initrd = launch.pass(&File::open(&ctx.images.initramfs_bare)?)?;
        let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
        let kvm = launch.pass(&kvm)?;
        let done = launch
            .kernel_source(image)
            .initrd_source(initrd)
            .args(["--kvm", &kvm])
            .run()?;
        done.expect_code(0)?;
        done.expect_line("by-descriptor")?;
    }
    Ok(())
}

fn console_descriptor(ctx: &Ctx) -> Verdict {
    let path = ctx.path("console.log");
    let mut log = File::create(&path)?;
    log.write_all(b"before\n")?;
    let mut launch = ctx.guest("say=by-descriptor,poweroff");
    let name = launch.pass(&log)?;
    let done = launch.args(["--console", &name]).run()?;
    done.expect_code(0)?;
    let text = fs::read_to_string(&path)?;
    ensure!(text.starts_with("before\n"), "what was there is gone");
    ensure!(
        text.lines().any(|l| l.trim_end() == "by-descriptor"),
        "the log has {text:?}"
    );
    Ok(())
}

fn relative(ctx: &Ctx) -> Verdict {
    // Through a symbolic link in a folder of its own, as people keep their kernels.
    let link = ctx.path("kernel");
    std::os::unix::fs::symlink(ctx.kernel(Kernel::OwnBzimage), &link)?;
    let done = ctx.guest("poweroff").kernel_source(&link).run()?;
    done.expect_code(0)
}
