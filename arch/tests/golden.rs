//! The plans of a few shapes of machine, as JSON kept in `golden/`. A change there is a change of
//! what guests see: run with `UPDATE_GOLDEN=1` to write the files anew, and look at the difference.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test: a failure is a panic"
)]

use std::path::Path;

use serde::Serialize;
use testudo_arch::x86_64::mtrr::{self, KVM_VARIABLE_RANGES};
use testudo_arch::x86_64::{MapRequest, MemoryMap, MtrrPlan};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

#[derive(Serialize)]
struct Plan {
    memory: MemoryMap,
    mtrr: MtrrPlan,
    msrs: Vec<String>,
}

fn check(name: &str, ram_bytes: u64, guest_phys_bits: u8, hotplug_bytes: u64) {
    let request = MapRequest {
        ram_bytes,
        guest_phys_bits,
        hotplug_bytes,
    };
    let memory = MemoryMap::plan_with(&request).unwrap();
    let mtrr = mtrr::plan(&memory, guest_phys_bits, KVM_VARIABLE_RANGES).unwrap();
    let msrs = mtrr
        .msrs()
        .iter()
        .map(|(index, value)| format!("{index:#x}={value:#x}"))
        .collect();
    let plan = Plan { memory, mtrr, msrs };
    let text = serde_json::to_string_pretty(&plan).unwrap() + "\n";

    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let path = directory.join(format!("{name}.json"));
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &text).expect("the golden file can be written");
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        golden == text,
        "{} is not what is planned now:\n{text}",
        path.display()
    );
}

#[test]
fn least() {
    check("32m-36bits", 32 * MIB, 36, 0);
}

#[test]
fn small() {
    check("256m-40bits", 256 * MIB, 40, 0);
}

#[test]
fn exactly_up_to_the_hole() {
    check("2g-46bits", 2 * GIB, 46, 0);
}

#[test]
fn beyond_the_hole() {
    check("5g-40bits", 5 * GIB, 40, 0);
}

#[test]
fn room_for_more() {
    check("64g-46bits-hotplug-192g", 64 * GIB, 46, 192 * GIB);
}

#[test]
fn most() {
    check("1t-52bits", 1024 * GIB, 52, 0);
}
