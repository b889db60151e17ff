//! Lists of host CPUs, `0-3,8`, as in `/sys/devices/system/cpu/online`.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::Serialize;
use thiserror::Error;

/// Host CPU numbers above this have no place in a `cpu_set_t`.
const MAX_CPU: u32 = libc::CPU_SETSIZE.cast_unsigned() - 1;

/// A set of host CPUs that is not empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(into = "String")]
pub struct CpuList(BTreeSet<u32>);

/// What was written is not a list of CPUs.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("`{0}` is not a list of host CPUs: write numbers up to {MAX_CPU} and ranges, as in 0-3,8")]
pub struct CpuListError(String);

impl CpuList {
    /// The CPUs, in rising order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().copied()
    }
}

impl FromStr for CpuList {
    type Err = CpuListError;
    fn from_str(text: &str) -> Result<Self, CpuListError> {
        let error = || CpuListError(text.to_owned());
        let number = |s: &str| {
            s.parse::<u32>()
                .ok()
                .filter(|n| *n <= MAX_CPU)
                .ok_or_else(error)
        };
        let mut cpus = BTreeSet::new();
        for part in text.split(',') {
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => (number(part)?, number(part)?),
            };
            if first > last {
                return Err(error());
            }
            cpus.extend(first..=last);
        }
        Ok(Self(cpus))
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, cpu) in self.0.iter().enumerate() {
            let comma = if at > 0 { "," } else { "" };
            write!(f, "{comma}{cpu}")?;
        }
        Ok(())
    }
}

impl From<CpuList> for String {
    fn from(list: CpuList) -> Self {
        list.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_ranges() {
        let list: CpuList = "0-2,8,1".parse().unwrap();
        assert_eq!(list.iter().collect::<Vec<_>>(), [0, 1, 2, 8]);
        for bad in ["", "3-1", "a", "0-", "0,,1", "1024", "-1", "0-99999999"] {
            assert!(bad.parse::<CpuList>().is_err(), "{bad}");
        }
    }
}
