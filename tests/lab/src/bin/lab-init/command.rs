//! The ordered command: its streams, its end, and the end of all it left behind.

use std::fs::File;
use std::io::{self, Read, Write};
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, WaitOptions, kill_process_group, wait};
use testudo_lab::wire::{self, Orders, Word};

use crate::{ports, pulse};

/// The ports behind the command's streams.
pub(crate) struct Streams {
    out: File,
    err: File,
    stdin: Option<File>,
}

impl Streams {
    pub(crate) fn open(stdin: bool) -> Result<Streams> {
        Ok(Streams {
            out: ports::open(wire::OUT)?,
            err: ports::open(wire::ERR)?,
            stdin: if stdin {
                Some(ports::open(wire::IN)?)
            } else {
                None
            },
        })
    }
}

/// Runs it to its end. Pipes stand between it and the ports: a port can be opened only once, and a
/// program may well open `/dev/stdout`.
pub(crate) fn run(orders: &Orders, streams: Streams, ctl: &mut File) -> Result<Word> {
    let (program, arguments) = orders
        .command
        .split_first()
        .context("the orders name no command")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(orders.env.iter().map(|(k, v)| (k, v)))
        .current_dir(&orders.workspace)
        .stdin(if streams.stdin.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    ctl.write_all(format!("{}\n", Word::Started).as_bytes())
        .context("cannot say that the command starts")?;
    if orders.heartbeat {
        let share = || ctl.try_clone().context("cannot share the control port");
        pulse::beat(share()?);
        pulse::take_nudges(share()?, orders.cpus)?;
    }
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return not_run(&error, program, streams.err),
    };
    let out = child.stdout.take().map(|pipe| carry(pipe, streams.out));
    let err = child.stderr.take().map(|pipe| carry(pipe, streams.err));
    if let (Some(port), Some(pipe)) = (streams.stdin, child.stdin.take()) {
        drop(carry(port, pipe)); // ends with either side, or with the lab
    }
    let status = reap_until(Pid::from_child(&child))?;
    // As PID 1, "group 1" is every process but ourselves: what the command left behind ends here,
    // and with it the last writer of each pipe. That there is none is no error.
    let _ = kill_process_group(Pid::INIT, Signal::KILL);
    Ok(Word::Exit {
        status,
        out: sent(out),
        err: sent(err),
    })
}

/// What a shell says and returns for a program it cannot run.
fn not_run(error: &io::Error, program: &str, mut err: File) -> Result<Word> {
    let said = format!("lab: cannot run {program}: {error}\n");
    err.write_all(said.as_bytes())
        .context("cannot write to stderr")?;
    let status = if error.kind() == io::ErrorKind::NotFound {
        127
    } else {
        126
    };
    Ok(Word::Exit {
        status,
        out: 0,
        err: said.len() as u64,
    })
}

fn carry(
    mut from: impl Read + Send + 'static,
    mut to: impl Write + Send + 'static,
) -> JoinHandle<u64> {
    thread::spawn(move || {
        let mut buffer = vec![0; 32768];
        let mut sent = 0;
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            if to.write_all(&buffer[..n]).is_err() {
                break;
            }
            sent += n as u64;
        }
        sent
    })
}

fn sent(carrier: Option<JoinHandle<u64>>) -> u64 {
    carrier.and_then(|c| c.join().ok()).unwrap_or(0)
}

/// Waits for this child, and for every orphan that ends meanwhile.
fn reap_until(child: Pid) -> Result<i32> {
    loop {
        let Some((pid, status)) = wait(WaitOptions::empty()).context("cannot wait")? else {
            continue;
        };
        if pid == child {
            let by_signal = status.terminating_signal().map(|n| 128 + n);
            return Ok(status.exit_status().or(by_signal).unwrap_or(255));
        }
    }
}
