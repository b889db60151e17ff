//! One run of a lab: starts the emulator, carries the command's streams, and ends it.
//!
//! ```text
//! spawned ──"started"──▶ command runs ──"exit"──▶ streams drained ──▶ emulator killed ──▶ Outcome
//!    │                        │
//!    └── boot limit ──────────┴── time limit, silence, death ──▶ emulator killed ──▶ LabError
//! ```
//! [`run`] must be called on a thread that outlives the lab (the main thread): the kernel kills the
//! emulator when that thread ends, so that nothing outlives a tool that was killed.
#![expect(unsafe_code, reason = "what a child does between fork and exec")]

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Signal, set_parent_process_death_signal};

use crate::initramfs::{self, InitramfsError};
use crate::qemu::{self, Fds};
use crate::spec::{Kit, LabSpec, SpecError};
use crate::wire::{UnknownWord, Word};

/// From spawn to the command's start; a healthy lab needs 3 to 15 s.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// Without a sign of life for so long, the lab hangs; a machine may be slow, but not that slow.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);
/// From one nudge to the next (see [`nudge`]).
const NUDGE: Duration = Duration::from_millis(200);
/// For output in flight when the command has ended.
const DRAIN_LIMIT: Duration = Duration::from_secs(20);
/// Lines of a log that an error quotes.
const TAIL: usize = 15;

/// Where the command's streams go and come from.
pub struct Streams<'a> {
    /// Its stdout.
    pub out: &'a mut (dyn Write + Send),
    /// Its stderr.
    pub err: &'a mut (dyn Write + Send),
    /// Its stdin; without one it reads end of file.
    pub stdin: Option<Box<dyn Read + Send>>,
}

/// How the command ended.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// As a shell would report it: 128 + n for a signal, 126 or 127 when it could not be run.
    pub status: i32,
    /// From the start of the emulator to that of the command.
    pub boot: Duration,
    /// From the start of the emulator to the end.
    pub whole: Duration,
}

