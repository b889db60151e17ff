//! What the lab's two halves say to each other: the orders that wait in the initramfs, and the lines
//! that come back on the port [`CTL`].

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The orders' place in the initramfs.
pub const ORDERS: &str = "/lab.json";
/// Lines from lab-init ([`Word`]).
pub const CTL: &str = "ctl";
/// The command's stdout.
pub const OUT: &str = "out";
/// The command's stderr.
pub const ERR: &str = "err";
/// The command's stdin.
pub const IN: &str = "in";
/// 9p tag of the host's root.
pub const TAG_ROOT: &str = "root";
/// 9p tag of the output folder.
pub const TAG_OUT: &str = "out";

/// From one sign of life to the next.
pub const HEARTBEAT: Duration = Duration::from_secs(5);

/// What lab-init is to do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Orders {
    /// The command's working directory.
    pub workspace: PathBuf,
    /// Where the writable output folder is mounted: its path on the host.
    pub out: PathBuf,
    /// Program and arguments.
    pub command: Vec<String>,
    /// The command's whole environment.
    pub env: Vec<(String, String)>,
    /// Module files of the initramfs that the root needs, in load order.
    pub early_modules: Vec<String>,
    /// The same, to load once the root is there.
    pub late_modules: Vec<String>,
    /// `lib/modules/<release>` on the host, made visible to modprobe.
    pub modules_dir: PathBuf,
    /// The kernel's release.
    pub release: String,
    /// Files and folders to copy into the lab's memory before the command starts.
    pub stage: Vec<PathBuf>,
    /// Send [`Word::Alive`], and take the host's nudges? Not where time is virtual.
    pub heartbeat: bool,
    /// The lab's CPUs.
    pub cpus: u32,
    /// Does the port [`IN`] feed the command's stdin?
    pub stdin: bool,
}

/// One line on the control port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// The command is about to be executed.
    Started,
    /// The lab is alive; said every [`HEARTBEAT`] unless time is virtual.
    Alive,
    /// The command has ended; so many bytes of stdout and stderr were sent.
    Exit {
        /// As a shell would report it: 128 + n for a signal.
        status: i32,
        /// Bytes sent on [`OUT`].
        out: u64,
        /// Bytes sent on [`ERR`].
        err: u64,
    },
    /// The lab itself cannot go on.
    Fatal(String),
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Word::Started => f.write_str("started"),
            Word::Alive => f.write_str("alive"),
            Word::Exit { status, out, err } => write!(f, "exit {status} {out} {err}"),
            Word::Fatal(why) => write!(f, "fatal {}", why.replace('\n', " ")),
        }
    }
}

/// A line that is no [`Word`].
#[derive(Debug, thiserror::Error)]
#[error("lab-init said `{0}`, which means nothing: rebuild it from this checkout")]
pub struct UnknownWord(String);

impl FromStr for Word {
    type Err = UnknownWord;

    fn from_str(line: &str) -> Result<Word, UnknownWord> {
        let unknown = || UnknownWord(line.to_owned());
        let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
        match verb {
            "started" => Ok(Word::Started),
            "alive" => Ok(Word::Alive),
            "fatal" => Ok(Word::Fatal(rest.to_owned())),
            "exit" => {
                let mut numbers = rest.split(' ').map(str::parse::<u64>);
                let mut next = || numbers.next().and_then(Result::ok).ok_or_else(unknown);
                let status = i32::try_from(next()?).map_err(|_| unknown())?;
                Ok(Word::Exit {
                    status,
                    out: next()?,
                    err: next()?,
                })
            }
            _ => Err(unknown()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_wire() {
        for word in [
            Word::Started,
            Word::Alive,
            Word::Exit {
                status: 137,
                out: u64::MAX,
                err: 0,
            },
            Word::Fatal("cannot mount: no such device".to_owned()),
        ] {
            assert_eq!(word.to_string().parse::<Word>().unwrap(), word);
        }
        assert!("exit 1".parse::<Word>().is_err());
        assert!("".parse::<Word>().is_err());
    }
}
