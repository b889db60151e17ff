//! `testudo-vmm ctl SOCKET VERB`: the client of the control socket.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Args, Subcommand};
use testudo_protocol::{
    ConnectError, Connection, Counters, Direction, Failure, LimitsSpec, MessageError, Outcome,
    RateSpec, Request, ServerMessage, Verb,
};
use thiserror::Error;

use crate::spec::ByteSize;

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
#[derive(Debug, Clone, Subcommand)]
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
    /// What devices have counted.
    Counters {
        /// How to print it.
        #[arg(long, value_enum, default_value_t = CountersFormat::Json)]
        format: CountersFormat,
    },
    /// Make a disk this large, or tell the guest of what its block device has become.
    ResizeDisk {
        /// The disk.
        id: String,
        /// Its new size.
        size: ByteSize,
    },
    /// Grow or shrink the guest's memory to this much.
    ResizeMemory {
        /// All of its memory.
        size: ByteSize,
    },
    /// Take this much memory from the guest by its balloon.
    Balloon {
        /// Bytes in the balloon.
        size: ByteSize,
    },
    /// Tell the guest what size its virtio console has.
    ResizeConsole {
        /// Columns.
        columns: u16,
        /// Rows.
        rows: u16,
    },
    /// Limit a disk or a network device; what is not named is not limited any more.
    Limits(LimitsArgs),
    /// Plug the cable of a network device in, or pull it.
    Link {
        /// The device.
        id: String,
        /// In or out.
        state: LinkState,
    },
    /// Print events, one JSON object a line, until the VM ends.
    Events,
}

/// A cable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LinkState {
    /// Plugged in.
    Up,
    /// Pulled.
    Down,
}

/// Forms of counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum CountersFormat {
    /// One JSON object by device and counter.
    Json,
    /// The text format that Prometheus reads.
    Prometheus,
}

/// New limits of a device.
#[derive(Debug, Clone, Args)]
pub struct LimitsArgs {
    /// The device.
    pub id: String,
    /// Which way, for a network device: `rx` to the guest, `tx` from it. Default: both.
    #[arg(long, value_name = "rx|tx", value_parser = direction)]
    pub direction: Option<Direction>,
    /// Bytes a second.
    #[arg(long, value_name = "SIZE")]
    pub bw: Option<ByteSize>,
    /// Bytes at once; default: a second's worth.
    #[arg(long, value_name = "SIZE", requires = "bw")]
    pub bw_burst: Option<ByteSize>,
    /// Requests or packets a second.
    #[arg(long, value_name = "N")]
    pub iops: Option<u64>,
    /// Requests or packets at once; default: a second's worth.
    #[arg(long, value_name = "N", requires = "iops")]
    pub iops_burst: Option<u64>,
}

fn direction(word: &str) -> Result<Direction, String> {
    match word {
        "rx" => Ok(Direction::Rx),
        "tx" => Ok(Direction::Tx),
        _ => Err("write rx or tx".to_owned()),
    }
}

impl From<&LimitsArgs> for LimitsSpec {
    fn from(args: &LimitsArgs) -> Self {
        let rate = |per_second: Option<u64>, burst| {
            per_second.map(|per_second| RateSpec { per_second, burst })
        };
        Self {
            direction: args.direction,
            bytes: rate(args.bw.map(|b| b.0), args.bw_burst.map(|b| b.0)),
            ops: rate(args.iops, args.iops_burst),
        }
    }
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
            verb: (&self.verb).into(),
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
                            let text = match self.verb {
                                CtlVerb::Counters {
                                    format: CountersFormat::Prometheus,
                                } => prometheus(&counters),
                                _ => json(&counters, true)? + "\n",
                            };
                            out.write_all(text.as_bytes())?;
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

/// Counters in the text exposition format: one metric, labelled by device and counter.
fn prometheus(counters: &Counters) -> String {
    let mut text = String::from(
        "# HELP testudo_device What a device of the VM has counted since it was made.\n\
         # TYPE testudo_device untyped\n",
    );
    for (device, values) in counters {
        for (name, value) in values {
            let (queue, name) = match name.strip_prefix("queue").and_then(|n| n.split_once('.')) {
                Some((queue, name)) => (format!(",queue=\"{queue}\""), name),
                None => (String::new(), name.as_str()),
            };
            text.push_str(&format!(
                "testudo_device{{device=\"{device}\"{queue},counter=\"{name}\"}} {value}\n"
            ));
        }
    }
    text
}

impl From<&CtlVerb> for Verb {
    fn from(verb: &CtlVerb) -> Self {
        match verb {
            CtlVerb::Info => Self::Info,
            CtlVerb::Pause => Self::Pause,
            CtlVerb::Resume => Self::Resume,
            CtlVerb::Shutdown { timeout } => Self::Shutdown {
                timeout_s: *timeout,
            },
            CtlVerb::ResizeDisk { id, size } => Self::ResizeDisk {
                id: id.clone(),
                bytes: size.0,
            },
            CtlVerb::ResizeMemory { size } => Self::ResizeMemory { bytes: size.0 },
            CtlVerb::Balloon { size } => Self::Balloon { bytes: size.0 },
            CtlVerb::Limits(args) => Self::Limits {
                id: args.id.clone(),
                limits: args.into(),
            },
            CtlVerb::Link { id, state } => Self::Link {
                id: id.clone(),
                up: *state == LinkState::Up,
            },
            CtlVerb::ResizeConsole { columns, rows } => Self::ResizeConsole {
                columns: *columns,
                rows: *rows,
            },
            CtlVerb::Stop => Self::Stop,
            CtlVerb::PowerButton => Self::PowerButton,
            CtlVerb::Counters { .. } => Self::Counters,
            CtlVerb::Events => Self::Events,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prometheus_reads_counters_by_device_and_queue() {
        let of_disk = [("queue0.chains".to_owned(), 7), ("size".to_owned(), 9)];
        let counters = [("disk0".to_owned(), of_disk.into())].into();
        let text = prometheus(&counters);
        let lines: Vec<_> = text.lines().filter(|l| !l.starts_with('#')).collect();
        assert_eq!(
            lines,
            [
                r#"testudo_device{device="disk0",queue="0",counter="chains"} 7"#,
                r#"testudo_device{device="disk0",counter="size"} 9"#,
            ]
        );
    }
}
