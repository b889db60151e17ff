//! Amounts: sizes, CPUs, resource limits, signals.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Bytes, as `512m`, `1.5g` or a plain number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("`{text}` is no size; write bytes, or a number with k, m, g or t");
        let lower = text.trim().to_ascii_lowercase();
        let lower = lower
            .strip_suffix("ib")
            .or_else(|| lower.strip_suffix('b'))
            .unwrap_or(&lower);
        let units = [('k', 10_u32), ('m', 20), ('g', 30), ('t', 40)];
        let (digits, shift) = units
            .iter()
            .find_map(|(unit, shift)| Some((lower.strip_suffix(*unit)?, *shift)))
            .unwrap_or((lower, 0));
        let factor = 1_u64.checked_shl(shift).ok_or_else(bad)?;
        thousandths(digits)
            .and_then(|n| u128::from(n).checked_mul(u128::from(factor)))
            .and_then(|n| n.checked_div(1000))
            .and_then(|n| u64::try_from(n).ok())
            .map(Self)
            .ok_or_else(bad)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in [("G", 30_u32), ("M", 20), ("K", 10)] {
            let whole = self.0 >> shift;
            if whole > 0 && whole << shift == self.0 {
                return write!(f, "{whole}{unit}");
            }
        }
        write!(f, "{}", self.0)
    }
}

/// A decimal number with up to three places, in thousandths.
fn thousandths(text: &str) -> Option<u64> {
    let (whole, places) = text.split_once('.').unwrap_or((text, ""));
    let digits = |t: &str| t.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(places) || places.len() > 3 || whole.len() + places.len() == 0 {
        return None;
    }
    let whole: u64 = if whole.is_empty() {
        0
    } else {
        whole.parse().ok()?
    };
    let places: u64 = format!("{places:0<3}").parse().ok()?;
    whole.checked_mul(1000)?.checked_add(places)
}

/// CPUs, in thousandths: `1.5` is one and a half.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Cpus(u32);

impl Cpus {
    /// CPUs the guest needs for this.
    pub fn whole(self) -> u32 {
        self.0.div_ceil(1000).max(1)
    }

    /// Microseconds in each 100,000, if that is less than all of the whole CPUs.
    pub fn quota(self) -> Option<u32> {
        (!self.0.is_multiple_of(1000)).then(|| self.0.saturating_mul(100))
    }
}

impl FromStr for Cpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        thousandths(text)
            .and_then(|n| u32::try_from(n).ok())
            .filter(|n| (10..=256_000).contains(n))
            .map(Self)
            .ok_or_else(|| format!("`{text}` is no number of CPUs; write 0.01 to 256, such as 1.5"))
    }
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, places) = (self.0 / 1000, self.0 % 1000);
        if places == 0 {
            return write!(f, "{whole}");
        }
        write!(
            f,
            "{}",
            format!("{whole}.{places:03}").trim_end_matches('0')
        )
    }
}

/// `nofile=1024:4096`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ulimit {
    /// As in getrlimit(2), with `RLIMIT_`.
    pub kind: String,
    /// What is enforced.
    pub soft: u64,
    /// What it may be raised to.
    pub hard: u64,
}

const LIMITS: &[&str] = &[
    "as",
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

impl FromStr for Ulimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = |why: &str| {
            format!("`{text}`: {why}; write NAME=SOFT[:HARD], such as nofile=1024:4096")
        };
        let (name, values) = text.split_once('=').ok_or_else(|| bad("no `=`"))?;
        if !LIMITS.contains(&name) {
            return Err(bad(&format!(
                "no limit is called {name:?}, known are {}",
                LIMITS.join(", ")
            )));
        }
        let (soft, hard) = values.split_once(':').unwrap_or((values, values));
        let number = |text: &str| match text {
            "unlimited" | "-1" => Ok(u64::MAX),
            text => text
                .parse()
                .map_err(|_| bad(&format!("{text:?} is no number"))),
        };
        let (soft, hard) = (number(soft)?, number(hard)?);
        if soft > hard {
            return Err(bad("the soft limit is above the hard one"));
        }
        let kind = format!("RLIMIT_{}", name.to_ascii_uppercase());
        Ok(Self { kind, soft, hard })
    }
}

