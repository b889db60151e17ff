//! A VMM that has been started, and one that has ended.

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ChildStdin, ExitStatus};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::capture::Capture;
use crate::context::{Ctx, SharedChild, lock};
use crate::ensure;
use crate::facts::Facts;
use crate::outcome::{Outcome, Verdict};
use crate::smaps::Pss;

const CTL_LIMIT: Duration = Duration::from_secs(60);

/// A VMM at work. Its process is killed at the end of the test if it is still there.
pub struct Running<'a> {
    pub(crate) ctx: &'a Ctx,
    pub(crate) child: SharedChild,
    pub(crate) stdin: Option<ChildStdin>,
    pub(crate) stdout: Capture,
    pub(crate) stderr: Capture,
    pub(crate) control: Option<PathBuf>,
    pub(crate) started: Instant,
}

/// A VMM that has ended by itself.
#[derive(Debug)]
pub struct Finished {
    /// How.
    pub status: ExitStatus,
    /// What the guest's console said, without carriage returns.
    pub stdout: String,
    /// What the VMM said.
    pub stderr: String,
    /// From the start to the end.
    pub elapsed: Duration,
}

impl<'a> Running<'a> {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        lock(&self.child).id()
    }

    /// Waits for a word on the console.
    pub fn wait_for(&self, text: &str, limit: Duration) -> Verdict {
        self.wait_for_times(text, 1, limit)
    }

    /// Waits until the console has said it so many times.
    pub fn wait_for_times(&self, text: &str, times: usize, limit: Duration) -> Verdict {
        ensure!(
            self.stdout.wait_for(text, times, limit),
            "the console did not say `{text}` ({times} times) within {} s",
            limit.as_secs()
        );
        Ok(())
    }

    /// What the console has said so far.
    pub fn console(&self) -> String {
        self.stdout.text()
    }

    /// Bytes that the console has said so far.
    pub fn console_length(&self) -> usize {
        self.stdout.len()
    }

    /// Types into the guest's console.
    pub fn send(&mut self, bytes: &[u8]) -> Verdict {
        let Some(stdin) = &mut self.stdin else {
            return Err(Outcome::Failed(
                "its input is closed, or is a terminal".into(),
            ));
        };
        stdin.write_all(bytes)?;
        Ok(stdin.flush()?)
    }

    /// Ends the input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Verdict {
        let pid = i32::try_from(self.pid())?;
        let pid = Pid::from_raw(pid).ok_or_else(|| Outcome::Failed("no process".into()))?;
        Ok(kill_process(pid, signal)?)
    }

    /// Runs `testudo-vmm ctl SOCKET …` to its end.
    pub fn ctl(&self, verb: &[&str]) -> Verdict<Finished> {
        self.ctl_start(verb)?.finish(CTL_LIMIT)
    }

    /// Runs a verb that has to succeed; returns what it printed.
    pub fn ctl_ok(&self, verb: &[&str]) -> Verdict<String> {
        let done = self.ctl(verb)?;
        ensure!(
            done.status.success(),
            "ctl {verb:?} ended with {}: {}",
            done.status,
            done.stderr.trim()
        );
        Ok(done.stdout)
    }

    /// Starts `testudo-vmm ctl SOCKET …`; for `events`, which goes on.
    pub fn ctl_start(&self, verb: &[&str]) -> Verdict<Running<'a>> {
        let Some(control) = &self.control else {
            return Err(Outcome::Failed("this VM has no control socket".into()));
        };
        let ctl = self.ctx.vmm().arg("ctl").arg(control).args(verb);
        ctl.spawn()
    }

    /// Proportional set size without guest RAM.
    pub fn pss(&self) -> Verdict<Pss> {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps", self.pid()))?;
        Ok(Pss::read(&text))
    }

    /// Waits for its end. A VMM that does not end in time is killed, and the test fails.
    pub fn finish(mut self, limit: Duration) -> Verdict<Finished> {
        // Reading ends when every holder of the stream is gone, so this waits without polling.
        let deadline = Instant::now() + limit;
        let status = loop {
            if let Some(status) = lock(&self.child).try_wait()? {
                break status;
            }
            if Instant::now() >= deadline {
                let _ = lock(&self.child).kill();
                return Err(Outcome::Failed(format!(
                    "it did not end within {} s",
                    limit.as_secs()
                )));
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let elapsed = self.started.elapsed();
        self.close_stdin();
        for output in [&self.stdout, &self.stderr] {
            output.wait_end(Duration::from_secs(10));
        }
        Ok(Finished {
            status,
            stdout: self.stdout.text(),
            stderr: self.stderr.text(),
            elapsed,
        })
    }
}

impl Finished {
    /// Fails the test unless it ended with this exit code.
    pub fn expect_code(&self, code: i32) -> Verdict {
        ensure!(
            self.status.code() == Some(code),
            "ended with {} instead of exit code {code}; stderr: {}",
            self.status,
            self.stderr.trim()
        );
        Ok(())
    }

    /// The signal that ended it.
    pub fn signal(&self) -> Option<i32> {
        self.status.signal()
    }

    /// What the guest told; a verb that could not be carried out fails the test.
    pub fn facts(&self) -> Verdict<Facts> {
        if let Some(line) = self.stdout.lines().find(|l| l.starts_with("FAILED ")) {
            return Err(Outcome::Failed(format!("the guest said: {line}")));
        }
        Ok(Facts::read(&self.stdout))
    }

    /// Fails the test unless this line is on the console.
    pub fn expect_line(&self, line: &str) -> Verdict {
        ensure!(
            self.stdout.lines().any(|l| l == line),
            "the console did not say the line `{line}`"
        );
        Ok(())
    }

    /// Fails the test unless it is an error as a person wants it: exit code 1, nothing on stdout, and
    /// on stderr one line with each of these words.
    pub fn expect_one_line_error(&self, words: &[&str]) -> Verdict {
        self.expect_code(1)?;
        ensure!(self.stdout.is_empty(), "stdout has {:?}", self.stdout);
        let lines: Vec<&str> = self.stderr.lines().collect();
        ensure!(
            lines.len() == 1,
            "stderr has {} lines instead of one: {:?}",
            lines.len(),
            self.stderr
        );
        for word in words {
            ensure!(
                lines[0].contains(word),
                "`{}` does not say `{word}`",
                lines[0]
            );
        }
        Ok(())
    }
}
