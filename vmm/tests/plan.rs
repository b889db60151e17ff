//! Golden plans: what `testudo-vmm plan --json` prints for machines of several shapes, on a host
//! that is written down here. `UPDATE_GOLDEN=1 cargo test -p testudo-vmm` writes them anew.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::path::Path;

use testudo_vmm::host::HostFacts;
use testudo_vmm::plan::Plan;
use testudo_vmm::spec::Config;

const HOST: HostFacts = HostFacts {
    guest_phys_bits: 46,
    mtrr_slots: 8,
    max_vcpus: 1024,
    max_vcpu_id: 4096,
};

fn plan(json: &str) -> Result<Plan, String> {
    let spec = Config::from_json(json).unwrap().check().unwrap();
    Plan::new(&spec, HOST).map_err(|e| e.to_string())
}

fn golden(name: &str, json: &str) {
    let planned = serde_json::to_string_pretty(&plan(json).unwrap()).unwrap() + "\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(format!("x86_64-{name}.json"));
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &planned).unwrap();
    }
    let written = std::fs::read_to_string(&path)
        .unwrap_or_else(|e| panic!("{}: {e}; write it with UPDATE_GOLDEN=1", path.display()));
    assert!(
        planned == written,
        "{} is not what is planned now; if the change is meant, write it anew with \
         UPDATE_GOLDEN=1.\n{planned}",
        path.display()
    );
}

#[test]
fn least() {
    golden(
        "1cpu-256m",
        r#"{"boot":{"kernel":"/k","cmdline":"console=ttyS0"}}"#,
    );
}

#[test]
fn above_the_hole() {
    golden(
        "4cpu-5g",
        r#"{"boot":{"kernel":"/k","initrd":"/i"},"memory":{"size":"5G"},
            "cpus":{"count":4,"affinity":[{"cpu":1,"host":"2-3"}]}}"#,
    );
}

#[test]
fn large_without_devices() {
    golden(
        "12cpu-64g",
        r#"{"boot":{"kernel":"/k"},"memory":{"size":"64G"},"rng":{"enabled":false},"balloon":{"enabled":false},
            "cpus":{"count":12,"topology":{"sockets":2,"cores":3,"threads":2},"phys_bits":40}}"#,
    );
}

#[test]
fn what_the_host_cannot_do_is_said() {
    for (extra, says) in [
        (
            r#""cpus":{"phys_bits":48}"#,
            "48 physical address bits: this host's KVM maps 46",
        ),
        (
            r#""memory":{"size":"1T"},"cpus":{"phys_bits":40}"#,
            "address",
        ),
    ] {
        let error = plan(&format!(r#"{{"boot":{{"kernel":"/k"}},{extra}}}"#)).unwrap_err();
        assert!(error.contains(says), "{extra}: {error}");
    }
}
