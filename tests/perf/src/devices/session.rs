//! One VMM from start to end: its guest takes the steps, and at each end of a step we look at what
//! the VMM has used.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use testudo_lab::cpio::Cpio;
use testudo_perf::memory;

use crate::case::{Case, RAM_MIB, daemon_socket};
use crate::hang::{self, Watch};
use crate::host::Host;
use crate::kit::{Kit, stage};
use crate::steps::{self, Done, IDLE, Step};
use crate::usage::{Cgroup, Snapshot, Spent};

/// A case that takes longer hangs. Virtual time in a lab with `--icount`.
const LIMIT: Duration = Duration::from_secs(90);
/// Hangs of one case until it is given up.
const HANGS: u32 = 12;
/// When an idle VMM has settled.
const SETTLED: Duration = Duration::from_secs(2);

/// What to do, and what beside.
pub(crate) struct Wanted<'a> {
    /// A shell command that goes along with each step.
    pub(crate) beside: Option<&'a str>,
    /// Part of steps' names.
    pub(crate) step: &'a str,
}

/// What was measured of one step in one case.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) case: Case,
    pub(crate) step: &'static str,
    /// In the step's unit, by the guest's clock.
    pub(crate) rate: f64,
    /// The same by second of the VMM's CPU time.
    pub(crate) per_cpu_second: Option<f64>,
    pub(crate) elapsed_s: f64,
    pub(crate) vmm_cpu_s: f64,
    pub(crate) guest_cpu_s: f64,
}

/// One case: its rows, and why there are no more of them.
#[derive(Debug, Serialize)]
pub(crate) struct Ran {
    pub(crate) case: Case,
    pub(crate) rows: Vec<Row>,
    /// Guests that hung; the steps that were left were taken by another.
    pub(crate) hangs: u32,
    pub(crate) failure: Option<String>,
}

pub(crate) fn run(kit: &Kit, host: &Host, case: Case, wanted: &Wanted<'_>, out: &Path) -> Ran {
    let mut ran = Ran {
        case,
        rows: Vec::new(),
        hangs: 0,
        failure: None,
    };
    let steps: Vec<&'static Step> = steps::steps(case.group())
        .iter()
        .filter(|s| s.name.contains(wanted.step))
        .collect();
    let name = case.name().replace([' ', ',', '='], "-");
    while let Some(left) = steps.get(ran.rows.len()..).filter(|left| !left.is_empty()) {
        let before = ran.rows.len();
        let mut said = String::new();
        let ended = measure(kit, host, wanted, left, &mut ran, &mut said);
        let _ = fs::write(out.join(format!("{name}.console")), said);
        let _ = fs::copy(errors(), out.join(format!("{name}.stderr")));
        match ended {
            Ok(Ended::Hung) if ran.hangs < HANGS => {
                println!("{}: the guest hung (see `hang`), anew", case.name());
                ran.hangs += 1;
            }
            Ok(Ended::Hung) => {
                ran.failure = Some(format!("the guest hung {HANGS} times"));
                break;
            }
            Ok(Ended::Whole) if ran.rows.len() > before => {}
            Ok(Ended::Whole) => {
                ran.failure = Some("the guest took no step".to_owned());
                break;
            }
            Err(error) => {
                ran.failure = Some(format!("{error:#}"));
                break;
            }
        }
    }
    if let Some(failure) = &ran.failure {
        println!("{}: FAILED: {failure}", case.name());
    }
    ran
}

/// How a VMM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// Its guest took all steps.
    Whole,
    /// Its guest hung and it was killed, or panicked: a fault of the emulated host, see `hang`.
    Hung,
}

fn errors() -> PathBuf {
    stage("stderr")
}

/// A process that does not outlive its case.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What goes along with a step. It is told to end after it, so that a profiler writes what it has.
struct Beside(Killed);

