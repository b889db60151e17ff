//! What the guest's init tells: `FACT key=value` lines.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

use crate::outcome::{Outcome, Verdict};

/// The facts of one boot; of a key told twice the later value.
#[derive(Debug, Default)]
pub struct Facts(BTreeMap<String, String>);

/// A range of `/proc/iomem`, both ends inclusive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IoMem {
    /// First address.
    pub first: u64,
    /// Last address.
    pub last: u64,
    /// Owner: `System RAM`, `PCI Bus 0000:00`.
    pub owner: String,
}

/// One line of `/proc/mtrr`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mtrr {
    /// First address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// `uncachable`, `write-back`, …
    pub kind: String,
}

impl Facts {
    /// The facts in a guest's output.
    pub fn read(output: &str) -> Facts {
        let pairs = output.lines().filter_map(|line| {
            let (key, value) = line.strip_prefix("FACT ")?.split_once('=')?;
            Some((key.to_owned(), value.to_owned()))
        });
        Facts(pairs.collect())
    }

    /// A fact; that it is missing fails the test.
    pub fn get(&self, key: &str) -> Verdict<&str> {
        self.0
            .get(key)
            .map(String::as_str)
            .ok_or_else(|| Outcome::Failed(format!("the guest told no fact {key}")))
    }

    /// A fact that is a number, or whatever else is read from text.
    pub fn number<T: FromStr<Err: Display>>(&self, key: &str) -> Verdict<T> {
        let value = self.get(key)?;
        value
            .parse()
            .map_err(|e| Outcome::Failed(format!("fact {key}={value}: {e}")))
    }

    /// The facts whose keys begin so, with the rest of the key.
    pub fn group(&self, prefix: &str) -> Vec<(&str, &str)> {
        self.0
            .iter()
            .filter_map(|(k, v)| Some((k.strip_prefix(prefix)?, v.as_str())))
            .collect()
    }

    /// `name:value` words of a fact (`cpu.0`, `pci.0000:00:01.0`).
    pub fn field(&self, key: &str, name: &str) -> Verdict<&str> {
        let fact = self.get(key)?;
        fact.split(' ')
            .find_map(|word| word.strip_prefix(name)?.strip_prefix(':'))
            .ok_or_else(|| Outcome::Failed(format!("fact {key}={fact} has no {name}")))
    }

    /// The guest's physical address space.
    pub fn iomem(&self) -> Verdict<Vec<IoMem>> {
        let parse = |line: &str| {
            let (range, owner) = line.split_once(" : ")?;
            let (first, last) = range.split_once('-')?;
            Some(IoMem {
                first: u64::from_str_radix(first, 16).ok()?,
                last: u64::from_str_radix(last, 16).ok()?,
                owner: owner.to_owned(),
            })
        };
        self.lines("iomem.", parse)
    }

    /// `/proc/mtrr`.
    pub fn mtrrs(&self) -> Verdict<Vec<Mtrr>> {
        // reg00: base=0x0c0000000 ( 3072MB), size= 1024MB, count=1: uncachable
        let parse = |line: &str| {
            let base = line.split("base=0x").nth(1)?.split(' ').next()?;
            let size = line.split("size=").nth(1)?.split(',').next()?.trim();
            let (digits, unit) = match (size.strip_suffix("KB"), size.strip_suffix("MB")) {
                (Some(digits), _) => (digits, 1 << 10),
                (_, Some(digits)) => (digits, 1 << 20),
                _ => return None,
            };
            let size: u64 = digits.parse().ok()?;
            Some(Mtrr {
                base: u64::from_str_radix(base, 16).ok()?,
                size: size.checked_mul(unit)?,
                kind: line.rsplit(": ").next()?.to_owned(),
            })
        };
        self.lines("mtrr.", parse)
    }

    fn lines<T>(&self, prefix: &str, parse: impl Fn(&str) -> Option<T>) -> Verdict<Vec<T>> {
        self.group(prefix)
            .into_iter()
            .map(|(n, line)| {
                let unreadable = || Outcome::Failed(format!("cannot read {prefix}{n}: {line}"));
                parse(line).ok_or_else(unreadable)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "noise\nFACT cpus_online=2\nFACT cpu.0=package:0 cores:0-1 apicid:3\n\
        FACT iomem.0=00001000-0009fbff : System RAM\n\
        FACT mtrr.0=reg00: base=0x0c0000000 ( 3072MB), size= 1024MB, count=1: uncachable\n";

    #[test]
    fn facts_are_read_by_kind() {
        let facts = Facts::read(OUTPUT);
        assert_eq!(facts.number::<u32>("cpus_online").unwrap(), 2);
        assert_eq!(facts.field("cpu.0", "cores").unwrap(), "0-1");
        assert!(facts.field("cpu.0", "core").is_err());
        let ram = &facts.iomem().unwrap()[0];
        assert_eq!(
            (ram.first, ram.last, ram.owner.as_str()),
            (0x1000, 0x9_fbff, "System RAM")
        );
        let mtrr = &facts.mtrrs().unwrap()[0];
        assert_eq!(
            (mtrr.base, mtrr.size, mtrr.kind.as_str()),
            (0xc000_0000, 1 << 30, "uncachable")
        );
    }

    #[test]
    fn a_missing_or_broken_fact_fails() {
        let facts = Facts::read("FACT mtrr.0=reg00: nonsense\nFACT n=x\n");
        assert!(matches!(facts.get("gone"), Err(Outcome::Failed(_))));
        assert!(facts.mtrrs().is_err());
        assert!(facts.number::<u32>("n").is_err());
    }
}