/// Why there is no exit status.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// No such lab.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// No initramfs.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// The output folder.
    #[error("cannot make the lab's output folder {path}")]
    Out {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Memory files or sockets.
    #[error("cannot set up the lab's channels")]
    Channels(#[source] io::Error),
    /// No emulator.
    #[error("cannot start {program}: `cargo xtask setup` installs it")]
    Start {
        /// The emulator.
        program: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The emulator or the emulated kernel ended by itself.
    #[error("the lab died ({how}); its console is in {}\n{tail}", console.display())]
    Died {
        /// The emulator's exit status.
        how: String,
        /// The console's log.
        console: PathBuf,
        /// Ends of the logs.
        tail: String,
    },
    /// lab-init gave up.
    #[error("the lab could not be set up: {why}; its console is in {}", console.display())]
    Fatal {
        /// lab-init's words.
        why: String,
        /// The console's log.
        console: PathBuf,
    },
    /// The boot limit passed.
    #[error("the lab did not start the command within {limit:?}; its console is in {}\n{tail}", console.display())]
    NoStart {
        /// The limit.
        limit: Duration,
        /// The console's log.
        console: PathBuf,
        /// Ends of the logs.
        tail: String,
    },
    /// It was alive, and is no more.
    #[error("the lab has been hanging for {SILENCE_LIMIT:?} and was killed; its console is in {}\n{tail}", console.display())]
    Hung {
        /// The console's log.
        console: PathBuf,
        /// Ends of the logs.
        tail: String,
    },
    /// The command's time limit passed.
    #[error("the command did not end within {limit:?} and the lab was killed; its console is in {}", console.display())]
    Timeout {
        /// The limit.
        limit: Duration,
        /// The console's log.
        console: PathBuf,
    },
    /// The halves do not fit.
    #[error(transparent)]
    Wire(#[from] UnknownWord),
}

impl LabError {
    /// Did the lab fail rather than what ran in it? Then a fresh lab may do better.
    #[must_use]
    pub fn is_of_the_lab(&self) -> bool {
        matches!(
            self,
            LabError::Died { .. }
                | LabError::NoStart { .. }
                | LabError::Fatal { .. }
                | LabError::Hung { .. }
        )
    }
}

/// Boots the lab, runs its command, ends the lab.
pub fn run(
    kit: &Kit,
    spec: &LabSpec,
    env: Vec<(String, String)>,
    streams: Streams<'_>,
) -> Result<Outcome, LabError> {
    spec.check()?;
    let out_dir = |source| LabError::Out {
        path: spec.out.clone(),
        source,
    };
    std::fs::create_dir_all(&spec.out).map_err(out_dir)?;
    let archive = initramfs::build(kit, spec, env, streams.stdin.is_some())?;
    let initramfs = memory_file(&archive).map_err(LabError::Channels)?;

    let begun = Instant::now();
    let pair = || UnixStream::pair().map_err(LabError::Channels);
    let ((ctl, ctl_far), (out, out_far), (err, err_far), (input, in_far)) =
        (pair()?, pair()?, pair()?, pair()?);
    let fds = Fds {
        initramfs: initramfs.as_raw_fd(),
        ctl: ctl_far.as_raw_fd(),
        out: out_far.as_raw_fd(),
        err: err_far.as_raw_fd(),
        stdin: in_far.as_raw_fd(),
    };
    let inherited = [
        initramfs.as_fd(),
        ctl_far.as_fd(),
        out_far.as_fd(),
        err_far.as_fd(),
        in_far.as_fd(),
    ];
    let emulator = Emulator::start(kit, spec, fds, &inherited)?;
    drop((initramfs, ctl_far, out_far, err_far, in_far));
    if let Some(stdin) = streams.stdin {
        // Not joined: a read of a terminal cannot be called off, and the process ends soon after.
        std::thread::spawn(move || feed(stdin, input));
    }
    let (sent_out, sent_err) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| pump(out, streams.out, &sent_out));
        scope.spawn(|| pump(err, streams.err, &sent_err));
        let _nudging = (!spec.icount).then(|| {
            let (over, ended) = mpsc::channel();
            let to = ctl.try_clone();
            scope.spawn(move || to.map(|to| nudge(to, &ended)));
            over
        });
        let talk = Talk {
            spec,
            emulator,
            begun,
            lines: BufReader::new(ctl),
            line: String::new(),
        };
        talk.until_exit(&sent_out, &sent_err)
    })
}

/// The conversation on the control port.
struct Talk<'a> {
    spec: &'a LabSpec,
    emulator: Emulator,
    begun: Instant,
    lines: BufReader<UnixStream>,
    line: String,
}

impl Talk<'_> {
    /// Ends the emulator in any case: it is dropped here, and the pumps see the end of their streams.
    fn until_exit(mut self, out: &AtomicU64, err: &AtomicU64) -> Result<Outcome, LabError> {
        let boot_limit = BOOT_LIMIT.min(self.spec.timeout);
        let console = qemu::console_log(self.spec);
        let mut boot = None;
        let mut silent_since = None;
        loop {
            let limit = if boot.is_none() {
                boot_limit
            } else {
                self.spec.timeout
            };
            let over = self.begun + limit;
            let silent = silent_since.map(|since: Instant| since + SILENCE_LIMIT);
            let Some(word) = self.next_word(silent.unwrap_or(over).min(over))? else {
                let tail = tails(&self.spec.out);
                return Err(match boot {
                    None => LabError::NoStart {
                        limit,
                        console,
                        tail,
                    },
                    Some(_) if Instant::now() < over => LabError::Hung { console, tail },
                    Some(_) => LabError::Timeout { limit, console },
                });
            };
            match word {
                Word::Started => boot = Some(self.begun.elapsed()),
                Word::Alive => silent_since = Some(Instant::now()),
                Word::Fatal(why) => return Err(LabError::Fatal { why, console }),
                Word::Exit {
                    status,
                    out: all_out,
                    err: all_err,
                } => {
                    drain(|| {
                        out.load(Ordering::Acquire) >= all_out
                            && err.load(Ordering::Acquire) >= all_err
                    });
                    let whole = self.begun.elapsed();
                    return Ok(Outcome {
                        status,
                        boot: boot.unwrap_or(whole),
                        whole,
                    });
                }
            }
        }
    }

    /// The next line; none if `until` passes first.
    fn next_word(&mut self, until: Instant) -> Result<Option<Word>, LabError> {
        self.line.clear();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.lines
                .get_ref()
                .set_read_timeout(Some(left))
                .map_err(LabError::Channels)?;
            // A line cut short by the time limit stays in `line` and is gone on with.
            match self.lines.read_line(&mut self.line) {
                Ok(_) if self.line.ends_with('\n') => {
                    return Ok(Some(self.line.trim_end().parse()?));
                }
                Ok(_) => return Err(self.died()),
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                Err(_) => return Err(self.died()),
            }
        }
    }

    fn died(&mut self) -> LabError {
        LabError::Died {
            how: self.emulator.ended(),
            console: qemu::console_log(self.spec),
            tail: tails(&self.spec.out),
        }
    }
}

