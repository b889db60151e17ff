//! A group's files as numbers: `pids.current`, `cpu.stat.usage_usec`, `io.stat.254:0.rbytes`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Files with one number each.
const SINGLE: &[&str] = &[
    "memory.current",
    "memory.peak",
    "memory.swap.current",
    "memory.max",
    "memory.swap.max",
    "pids.current",
    "pids.max",
];
/// Files of lines `key number`.
const FLAT: &[&str] = &["cpu.stat", "memory.stat", "memory.events", "pids.events"];
/// Files of lines `name key=number …`.
const NESTED: &[&str] = &["io.stat", "cpu.pressure", "memory.pressure", "io.pressure"];

pub(super) fn read(group: &Path) -> BTreeMap<String, u64> {
    let text = |file: &str| fs::read_to_string(group.join(file)).unwrap_or_default();
    let mut numbers = BTreeMap::new();
    for file in SINGLE {
        // "max" is no number, and so is not there.
        if let Ok(number) = text(file).trim().parse() {
            numbers.insert((*file).to_owned(), number);
        }
    }
    for file in FLAT {
        for line in text(file).lines() {
            if let Some((key, Ok(number))) = line.split_once(' ').map(|(k, n)| (k, n.parse())) {
                numbers.insert(format!("{file}.{key}"), number);
            }
        }
    }
    for file in NESTED {
        for line in text(file).lines() {
            let mut words = line.split(' ');
            let Some(name) = words.next() else { continue };
            for (key, number) in words.filter_map(|word| word.split_once('=')) {
                if let Ok(number) = number.parse() {
                    numbers.insert(format!("{file}.{name}.{key}"), number);
                }
            }
        }
    }
    numbers
}

/// One number of a file of lines `key number`.
pub(super) fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(have, _)| *have == key)
        .and_then(|(_, number)| number.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_shapes_of_file_are_read() {
        let group = tempfile::tempdir().unwrap();
        for (file, text) in [
            ("pids.current", "7\n"),
            ("pids.max", "max\n"),
            ("cpu.stat", "usage_usec 12\nuser_usec 8\n"),
            ("io.stat", "254:0 rbytes=4096 wbytes=0\n"),
        ] {
            fs::write(group.path().join(file), text).unwrap();
        }
        let numbers = read(group.path());
        assert_eq!(numbers.get("pids.current"), Some(&7));
        assert_eq!(numbers.get("cpu.stat.usage_usec"), Some(&12));
        assert_eq!(numbers.get("io.stat.254:0.rbytes"), Some(&4096));
        assert_eq!(numbers.len(), 5);
        assert_eq!(keyed("oom 1\noom_kill 3\n", "oom_kill"), Some(3));
    }
}
