//! `testudo-vmm ctl SOCKET VERB`: the client of the control socket.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Args, Subcommand};
use testudo_protocol::{
    ConnectError, Connection, Failure, MessageError, Outcome, Request, ServerMessage, Verb,
};
use thiserror::Error;

/// Talk to a running virtual machine.
#[derive(Debug, Args)]
pub struct CtlArgs {
    /// Its control socket.
    pub socket: PathBuf,
    /// What to ask for.
    #[command(subcommand)]
    pub verb: CtlVerb,
}

/// What to ask for.
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum CtlVerb {
    /// Describe the VM, as JSON.
    Info,
    /// Stop the vCPUs.
    Pause,
    /// Let the vCPUs run again.
    Resume,
    /// Ask the guest to power off; end the VM if it does not in time.
    Shutdown {
        /// Seconds to wait for the guest.
        #[arg(long, default_value_t = 30, value_name = "SECONDS")]
        timeout: u32,
    },
    /// End the VM at once.
    Stop,
    /// Press the power button once.
    PowerButton,
    /// What devices have counted, as JSON.
    Counters,
    /// Print events, one JSON object a line, until the VM ends.
    Events,
}

/// The VM could not be asked, or did not do it.
#[derive(Debug, Error)]
pub enum CtlError {
    /// Nobody there.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The connection broke.
    #[error("the connection to the VM broke")]
    Io(#[from] io::Error),
    /// The VM closed the connection without an answer.
    #[error("the VM ended without an answer")]
    Closed,
    /// The VM speaks another language.
    #[error("the VM sent something else than an answer; are both of the same version?")]
    Message(#[from] MessageError),
    /// The VM said no.
    #[error("{}", .0.message)]
    Refused(Failure),
}

impl CtlArgs {
    /// Asks, waits for the answer and prints it to `out`.
    pub fn run(&self, out: &mut dyn Write) -> Result<(), CtlError> {
        let connection = Connection::open(&self.socket)?;
        let request = Request {
            id: 1,
            verb: self.verb.into(),
        };
        connection.send(&request.to_packet()?, &[])?;
        let following = matches!(self.verb, CtlVerb::Events);
        loop {
            let message = connection.receive()?.message;
            if message.is_empty() {
                return if following {
                    Ok(())
                } else {
                    Err(CtlError::Closed)
                };
            }
            match ServerMessage::from_packet(&message)? {
                ServerMessage::Event(event) => {
                    writeln!(out, "{}", json(&event, false)?)?;
                    out.flush()?;
                }
                ServerMessage::Reply(reply) => {
                    match reply.outcome {
                        Outcome::Failed(failure) => return Err(CtlError::Refused(failure)),
                        Outcome::Info(info) => writeln!(out, "{}", json(&info, true)?)?,
                        Outcome::Counters(counters) => {
                            writeln!(out, "{}", json(&counters, true)?)?;
                        }
                        Outcome::Done | Outcome::Ended(_) => {}
                    }
                    if !following {
                        return Ok(());
                    }
                }
            }
        }
    }
}

fn json(value: &impl serde::Serialize, pretty: bool) -> io::Result<String> {
    let text = if pretty {
        serde_json::to_string_pretty(value)
    } else {
        serde_json::to_string(value)
    };
    text.map_err(io::Error::other)
}

impl From<CtlVerb> for Verb {
    fn from(verb: CtlVerb) -> Self {
        match verb {
            CtlVerb::Info => Self::Info,
            CtlVerb::Pause => Self::Pause,
            CtlVerb::Resume => Self::Resume,
            CtlVerb::Shutdown { timeout } => Self::Shutdown { timeout_s: timeout },
            CtlVerb::Stop => Self::Stop,
            CtlVerb::PowerButton => Self::PowerButton,
            CtlVerb::Counters => Self::Counters,
            CtlVerb::Events => Self::Events,
        }
    }
}
