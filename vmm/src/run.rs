//! `testudo-vmm run`: from a specification to an exit status.

use std::time::Instant;

use anyhow::Context;
use testudo_protocol::{Ended, Listener};

use crate::control;
use crate::letters::Letters;
use crate::machine::Machine;
use crate::signals::EndingSignals;
use crate::spec::{Source, Spec};

pub use crate::machine::open_kvm;

/// Exit status of `run` for each way a VM ends.
pub fn exit_status(ended: Ended) -> u8 {
    match ended {
        Ended::PowerOff | Ended::Stopped => 0,
        Ended::Failed => 1,
        Ended::Reset => 3,
        Ended::Panic => 4,
        Ended::Watchdog => 5,
    }
}

/// Runs the machine to its end. `started` is when the process started.
pub fn run(spec: Spec, started: Instant) -> anyhow::Result<Ended> {
    let signals = EndingSignals::block().context("cannot block signals")?;
    let letters = Letters::new().context("cannot make an eventfd")?;
    let listener = spec.control.as_ref().map(listen).transpose()?;
    let machine = Machine::new(spec, letters.clone(), started)?;
    control::run(machine, letters, signals, listener, started)
}

fn listen(source: &Source) -> anyhow::Result<Listener> {
    match source {
        Source::Path(path) => Ok(Listener::bind(path)?),
        Source::Fd(_) => {
            let file = source.open("control socket")?;
            Listener::from_fd(file.into()).with_context(|| format!("control socket {source}"))
        }
    }
}
