//! The messages of the control socket.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Chosen by the client, repeated in the reply.
    pub id: u64,
    /// What to do.
    pub verb: Verb,
}

/// What can be asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Verb {
    /// Describe the VM. Replies with [`Outcome::Info`].
    Info,
    /// Stop all vCPUs from running. Replies when they have stopped.
    Pause,
    /// Let the vCPUs run again.
    Resume,
    /// Ask the guest to power off, as by its power button, and stop the VM if it has not done so
    /// within the timeout. Replies when the VM has ended.
    Shutdown {
        /// Seconds to wait for the guest.
        timeout_s: u32,
    },
    /// End the VM at once, without asking the guest. Replies just before the VMM exits.
    Stop,
    /// Press the guest's ACPI power button once.
    PowerButton,
    /// What devices have counted. Replies with [`Outcome::Counters`].
    Counters,
    /// A disk's backing has grown or shrunk, or shall: the guest learns its new size.
    ResizeDisk {
        /// The disk's id.
        id: String,
        /// Bytes; a regular file is made this long.
        bytes: u64,
    },
    /// The guest's memory shall be this much, what it booted with included. Replies when the guest
    /// has been asked; what it then does is in [`Outcome::Info`].
    ResizeMemory {
        /// Bytes.
        bytes: u64,
    },
    /// The balloon shall take this much memory from the guest.
    Balloon {
        /// Bytes.
        bytes: u64,
    },
    /// The virtio console has this many columns and rows from now on.
    ResizeConsole {
        /// Columns.
        columns: u16,
        /// Rows.
        rows: u16,
    },
    /// Limits a disk or a network device.
    Limits {
        /// The device's id.
        id: String,
        /// Its new limits.
        limits: LimitsSpec,
    },
    /// Plugs the cable of a network device in, or pulls it.
    Link {
        /// The device's id.
        id: String,
        /// In.
        up: bool,
    },
    /// From now on send [`Event`]s on this connection, the phase the VM is in first.
    Events,
}

/// New limits of a device; a limit that is left out is lifted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsSpec {
    /// Which way, for a network device; default: both.
    pub direction: Option<Direction>,
    /// Bytes.
    pub bytes: Option<RateSpec>,
    /// Requests of a disk, packets of a network device.
    pub ops: Option<RateSpec>,
}

/// Ways of a network device, as the guest sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// To the guest.
    Rx,
    /// From the guest.
    Tx,
}

/// One limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RateSpec {
    /// Units a second on average, not 0.
    pub per_second: u64,
    /// Units at once, not 0; default: a second's worth.
    #[serde(default)]
    pub burst: Option<u64>,
}

/// Anything the VMM sends to a client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ServerMessage {
    /// The answer to one request.
    Reply(Reply),
    /// Something happened; only after [`Verb::Events`].
    Event(Event),
}

/// The answer to one request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Reply {
    /// The request's id; 0 if the request could not be read.
    pub id: u64,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Done, nothing to tell.
    Done,
    /// The VM as it is.
    Info(Box<Info>),
    /// Counters by device and name.
    Counters(Counters),
    /// The VM has ended; the VMM exits after sending this.
    Ended(Ended),
    /// Not done.
    Failed(Failure),
}

/// Counters by device, then by name.
pub type Counters = BTreeMap<String, BTreeMap<String, u64>>;

/// Why a request was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Failure {
    /// For programs.
    pub kind: FailureKind,
    /// For people.
    pub message: String,
}

/// Kinds of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// The message is not a request.
    Malformed,
    /// The request cannot be done in the VM's present state.
    WrongPhase,
    /// This machine cannot do it at all.
    Unsupported,
    /// There is no device of that id.
    NoDevice,
    /// A value that cannot be.
    BadValue,
    /// The VMM failed.
    Internal,
}

/// The life of a VM as a client sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The guest runs.
    Running,
    /// All vCPUs are stopped.
    Paused,
    /// The VM is being taken down.
    Ending,
}

