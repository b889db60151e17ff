//! `testudo run` and its commands: containers in VMs, as a person starts them.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::batch::Test;
use crate::context::Ctx;
use crate::ensure;
use crate::outcome::{Outcome, Verdict};

/// Everything.
pub(crate) const TESTS: &[Test] = &[
    Test::new("run::prints_and_passes_the_exit_code_on", prints),
    Test::new("run::the_process_is_what_docker_users_expect", process),
    Test::new("run::flags_reach_the_process", flags),
    Test::new("run::input_is_passed_on_bit_by_bit", input),
    Test::new("run::volumes_and_tmpfs", volumes),
    Test::new("run::an_erofs_file_is_an_image", erofs),
    Test::new("run::detached_with_exec_logs_stop", detached).seconds(240),
    Test::new("run::time_is_over", timeout),
    Test::new("run::a_killed_vmm_is_told", killed_vmm),
    Test::new("run::a_killed_supervisor_leaves_nothing", killed_supervisor),
    Test::new("run::a_killed_command_leaves_nothing", killed_command),
    Test::new("run::what_is_wrong_is_one_line", wrong),
    Test::new("run::check_tries_a_guest", check),
];

/// One test's `testudo`: state, sockets and images of its own.
struct Cli<'a> {
    ctx: &'a Ctx,
}

impl<'a> Cli<'a> {
    fn new(ctx: &'a Ctx) -> Self {
        Self { ctx }
    }

    fn command(&self, args: &[&str]) -> Command {
        let images = &self.ctx.images;
        let mut command = Command::new(&images.testudo);
        command.args(args);
        command.env("TESTUDO_VMM_PROGRAM", &images.vmm);
        command.env("TESTUDO_GUEST_KERNEL", &images.own.vmlinux);
        command.env("TESTUDO_GUEST_INITRAMFS", &images.initramfs_agent);
        command.env("TESTUDO_STATE_DIRECTORY", self.ctx.path("state"));
        command.env("TESTUDO_STATE_RUNTIME", self.ctx.path("r"));
        command.env("TESTUDO_IMAGE_STORE", self.ctx.path("images"));
        command.env("TESTUDO_NETWORK_DEFAULT", "none");
        // Ends with the test, whatever becomes of the pod.
        command.process_group(0);
        command
    }

    fn call(&self, args: &[&str]) -> Verdict<Output> {
        Ok(self.command(args).stdin(Stdio::null()).output()?)
    }

