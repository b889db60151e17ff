//! The harness itself, with a shell in the place of the VMM.

use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;

use crate::batch::Test;
use crate::context::Ctx;
use crate::launch::Launch;
use crate::outcome::Verdict;
use crate::tests::SOON;
use crate::{Outcome, ensure};

pub(crate) const TESTS: &[Test] = &[
    Test::new("harness::output_and_exit_code_are_seen", output),
    Test::new("harness::facts_are_found_in_the_output", facts),
    Test::new("harness::input_reaches_the_child", input),
    Test::new("harness::a_signal_ends_the_child_and_is_seen", signal),
    Test::new("harness::a_child_that_does_not_end_fails", endless),
    Test::new("harness::an_error_is_one_line", one_line),
    Test::new("harness::descriptors_are_inherited", descriptors),
    Test::new("harness::nobody_is_nobody", nobody),
    Test::new("harness::a_script_comes_with_what_it_needs", script),
    Test::new("harness::a_late_reader_gets_all_of_it", late_reader),
];

fn shell<'a>(ctx: &'a Ctx, script: &str) -> Launch<'a> {
    ctx.vmm().program(Path::new("/bin/sh")).args(["-c", script])
}

fn output(ctx: &Ctx) -> Verdict {
    let done = shell(ctx, "printf 'one\\r\\ntwo\\n'; echo wrong >&2; exit 3").run()?;
    done.expect_code(3)?;
    done.expect_line("one")?;
    ensure!(
        done.expect_line("thr").is_err(),
        "a line that is not there was found"
    );
    ensure!(done.expect_code(0).is_err(), "another exit code was taken");
    ensure!(done.stderr == "wrong\n", "stderr is {:?}", done.stderr);
    Ok(())
}

fn facts(ctx: &Ctx) -> Verdict {
    let done = shell(ctx, "echo FACT a=1; echo FACT b=x=y").run()?;
    let facts = done.facts()?;
    ensure!(facts.number::<u8>("a")? == 1, "a");
    ensure!(facts.get("b")? == "x=y", "b");
    let failed = shell(ctx, "echo FAILED rng: no device").run()?;
    ensure!(failed.facts().is_err(), "a verb that failed went unseen");
    Ok(())
}

fn input(ctx: &Ctx) -> Verdict {
    let mut cat = shell(ctx, "echo ready; exec cat").spawn()?;
    cat.wait_for("ready", SOON)?;
    cat.send(b"hello\n")?;
    cat.wait_for("hello", SOON)?;
    cat.close_stdin();
    cat.finish(SOON)?.expect_code(0)
}

fn signal(ctx: &Ctx) -> Verdict {
    let child = shell(ctx, "echo up; exec sleep 1000").spawn()?;
    child.wait_for("up", SOON)?;
    ensure!(child.pss()?.kib > 0, "no memory");
    child.signal(Signal::TERM)?;
    let done = child.finish(SOON)?;
    ensure!(done.signal() == Some(15), "ended with {}", done.status);
    Ok(())
}

fn endless(ctx: &Ctx) -> Verdict {
    let child = shell(ctx, "exec sleep 1000").spawn()?;
    match child.finish(Duration::from_millis(100)) {
        Err(Outcome::Failed(why)) if why.contains("did not end") => Ok(()),
        other => Err(Outcome::Failed(format!("came back with {other:?}"))),
    }
}

fn one_line(ctx: &Ctx) -> Verdict {
    shell(ctx, "echo cannot open x: try y >&2; exit 1")
        .run()?
        .expect_one_line_error(&["open x", "try"])?;
    for bad in [
        "echo a >&2; echo b >&2; exit 1",
        "echo a >&2; exit 2",
        "echo a; exit 1",
        "exit 1",
    ] {
        let done = shell(ctx, bad).run()?;
        ensure!(done.expect_one_line_error(&[]).is_err(), "{bad} was taken");
    }
    Ok(())
}

fn descriptors(ctx: &Ctx) -> Verdict {
    let path = ctx.path("file");
    std::fs::write(&path, "inside\n")?;
    let mut launch = ctx.vmm().program(Path::new("/bin/sh"));
    let name = launch.pass(&std::fs::File::open(&path)?)?;
    let script = format!("cat <&{}", name.trim_start_matches("fd:"));
    let done = launch.args(["-c", &script]).run()?;
    done.expect_line("inside")
}

fn nobody(ctx: &Ctx) -> Verdict {
    if !rustix::process::geteuid().is_root() {
        return Err(Outcome::Skipped(
            "only root can become somebody else".into(),
        ));
    }
    shell(ctx, "id -u; id -g")
        .as_nobody()
        .run()?
        .expect_line("65534")
}

fn script(ctx: &Ctx) -> Verdict {
    let base = ctx.path("initramfs");
    std::fs::write(&base, "BASE")?;
    let launch = ctx.script("echo hello").program(Path::new("/bin/echo"));
    let launch = launch.initrd_source(&base).args(["--disk", "path=own"]);
    let launch = launch.script_file("data", b"of the test");
    let said = launch.run()?.stdout;
    ensure!(
        said.starts_with("run --disk path=,ro --memory 512M --disk path=own --kernel"),
        "started with {said}"
    );
    ensure!(said.contains("testudo.do=script"), "started with {said}");
    let made = said
        .split_whitespace()
        .skip_while(|w| *w != "--initrd")
        .nth(1)
        .ok_or_else(|| Outcome::Failed(format!("no initramfs in {said}")))?;
    let made = std::fs::read(made)?;
    ensure!(made.starts_with(b"BASE070701"), "not one behind the other");
    let text = String::from_utf8_lossy(&made).into_owned();
    ensure!(text.contains("echo hello"), "the script is not in it");
    ensure!(text.contains("of the test"), "its file is not in it");
    Ok(())
}

fn late_reader(ctx: &Ctx) -> Verdict {
    let late = shell(ctx, "seq 100000")
        .read_after(Duration::from_millis(300))
        .run()?;
    late.expect_line("1")?;
    late.expect_line("100000")
}