/// A signal's number in Linux's own counting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Signal(pub u32);

impl Signal {
    /// Asks a process to end.
    pub const TERM: Self = Self(15);
    /// Ends it.
    pub const KILL: Self = Self(9);
}

/// There is no such signal.
#[derive(Debug, Error)]
#[error("`{0}` is no signal; write a name such as TERM, or a number from 1 to 64")]
pub struct UnknownSignal(String);

/// x86_64, aarch64 and s390x agree on these.
const SIGNALS: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];
const REALTIME_FIRST: u32 = 34;

impl FromStr for Signal {
    type Err = UnknownSignal;

    fn from_str(text: &str) -> Result<Self, UnknownSignal> {
        let unknown = || UnknownSignal(text.to_owned());
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        let known = SIGNALS.iter().zip(1..).find(|(known, _)| **known == name);
        let realtime = || {
            let above: u32 = name.strip_prefix("RTMIN+")?.parse().ok()?;
            REALTIME_FIRST.checked_add(above)
        };
        let number = match known {
            Some((_, number)) => number,
            None if name == "RTMIN" => REALTIME_FIRST,
            None => realtime()
                .or_else(|| text.parse().ok())
                .ok_or_else(unknown)?,
        };
        (1..=64)
            .contains(&number)
            .then_some(Self(number))
            .ok_or_else(unknown)
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let index = usize::try_from(self.0).ok().and_then(|n| n.checked_sub(1));
        match index.and_then(|index| SIGNALS.get(index)) {
            Some(name) => write!(f, "SIG{name}"),
            None => write!(f, "signal {}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_units() {
        for (text, bytes) in [
            ("1", 1),
            ("1k", 1024),
            ("512m", 512 << 20),
            ("1.5g", 3 << 29),
            ("2GiB", 2 << 30),
            ("10b", 10),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for bad in [
            "",
            "m",
            "-1",
            "1x",
            "1.5.5",
            "99999999999999t",
            "1.2345g",
            ".",
        ] {
            assert!(bad.parse::<Size>().is_err(), "{bad}");
        }
        assert_eq!(Size(3 << 29).to_string(), "1536M");
    }

    #[test]
    fn fractions_of_cpus_become_a_quota() {
        let cpus: Cpus = "1.5".parse().unwrap();
        assert_eq!((cpus.whole(), cpus.quota()), (2, Some(150_000)));
        let cpus: Cpus = "2".parse().unwrap();
        assert_eq!((cpus.whole(), cpus.quota()), (2, None));
        assert_eq!("0.25".parse::<Cpus>().unwrap().to_string(), "0.25");
        assert!("0".parse::<Cpus>().is_err() && "300".parse::<Cpus>().is_err());
    }

    #[test]
    fn limits_and_signals_by_their_names() {
        let limit: Ulimit = "nofile=10:20".parse().unwrap();
        assert_eq!(
            (limit.kind.as_str(), limit.soft, limit.hard),
            ("RLIMIT_NOFILE", 10, 20)
        );
        assert_eq!("core=unlimited".parse::<Ulimit>().unwrap().soft, u64::MAX);
        for bad in ["nofile", "nofiles=1", "nofile=2:1", "nofile=x"] {
            assert!(bad.parse::<Ulimit>().is_err(), "{bad}");
        }
        for text in ["TERM", "SIGTERM", "sigterm", "15"] {
            assert_eq!(text.parse::<Signal>().unwrap(), Signal::TERM);
        }
        assert_eq!("RTMIN+1".parse::<Signal>().unwrap(), Signal(35));
        assert!("0".parse::<Signal>().is_err() && "NOPE".parse::<Signal>().is_err());
        assert_eq!(Signal(31).to_string(), "SIGSYS");
    }
}