    /// Standard output of a command that has to succeed.
    fn ok(&self, args: &[&str]) -> Verdict<String> {
        let output = self.call(args)?;
        ensure!(
            output.status.success(),
            "testudo {args:?} ended with {}: {}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr),
            self.logs()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// `testudo run --rm FLAGS USERLAND sh -c SCRIPT`.
    fn sh(&self, flags: &[&str], script: &str) -> Verdict<Output> {
        let root = self.root();
        let mut args = vec!["run", "--rm"];
        args.extend(flags);
        args.extend([root.as_str(), "sh", "-c", script]);
        self.call(&args)
    }

    fn root(&self) -> String {
        self.ctx
            .images
            .userland_folder
            .to_string_lossy()
            .into_owned()
    }

    fn start(&self, args: &[&str]) -> Verdict<Child> {
        let mut command = self.command(args);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Ok(command.spawn()?)
    }

    fn ps(&self) -> Verdict<Vec<Value>> {
        Ok(serde_json::from_str(
            &self.ok(&["ps", "-a", "--format", "json"])?,
        )?)
    }

    /// What is known of the only pod.
    fn inspect(&self) -> Verdict<Value> {
        let ps = self.ps()?;
        let id = ps.first().and_then(|row| row["id"].as_str());
        let id = id.ok_or_else(|| Outcome::Failed("there is no pod".into()))?;
        let all: Value = serde_json::from_str(&self.ok(&["inspect", id])?)?;
        Ok(all[0].clone())
    }

    /// Waits until the only pod runs.
    fn running(&self) -> Verdict<Value> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let ps = self.ps()?;
            if ps.first().is_some_and(|row| row["phase"] == "running") {
                return self.inspect();
            }
            ensure!(
                Instant::now() < deadline,
                "no pod runs: {ps:?}{}",
                self.logs()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What pods have left, for the report of a failure.
    fn logs(&self) -> String {
        let Ok(pods) = std::fs::read_dir(self.ctx.path("state/pods")) else {
            return String::new();
        };
        let mut all = String::new();
        for pod in pods.flatten() {
            for name in ["supervisor.log", "vmm.log", "console.log", "net.log"] {
                let text = std::fs::read(pod.path().join(name)).unwrap_or_default();
                if !text.is_empty() {
                    all.push_str(&format!("\n--- {name}\n{}", String::from_utf8_lossy(&text)));
                }
            }
        }
        all
    }

    /// Fails if anything of a pod is left but what is known of it.
    fn nothing_is_left(&self) -> Verdict {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let ours = self.ctx.dir().to_string_lossy().into_owned();
            let left = processes(&ours)?;
            let sockets = std::fs::read_dir(self.ctx.path("r")).map_or(0, Iterator::count);
            if left.is_empty() && sockets == 0 {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "{left:?} and {sockets} folders of sockets are left"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Command lines that have this in them.
fn processes(word: &str) -> Verdict<Vec<String>> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(word) && line.contains("testudo") {
            all.push(line);
        }
    }
    Ok(all)
}

fn kill(pid: &Value) -> Verdict {
    let pid = pid
        .as_i64()
        .and_then(|pid| i32::try_from(pid).ok())
        .and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| Outcome::Failed("no process".into()))?;
    Ok(kill_process(pid, Signal::KILL)?)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn expect(output: &Output, code: i32, out: &str, err: &str) -> Verdict {
    ensure!(
        output.status.code() == Some(code)
            && text(&output.stdout) == out
            && text(&output.stderr) == err,
        "{} instead of {code}; stdout {:?}, stderr {:?}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    Ok(())
}

fn prints(ctx: &Ctx) -> Verdict {
    let cli = Cli::new(ctx);
    let output = cli.sh(&[], "echo out; echo err >&2; exit 7")?;
    expect(&output, 7, "out\n", "err\n")?;
    let output = cli.sh(&[], "exit 200")?;
    expect(&output, 200, "", "")?;
    ensure!(cli.ps()?.is_empty(), "--rm keeps something");
    cli.nothing_is_left()
}

fn process(ctx: &Ctx) -> Verdict {
    let cli = Cli::new(ctx);
    let script = "echo pid $$; id -u; pwd; hostname; grep -E '^(CapEff|CapBnd|Seccomp|NoNewPrivs):' /proc/self/status; \
                  ls /proc/self/fd | wc -l; echo w > /written && cat /written; mount | grep -c ' / '; \
                  cat /proc/kcore 2>/dev/null | wc -c; echo x > /proc/sys/kernel/hostname; \
                  unshare -m true; cat /sys/fs/cgroup/cgroup.controllers | wc -w";
    let output = cli.sh(&["--hostname", "box"], script)?;
    let out = text(&output.stdout);
    let lines: Vec<&str> = out.lines().collect();
    let wanted = ["pid 1", "0", "/", "box", "CapBnd:\t00000000a80425fb"];
    for line in wanted {
        ensure!(
            lines.contains(&line),
            "no line {line:?} in {out}{}",
            text(&output.stderr)
        );
    }
    for line in [
        "CapEff:\t00000000a80425fb",
        "NoNewPrivs:\t0",
        "Seccomp:\t2",
        "w",
    ] {
        ensure!(lines.contains(&line), "no line {line:?} in {out}");
    }
    let err = text(&output.stderr);
    ensure!(
        err.contains("unshare failed: Operation not permitted"),
        "unshare: {err}"
    );
    ensure!(
        err.contains("Read-only file system"),
        "/proc/sys can be written: {err}"
    );
    Ok(())
}

fn flags(ctx: &Ctx) -> Verdict {
    let cli = Cli::new(ctx);
    std::fs::write(ctx.path("env"), "# comment\nFILE=from file\nBOTH=file\n")?;
    let file = ctx.path("env");
    let file = file.to_string_lossy();
    let flags = [
        "-e",
        "A=1 2",
        "--env-file",
        &file,
        "-e",
        "BOTH=flag",
        "-w",
        "/made/new",
        "-u",
        "1000:100",
        "--read-only",
        "--cap-drop",
        "ALL",
        "--cap-add",
        "NET_ADMIN",
        "--security-opt",
        "no-new-privileges",
        "--security-opt",
        "seccomp=unconfined",
        "--ulimit",
        "nofile=100:200",
        "--sysctl",
        "net.ipv4.ip_forward=1",
        "--cpus",
        "1.5",
        "--memory",
        "100m",
        "--pids-limit",
        "50",
    ];
    let script = "echo $A,$FILE,$BOTH; pwd; id -u; id -g; ulimit -n; ulimit -Hn; nproc; \
                  cat /proc/sys/net/ipv4/ip_forward /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max; \
                  grep -E '^(CapBnd|CapEff|NoNewPrivs|Seccomp):' /proc/self/status; touch /x";
    // The folder is made in the root before that becomes read-only; `-w` of one that is not there would fail.
    let flags: Vec<&str> = flags
        .iter()
        .map(|flag| if *flag == "/made/new" { "/tmp" } else { flag })
        .collect();
    let output = cli.sh(&flags, script)?;
    let out = text(&output.stdout);
    let wanted = "1 2,from file,flag\n/tmp\n1000\n100\n100\n200\n2\n1\n104857600\n150000 100000\n50\n\
                  CapEff:\t0000000000000000\nCapBnd:\t0000000000001000\nNoNewPrivs:\t1\nSeccomp:\t0\n";
    ensure!(
        out == wanted,
        "{out:?} instead of {wanted:?}; {}",
        text(&output.stderr)
    );
    ensure!(
        text(&output.stderr).contains("Read-only file system"),
        "the root can be written"
    );
    Ok(())
}

fn input(ctx: &Ctx) -> Verdict {
    let cli = Cli::new(ctx);
    let root = cli.root();
    let bytes: Vec<u8> = (0..3_000_000_u32)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    let mut command = cli.command(&["run", "--rm", "-i", &root, "cat"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdin = child
        .stdin
        .take()
        .ok_or_else(|| Outcome::Failed("no input".into()))?;
    let sent = bytes.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&sent));
    let output = child.wait_with_output()?;
    writer
        .join()
        .map_err(|_| Outcome::Failed("the writer panicked".into()))??;
    ensure!(
        output.status.success(),
        "{}: {}",
        output.status,
        text(&output.stderr)
    );
    ensure!(
        output.stdout == bytes,
        "{} bytes came back instead of {}",
        output.stdout.len(),
        bytes.len()
    );
    // Without -i there is no input.
    expect(&cli.call(&["run", "--rm", &root, "cat"])?, 0, "", "")
}

fn volumes(ctx: &Ctx) -> Verdict {
    let cli = Cli::new(ctx);
    for folder in ["rw", "ro"] {
        std::fs::create_dir(ctx.path(folder))?;
        std::fs::write(ctx.path(folder).join("host"), folder)?;
    }
    std::fs::write(ctx.path("single"), "single\n")?;
    let volume = |name: &str, rest: &str| format!("{}:{rest}", ctx.path(name).display());
    let (rw, ro, single) = (
        volume("rw", "/rw"),
        volume("ro", "/ro:ro"),
        volume("single", "/etc/single:ro"),
    );
    let flags = [
        "-v",
        &rw,
        "-v",
        &ro,
        "-v",
        &single,
        "-v",
        "cache:/cache",
        "--tmpfs",
        "/t:size=1m",
    ];
    let script = "cat /rw/host /ro/host /etc/single; echo guest > /rw/guest; echo kept > /cache/file; \
                  (echo x > /ro/x) 2>&1 | grep -o 'Read-only file system'; \
                  (head -c 3000000 /dev/zero > /t/big) 2>&1 | grep -o 'No space left'; grep ' /t ' /proc/mounts";
    let output = cli.sh(&flags, script)?;
    let out = text(&output.stdout);
    let wanted = "rwrosingle\nRead-only file system\nNo space left\n";
    ensure!(out.starts_with(wanted), "{out:?}; {}", text(&output.stderr));
    ensure!(
        out.contains("size=1024k") && out.contains("noexec"),
        "{out}"
    );
    ensure!(
        std::fs::read_to_string(ctx.path("rw/guest"))? == "guest\n",
        "nothing came out"
    );
    let output = cli.sh(&["-v", "cache:/c"], "cat /c/file")?;
    expect(&output, 0, "kept\n", "")
}

fn erofs(ctx: &Ctx) -> Verdict {
    let cli = Cli::new(ctx);
    let image = ctx.images.userland.to_string_lossy();
    let output = cli.call(&[
        "run",
        "--rm",
        "-u",
        "nobody",
        &image,
        "sh",
        "-c",
        "id -un; stat -f -c %T /",
    ])?;
    expect(&output, 0, "nobody\noverlayfs\n", "")
}

fn detached(ctx: &Ctx) -> Verdict {
    let cli = Cli::new(ctx);
    let root = cli.root();
    let script = "trap 'echo ended; exit 3' TERM; echo begun; while :; do sleep 0.1; done";
    let id = cli.ok(&[
        "run", "-d", "--name", "web", "-e", "X=first", &root, "sh", "-c", script,
    ])?;
    let again = cli.call(&["run", "-d", "--name", "web", &root, "true"])?;
    ensure!(again.status.code() == Some(125), "a name was given twice");
    let pod = cli.running()?;
    ensure!(pod["pod"]["id"] == id.trim(), "{pod}");
    let output = cli.call(&[
        "exec",
        "-e",
        "Y=second",
        "-w",
        "/tmp",
        "web",
        "sh",
        "-c",
        "echo $X $Y; pwd; exit 5",
    ])?;
    expect(&output, 5, "first second\n/tmp\n", "")?;
    let output = cli.call(&["exec", "web", "no-such-program"])?;
    ensure!(
        output.status.code() == Some(127),
        "{}: {}",
        output.status,
        text(&output.stderr)
    );
    std::fs::write(ctx.path("file"), "copied")?;
    let file = ctx.path("file");
    cli.ok(&["cp", &file.to_string_lossy(), "web:/copy"])?;
    ensure!(
        cli.ok(&["exec", "web", "cat", "/copy"])? == "copied",
        "cp into the pod"
    );
    let back = ctx.path("back");
    cli.ok(&["cp", "web:/etc/hostname", &back.to_string_lossy()])?;
    ensure!(
        std::fs::read_to_string(&back)?.trim() == id.trim(),
        "cp out of the pod"
    );
    let stats: Value = serde_json::from_str(&cli.ok(&["stats", "--format", "json"])?)?;
    ensure!(
        stats[0]["cgroup"]["memory.current"].as_u64() > Some(0),
        "{stats}"
    );
    cli.ok(&["pause", "web"])?;
    ensure!(cli.ps()?[0]["phase"] == "paused", "it is not paused");
    cli.ok(&["resume", "web"])?;
    ensure!(cli.ok(&["console", "web"]).is_ok(), "no console");
    cli.ok(&["stop", "web"])?;
    ensure!(
        cli.ok(&["logs", "web"])? == "begun\nended\n",
        "logs: {}",
        cli.ok(&["logs", "web"])?
    );
    ensure!(cli.ok(&["wait", "web"])? == "3\n", "wait");
    ensure!(cli.ps()?[0]["status"] == "exited (3)", "{:?}", cli.ps()?);
    let events = cli.ok(&["events"])?;
    for what in ["create", "start", "exec", "kill", "exit"] {
        ensure!(events.contains(what), "no event {what} in {events}");
    }
    cli.nothing_is_left()?;
    cli.ok(&["rm", "web"])?;
    ensure!(cli.ps()?.is_empty(), "rm leaves something");
    Ok(())
}

fn timeout(ctx: &Ctx) -> Verdict {
    let cli = Cli::new(ctx);
    let output = cli.sh(&["--timeout", "1"], "exec sleep 1000")?;
    ensure!(
        output.status.code() == Some(124),
        "{}: {}",
        output.status,
        text(&output.stderr)
    );
    ensure!(
        text(&output.stderr).contains("its 1 s were over"),
        "{}",
        text(&output.stderr)
    );
    cli.nothing_is_left()
}

fn killed_vmm(ctx: &Ctx) -> Verdict {
    let cli = Cli::new(ctx);
    let root = cli.root();
    let child = cli.start(&["run", &root, "sleep", "1000"])?;
    let pod = cli.running()?;
    kill(&pod["state"]["vmm"])?;
    let output = child.wait_with_output()?;
    let err = text(&output.stderr);
    ensure!(
        output.status.code() == Some(125) && err.contains("vmm was killed by signal 9"),
        "{}: {err}",
        output.status
    );
    let status = cli.ps()?[0]["status"].clone();
    ensure!(status == "exited (vmm was killed by signal 9)", "{status}");
    cli.nothing_is_left()
}

fn killed_supervisor(ctx: &Ctx) -> Verdict {
    let cli = Cli::new(ctx);
    let root = cli.root();
    let child = cli.start(&["run", &root, "sleep", "1000"])?;
    let pod = cli.running()?;
    kill(&pod["state"]["supervisor"])?;
    let output = child.wait_with_output()?;
    let err = text(&output.stderr);
    ensure!(
        output.status.code() == Some(125) && err.contains("its supervisor was killed"),
        "{}: {err}",
        output.status
    );
    let status = cli.ps()?[0]["status"].clone();
    ensure!(status == "exited (supervisor was killed)", "{status}");
    cli.nothing_is_left()?;
    // Of one that nobody waits for, the next listing finds out.
    cli.ok(&["rm", "--all"])?;
    cli.ok(&["run", "-d", "--rm", &root, "sleep", "1000"])?;
    kill(&cli.running()?["state"]["supervisor"])?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while !cli.ps()?.is_empty() {
        ensure!(
            Instant::now() < deadline,
            "it is listed for ever: {:?}",
            cli.ps()?
        );
    }
    cli.nothing_is_left()
}

fn killed_command(ctx: &Ctx) -> Verdict {
    let cli = Cli::new(ctx);
    let root = cli.root();
    let mut child = cli.start(&["run", "--rm", &root, "sleep", "1000"])?;
    cli.running()?;
    child.kill()?;
    child.wait()?;
    cli.nothing_is_left()?;
    ensure!(cli.ps()?.is_empty(), "{:?}", cli.ps()?);
    // While the guest comes up.
    let mut child = cli.start(&["run", "--rm", &root, "sleep", "1000"])?;
    while cli.ps()?.is_empty() {
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill()?;
    child.wait()?;
    cli.nothing_is_left()
}

fn wrong(ctx: &Ctx) -> Verdict {
    let cli = Cli::new(ctx);
    let root = cli.root();
    let cases: [(&[&str], i32, &str); 7] = [
        (
            &["run", "--rm", &root, "no-such-program"],
            127,
            "no-such-program",
        ),
        (&["run", "--rm", &root, "/etc/passwd"], 126, "/etc/passwd"),
        (
            &["run", "--rm", "./no-such-image", "true"],
            125,
            "no-such-image",
        ),
        (
            &["run", "--rm", "-u", "ghost", &root, "true"],
            125,
            "no user \"ghost\"",
        ),
        (
            &["run", "--rm", "-p", "80:80", &root, "true"],
            125,
            "no effect without a network",
        ),
        (
            &["run", "--rm", "--kernel", "/no/kernel", &root, "true"],
            125,
            "cargo xtask guest install",
        ),
        (&["stop", "nobody"], 1, "there is no pod \"nobody\""),
    ];
    for (args, code, says) in cases {
        let output = cli.call(args)?;
        let err = text(&output.stderr);
        ensure!(
            output.status.code() == Some(code) && err.lines().count() == 1 && err.contains(says),
            "{args:?}: {} instead of {code}, {err:?} instead of {says:?}",
            output.status
        );
        ensure!(
            output.stdout.is_empty(),
            "{args:?} prints {:?}",
            text(&output.stdout)
        );
    }
    ensure!(cli.ps()?.is_empty(), "something is kept");
    cli.nothing_is_left()
}

fn check(ctx: &Ctx) -> Verdict {
    let cli = Cli::new(ctx);
    let said: Value = serde_json::from_str(&cli.ok(&["check", "--json"])?)?;
    ensure!(said["able"] == true, "{said}");
    let mut command = cli.command(&["check", "--json"]);
    let output = command.env("TESTUDO_GUEST_KERNEL", "/no/kernel").output()?;
    let said: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(!output.status.success() && said["able"] == false, "{said}");
    ensure!(
        said.to_string().contains("cargo xtask guest install"),
        "{said}"
    );
    Ok(())
}
