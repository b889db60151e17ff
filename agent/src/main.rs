//! `testudo-agent`: PID 1 of a guest, or a service of it, that runs containers for the host.
//!
//! ```text
//!  host ── ttrpc over vsock ──▶ rpc ─▶ policy ─▶ requests ─┬─▶ jobs ─▶ stage ─▶ a container's process
//!  host ══ streams over vsock ══════▶ stdio ═══════════════╪══════════════════▶ its descriptors
//!                                                          └─▶ storage, cgroup, devices
//! ```
//! One thread, the loop (`agent.rs`), owns everything and never blocks. Slow work has a thread for each
//! request (`jobs.rs`). Processes of containers are prepared by a stage (`stage/`), this program anew.

mod agent;
mod button;
mod cgroup;
mod children;
mod container;
mod devices;
mod events;
mod failure;
mod init;
mod jobs;
mod logging;
mod network;
mod policy;
mod poll;
mod requests;
mod rpc;
mod seccomp;
mod settings;
mod stage;
mod stdio;
mod storage;
mod sys;
mod uevents;

use std::fs;
use std::process::ExitCode;

use agent::Agent;
use failure::{During, Failure};
use settings::Settings;

fn main() -> ExitCode {
    let started = agent::now_ns();
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.first().is_some_and(|word| word == stage::WORD) {
        return stage::main();
    }
    let init = rustix::process::getpid().is_init();
    let end = run(init, &words, started);
    if let Err(failure) = &end {
        if !init {
            logging::begin(false, log::LevelFilter::Error);
        }
        log::error!("{failure}");
    }
    if init {
        // A PID 1 that returns is a kernel panic.
        init::power_off();
    }
    if end.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn run(init: bool, words: &[String], started: u64) -> Result<(), Failure> {
    let settings = if init {
        init::mount_all()?;
        let line = fs::read_to_string("/proc/cmdline").during(|| "read /proc/cmdline".into())?;
        let settings = Settings::from_kernel(&line);
        let level = settings.as_ref().map_or(log::LevelFilter::Info, |s| s.log);
        logging::begin(true, level);
        init::make_root_leavable()?;
        init::begin();
        settings?
    } else {
        let settings = Settings::from_arguments(words)?;
        logging::begin(false, settings.log);
        // Processes whose parents are gone are reaped here.
        let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
        settings
    };
    sys::limits::small_heap();
    let mut agent = Agent::new(&settings, init, started)?;
    settings::protect_own_program(&settings.state);
    log::info!(
        "listening {} µs after its start",
        agent.listening_ns.saturating_sub(started) / 1000
    );
    let end = agent.run();
    agent.end();
    end
}