/// The emulator's process; killed when dropped.
struct Emulator(Child);

impl Emulator {
    fn start(
        kit: &Kit,
        spec: &LabSpec,
        fds: Fds,
        inherited: &[BorrowedFd<'_>],
    ) -> Result<Emulator, LabError> {
        let program = qemu::program(spec.arch);
        let log = spec.out.join("emulator.log");
        let out = |source| LabError::Out {
            path: log.clone(),
            source,
        };
        let said = File::create(&log).map_err(out)?;
        let mut command = Command::new(program);
        command
            .args(qemu::arguments(kit, spec, fds))
            .stdin(Stdio::null())
            .stdout(said.try_clone().map_err(out)?)
            .stderr(said);
        let raw: Vec<i32> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
        let prepare = move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            for fd in &raw {
                // SAFETY: these descriptors are open in the parent until the child has been
                // spawned, and the child holds the same ones.
                let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
                fcntl_setfd(fd, FdFlags::empty())?;
            }
            Ok(())
        };
        // SAFETY: `prepare` makes system calls only; it neither allocates nor takes locks.
        unsafe { command.pre_exec(prepare) };
        command
            .spawn()
            .map(Emulator)
            .map_err(|source| LabError::Start { program, source })
    }

    /// Its exit status, given a moment to arrive there.
    fn ended(&mut self) -> String {
        for _ in 0..20 {
            if let Ok(Some(status)) = self.0.try_wait() {
                return format!("{}: {status}", qemu::program(crate::Arch::X86_64));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        "it closed its control port".to_owned()
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn memory_file(content: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create("lab-initramfs", MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    Ok(file.into())
}

/// Port to sink, counting; a sink that fails (a closed pipe) is no reason to stop the lab.
fn pump(mut from: UnixStream, to: &mut (dyn Write + Send), count: &AtomicU64) {
    let mut buffer = vec![0; 65536];
    let mut open = true;
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        open = open && to.write_all(&buffer[..n]).and_then(|()| to.flush()).is_ok();
        count.fetch_add(n as u64, Ordering::Release);
    }
}

/// Sends a byte now and then until the sender of `over` is gone.
///
/// QEMU's SVM emulation changes a CPU's interrupt flags without a lock, and so it loses an interrupt
/// every few minutes: the one-shot timer that came while a nested guest ran stays pending in the
/// local APIC, and the lab stands still. The next interrupt from anywhere brings it back; this is one.
fn nudge(mut to: UnixStream, over: &mpsc::Receiver<()>) {
    while let Err(RecvTimeoutError::Timeout) = over.recv_timeout(NUDGE) {
        if to.write_all(b".").is_err() {
            return;
        }
    }
}

/// Our stdin to the port; its end closes the port.
fn feed(mut from: Box<dyn Read + Send>, mut to: UnixStream) {
    let _ = io::copy(&mut from, &mut to);
}

fn drain(done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() && begun.elapsed() < DRAIN_LIMIT {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The ends of the logs, indented.
fn tails(out: &Path) -> String {
    let mut text = String::new();
    for name in ["emulator.log", "console.log"] {
        let log = std::fs::read(out.join(name)).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        for line in lines.iter().skip(lines.len().saturating_sub(TAIL)) {
            text.push_str("  ");
            text.push_str(line.trim_end());
            text.push('\n');
        }
    }
    text
}