impl Drop for Beside {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.0.0);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        for _ in 0..1000 {
            if !matches!(self.0.0.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

fn measure(
    kit: &Kit,
    host: &Host,
    wanted: &Wanted<'_>,
    steps: &[&'static Step],
    ran: &mut Ran,
    said: &mut String,
) -> Result<Ended> {
    let case = ran.case;
    let initramfs = initramfs(kit, &steps::script(case.group(), steps))?;
    host.fill_share(steps.first().and_then(|s| s.needs))?;
    let stderr = File::create(errors()).context("cannot create a file for errors")?;
    let cgroup = Cgroup::new()?;
    let _daemon = daemon(kit, host, case, &cgroup, &stderr)?;
    let program = match case.compared_with() {
        None => &kit.vmm,
        Some(_) => kit.qemu.as_ref().context("there is no QEMU here")?,
    };
    let _ = fs::remove_file(&host.vsock);
    let child = Command::new(program)
        .args(case.arguments(kit, host, &initramfs))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(stderr)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let mut vmm = Killed(child);
    cgroup.take(vmm.0.id())?;
    let watch = Watch::begin(vmm.0.id(), LIMIT);
    let mut guest = Guest {
        pid: vmm.0.id(),
        to: vmm.0.stdin.take().context("no stdin")?,
        cgroup: &cgroup,
        watch: &watch,
        wanted,
        step: None,
    };
    let from = BufReader::new(vmm.0.stdout.take().context("no stdout")?);
    for line in from.split(b'\n') {
        let line = line.context("cannot read the console")?;
        let line = String::from_utf8_lossy(&line).replace('\r', "");
        said.push_str(&line);
        said.push('\n');
        if let Some(row) = guest.hear(case, &line)? {
            println!("{}", crate::report::line(&row));
            ran.rows.push(row);
        }
    }
    let status = vmm.0.wait().context("cannot wait for the VMM")?;
    if watch.hung() || hang::panicked(said) {
        return Ok(Ended::Hung);
    }
    let complaint = fs::read_to_string(errors()).unwrap_or_default();
    let complaint = complaint.lines().next().unwrap_or("it said nothing");
    let failed = said.lines().find(|l| l.starts_with("FAILED "));
    match (status.success(), failed) {
        (_, Some(line)) => bail!("the guest said: {line}"),
        (false, None) => bail!("{status}: {complaint}"),
        (true, None) if !said.contains("SCRIPT end") => bail!("the guest ended early: {complaint}"),
        _ => Ok(Ended::Whole),
    }
}

/// The kit's initramfs with this script, and this very program as the guest's tool.
fn initramfs(kit: &Kit, script: &str) -> Result<PathBuf> {
    let base = fs::read(&kit.initramfs)
        .with_context(|| format!("cannot read {}", kit.initramfs.display()))?;
    let tool = fs::read("/proc/self/exe").context("cannot read this program")?;
    let mut cpio = Cpio::new(base);
    cpio.file("script", 0o755, script.as_bytes())?;
    cpio.dir("files")?;
    cpio.file("files/perf-devices", 0o755, &tool)?;
    let path = stage("initramfs-with-script");
    fs::write(&path, cpio.finish()?).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

fn daemon(
    kit: &Kit,
    host: &Host,
    case: Case,
    cgroup: &Cgroup,
    stderr: &File,
) -> Result<Option<Killed>> {
    let Some(arguments) = case.daemon(host) else {
        return Ok(None);
    };
    let program = kit
        .virtiofsd
        .as_ref()
        .context("there is no virtiofsd here")?;
    let _ = fs::remove_file(daemon_socket());
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr.try_clone()?)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let child = Killed(child);
    cgroup.take(child.0.id())?;
    for _ in 0..500 {
        if Path::new(&daemon_socket()).exists() {
            return Ok(Some(child));
        }
        thread::sleep(Duration::from_millis(10));
    }
    bail!("virtiofsd makes no socket at {}", daemon_socket())
}

/// What is known of the step that the guest is at.
struct Current {
    step: &'static Step,
    begun: Snapshot,
    done: Option<Done>,
    beside: Option<Beside>,
}

struct Guest<'a> {
    pid: u32,
    to: ChildStdin,
    cgroup: &'a Cgroup,
    watch: &'a Watch,
    wanted: &'a Wanted<'a>,
    step: Option<Current>,
}

impl Guest<'_> {
    /// Takes a line of the console. A step that ends makes a row.
    fn hear(&mut self, case: Case, line: &str) -> Result<Option<Row>> {
        if let Some(name) = line.strip_prefix("READY ") {
            self.watch.booted();
            let step = steps::steps(case.group()).iter().find(|s| s.name == name);
            let step =
                step.with_context(|| format!("the guest begins {name}, which is no step"))?;
            if step.name == IDLE {
                thread::sleep(SETTLED);
            }
            let beside = self.wanted.beside.map(|command| self.beside(command, name));
            self.step = Some(Current {
                step,
                beside: beside.transpose()?,
                begun: self.cgroup.snapshot(self.pid)?,
                done: None,
            });
            self.go_on()?;
        } else if line.starts_with("DONE ") {
            let now = self.cgroup.snapshot(self.pid)?;
            let Some(current) = self.step.take() else {
                bail!("the guest ends a step it did not begin");
            };
            drop(current.beside);
            let row = if current.step.name == IDLE {
                let kib = memory::pss_without_guest_ram(self.pid, RAM_MIB << 20)?;
                row(
                    case,
                    current.step,
                    &now.since(&current.begun),
                    kib as f64,
                    None,
                )
            } else {
                let done = current
                    .done
                    .with_context(|| format!("{} has no result", current.step.name))?;
                rated(case, current.step, &now.since(&current.begun), done)
            };
            self.go_on()?;
            return Ok(Some(row));
        } else if let Some(current) = &mut self.step
            && let Some(done) = steps::result(line, current.step.unit)
        {
            current.done = Some(done);
        }
        Ok(None)
    }

    fn go_on(&mut self) -> Result<()> {
        self.to
            .write_all(b"go\n")
            .context("the guest hears nothing")
    }

    fn beside(&self, command: &str, step: &str) -> Result<Beside> {
        let child = Command::new("/bin/sh")
            .args(["-c", &format!("exec {command}")])
            .env("STEP", step.replace([' ', '/', ','], "-"))
            .env("PID", self.pid.to_string())
            .spawn()
            .context("cannot start a shell")?;
        // It has its own start to get over.
        thread::sleep(Duration::from_secs(2));
        Ok(Beside(Killed(child)))
    }
}

fn rated(case: Case, step: &'static Step, spent: &Spent, done: Done) -> Row {
    let scale = match step.unit {
        steps::Unit::Megabytes => 1e-6,
        _ => 1.0,
    };
    let units = done.units as f64 * scale;
    let rate = units / (done.ns as f64 / 1e9);
    let cpu = spent.vmm.as_secs_f64();
    row(case, step, spent, rate, (cpu > 0.0).then(|| units / cpu))
}

fn row(
    case: Case,
    step: &'static Step,
    spent: &Spent,
    rate: f64,
    per_cpu_second: Option<f64>,
) -> Row {
    Row {
        case,
        step: step.name,
        rate,
        per_cpu_second,
        elapsed_s: spent.elapsed.as_secs_f64(),
        vmm_cpu_s: spent.vmm.as_secs_f64(),
        guest_cpu_s: spent.guest.as_secs_f64(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::Group;

    #[test]
    fn rates_are_by_the_guests_clock_and_by_the_vmms_time() {
        let spent = Spent {
            elapsed: Duration::from_secs(3),
            vmm: Duration::from_millis(500),
            guest: Duration::from_secs(2),
        };
        let done = Done {
            units: 10_000_000,
            ns: 2_000_000_000,
        };
        let step = steps::steps(Group::Net).first().unwrap();
        let row = rated(Case::Net, step, &spent, done);
        assert!((row.rate - 5.0).abs() < 1e-9);
        assert!((row.per_cpu_second.unwrap() - 20.0).abs() < 1e-9);
    }
}