/// How a VM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Ended {
    /// The guest powered itself off.
    PowerOff,
    /// The guest reset itself.
    Reset,
    /// The guest's kernel panicked.
    Panic,
    /// The guest was hung, as its watchdog found.
    Watchdog,
    /// A client or a signal ended it.
    Stopped,
    /// The VMM could not go on.
    Failed,
}

/// One vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CpuState {
    /// Index, from 0.
    pub index: u32,
    /// Id the guest knows it by: the APIC id on x86_64.
    pub id: u32,
    /// Host thread that runs it.
    pub tid: i32,
}

/// Guest RAM, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MemoryState {
    /// There since boot.
    pub boot_bytes: u64,
    /// Plugged by the guest since.
    pub plugged_bytes: u64,
    /// What the guest was asked to make of it, boot and plugged.
    pub requested_bytes: u64,
    /// The most there may be.
    pub max_bytes: u64,
}

/// The VM as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Info {
    /// Version of the VMM.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// Present phase.
    pub phase: Phase,
    /// vCPUs.
    pub cpus: Vec<CpuState>,
    /// Guest RAM in bytes: that of the boot and what is plugged.
    pub memory_bytes: u64,
    /// What it consists of, and what it may become.
    pub memory: MemoryState,
    /// PCI functions as `bus:device.function` and what they are.
    pub pci: BTreeMap<String, String>,
    /// Microseconds from the start of the process to the first instruction of the guest.
    pub start_us: u64,
    /// Resets the guest went through.
    pub resets: u32,
}

/// Something that happened to the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Event {
    /// Microseconds since the VMM process started.
    pub at_us: u64,
    /// What happened, in words a script can match: `running`, `paused`, `resumed`, `reset`,
    /// `power-off`, `panic`, `crash-dump`, `power-button`, `debug-port`, `watchdog`,
    /// `ended`.
    pub what: String,
    /// A value that belongs to it, such as the byte written to the debug port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<u64>,
}

/// A packet is not a message.
#[derive(Debug, Error)]
#[error("not a control message: {source}")]
pub struct MessageError {
    #[from]
    source: serde_json::Error,
}

impl Request {
    /// Reads a request from one packet.
    pub fn from_packet(packet: &[u8]) -> Result<Self, MessageError> {
        Ok(serde_json::from_slice(packet)?)
    }

    /// The packet of this request.
    pub fn to_packet(&self) -> Result<Vec<u8>, MessageError> {
        Ok(serde_json::to_vec(self)?)
    }
}

impl ServerMessage {
    /// Reads a message of the VMM from one packet.
    pub fn from_packet(packet: &[u8]) -> Result<Self, MessageError> {
        Ok(serde_json::from_slice(packet)?)
    }

    /// The packet of this message.
    pub fn to_packet(&self) -> Result<Vec<u8>, MessageError> {
        Ok(serde_json::to_vec(self)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_read_as_people_write_them() {
        let request = Request::from_packet(br#"{"id":7,"verb":"pause"}"#).unwrap();
        assert_eq!(
            request,
            Request {
                id: 7,
                verb: Verb::Pause
            }
        );
        let request =
            Request::from_packet(br#"{"id":8,"verb":{"shutdown":{"timeout_s":5}}}"#).unwrap();
        assert_eq!(request.verb, Verb::Shutdown { timeout_s: 5 });
    }

    #[test]
    fn unknown_verbs_and_keys_are_errors() {
        for packet in [
            &br#"{"id":7,"verb":"explode"}"#[..],
            br#"{"id":7,"verb":"pause","now":true}"#,
            br#"{"verb":"pause"}"#,
            br#"{"id":-1,"verb":"pause"}"#,
            b"",
            b"\xff\xfe",
        ] {
            assert!(Request::from_packet(packet).is_err(), "{packet:?}");
        }
    }

    #[test]
    fn messages_round_trip() {
        let message = ServerMessage::Reply(Reply {
            id: 3,
            outcome: Outcome::Failed(Failure {
                kind: FailureKind::WrongPhase,
                message: "the VM is ending".into(),
            }),
        });
        let packet = message.to_packet().unwrap();
        assert_eq!(ServerMessage::from_packet(&packet).unwrap(), message);
    }
}
