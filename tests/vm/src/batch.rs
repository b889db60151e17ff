//! The tables: which tests there are, and in what kind of lab each batch of them runs.

use std::time::Duration;

use serde::Serialize;

use crate::context::Ctx;
use crate::outcome::Verdict;
use crate::tests;

/// One test.
#[derive(Clone, Copy)]
pub struct Test {
    /// `area::what_holds`.
    pub name: &'static str,
    /// What it does.
    pub run: fn(&Ctx) -> Verdict,
    /// When it is over. Emulated hosts are slow and share a busy machine, so this is generous.
    pub limit: Duration,
}

impl Test {
    /// A test with the usual limit.
    pub(crate) const fn new(name: &'static str, run: fn(&Ctx) -> Verdict) -> Test {
        Test {
            name,
            run,
            limit: Duration::from_secs(120),
        }
    }

    /// With another limit.
    pub(crate) const fn seconds(mut self, seconds: u64) -> Test {
        self.limit = Duration::from_secs(seconds);
        self
    }
}

/// Tests that share one boot of the lab, and what that lab has to be.
#[derive(Serialize)]
pub struct Batch {
    /// Given to `--batch`.
    pub batch: &'static str,
    /// CPUs of the lab.
    pub cpus: u32,
    /// Memory of the lab, such as `4G`.
    pub memory: &'static str,
    /// 2-MiB pages set aside in it.
    pub hugepages: u64,
    /// Seconds until the whole lab is ended.
    pub timeout: u64,
    /// The tests, in order.
    #[serde(skip)]
    pub tests: fn() -> Vec<Test>,
}

/// What runs in labs.
pub const BATCHES: [Batch; 6] = [
    Batch {
        batch: "run",
        cpus: 1,
        memory: "3G",
        hugepages: 0,
        timeout: 1800,
        tests: || tests::run::TESTS.to_vec(),
    },
    Batch {
        batch: "boot",
        cpus: 1,
        memory: "4G",
        hugepages: 160,
        timeout: 1800,
        tests: || [tests::boot::TESTS, tests::cpus::TESTS, tests::memory::TESTS].concat(),
    },
    Batch {
        batch: "behaviour",
        cpus: 1,
        memory: "2G",
        hugepages: 0,
        timeout: 1800,
        tests: || {
            [
                tests::bad_input::TESTS,
                tests::ending::TESTS,
                tests::console::TESTS,
                tests::control::TESTS,
                tests::isolation::TESTS,
                tests::config::TESTS,
            ]
            .concat()
        },
    },
    Batch {
        batch: "devices",
        cpus: 1,
        memory: "4G",
        hugepages: 0,
        timeout: 2400,
        tests: || {
            [
                tests::userland::TESTS,
                &tests::blk::tests(),
                tests::pmem::TESTS,
                tests::mem::TESTS,
                tests::balloon::TESTS,
                tests::watchdog::TESTS,
            ]
            .concat()
        },
    },
    Batch {
        batch: "sharing",
        cpus: 1,
        memory: "4G",
        hugepages: 0,
        timeout: 2400,
        tests: || {
            [
                tests::vsock::TESTS,
                tests::vhost_user::TESTS,
                tests::net::TESTS,
                tests::fs::TESTS,
                tests::ports::TESTS,
            ]
            .concat()
        },
    },
    Batch {
        batch: "agent",
        cpus: 1,
        memory: "3G",
        hugepages: 0,
        timeout: 2400,
        tests: tests::agent::tests,
    },
];

/// The harness tests itself, anywhere and without a VMM. Not in [`BATCHES`].
pub const SELF_TEST: &str = "self-test";

/// The tests of a batch.
pub fn tests_of(name: &str) -> Option<Vec<Test>> {
    if name == SELF_TEST {
        return Some(tests::harness::TESTS.to_vec());
    }
    BATCHES
        .iter()
        .find(|b| b.batch == name)
        .map(|b| (b.tests)())
}

#[cfg(test)]
mod check {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_say_their_area() {
        let mut seen = HashSet::new();
        for batch in &BATCHES {
            let tests = (batch.tests)();
            let limits: u64 = tests.iter().map(|t| t.limit.as_secs()).max().unwrap_or(0);
            assert!(limits < batch.timeout);
            for test in tests {
                assert!(seen.insert(test.name), "{} twice", test.name);
                assert!(test.name.contains("::"), "{}", test.name);
            }
        }
    }
}
