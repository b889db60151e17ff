//! Crates' own tests against /dev/kvm, run in the lab: on a machine without one they pass unseen, so
//! here they are run where it is real.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;
use testudo_lab::{Kit, LabSpec};

use super::lab_run::{Ran, run_in_lab};
use super::tally::Tally;
use crate::lab::Out;
use crate::{sh, workspace};

/// Package, which of its test programs, and which of that program's tests.
const TESTS: &[(&str, &[&str], &str)] = &[
    ("testudo-kvm", &["--test", "guest"], ""),
    ("testudo-arch", &["--lib"], "host::"),
];
/// Many eventfds; then runs each program with its filter; the status says whether all passed.
const SCRIPT: &str = "ulimit -n 65536; status=0; while [ $# -gt 1 ]; do \"$1\" --test-threads=1 $2 || status=1; shift 2; done; exit $status";
/// The batch's name.
pub const BATCH: &str = "kvm";

/// Builds the programs here, runs them in one lab.
pub fn run(labs: &Kit) -> Result<Tally> {
    let root = workspace::root()?;
    let out = Out::claim(&root, Some(&root.join("out/test").join(BATCH)))?;
    let mut command: Vec<String> = ["sh", "-c", SCRIPT, "sh"].map(str::to_owned).to_vec();
    for (package, which, filter) in TESTS {
        for program in build(&root, package, which)? {
            let program = program
                .to_str()
                .context("a test program's path is not UTF-8")?
                .to_owned();
            command.extend([program, (*filter).to_owned()]);
        }
    }
    let programs = (command.len() - 4) / 2;
    println!("-- batch {BATCH}: {programs} programs of crates that use /dev/kvm");
    let spec = LabSpec::new(root, out.path.clone(), command);
    Ok(match run_in_lab(labs, &spec, BATCH, 2) {
        Ok(Ran { status, said }) => {
            let results: Vec<Tally> = said.lines().filter_map(Tally::libtest).collect();
            let mut tally = Tally::default();
            for more in &results {
                tally += *more;
            }
            let complete = results.len() == programs && (status == 0) == (tally.failed == 0);
            if !complete {
                println!(
                    "FAIL {BATCH}: {} of {programs} programs came to an end (status {status})",
                    results.len()
                );
                tally += Tally::FAILED;
            }
            tally
        }
        Err(error) => {
            println!("FAIL {BATCH}: {:#}", anyhow::Error::from(error));
            Tally::FAILED
        }
    })
}

fn build(root: &Path, package: &str, which: &[&str]) -> Result<Vec<PathBuf>> {
    let mut command = workspace::cargo();
    command
        .current_dir(root)
        .args(["test", "--quiet", "--no-run", "--message-format=json"]);
    command.args(["--package", package]).args(which);
    let messages = sh::read(&mut command)?;
    let programs: Vec<PathBuf> = messages.lines().filter_map(program).collect();
    anyhow::ensure!(
        !programs.is_empty(),
        "cargo built no test program of {package}"
    );
    Ok(programs)
}

/// The test program that a message of cargo's announces.
fn program(message: &str) -> Option<PathBuf> {
    #[derive(Deserialize)]
    struct Message {
        executable: Option<PathBuf>,
        profile: Option<Profile>,
    }
    #[derive(Deserialize)]
    struct Profile {
        test: bool,
    }
    let message: Message = serde_json::from_str(message).ok()?;
    message
        .executable
        .filter(|_| message.profile.is_some_and(|p| p.test))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_test_programs_are_taken() {
        let test =
            r#"{"reason":"compiler-artifact","profile":{"test":true},"executable":"/t/guest-1"}"#;
        assert_eq!(program(test), Some(PathBuf::from("/t/guest-1")));
        for other in [
            r#"{"reason":"compiler-artifact","profile":{"test":false},"executable":"/t/x"}"#,
            r#"{"reason":"compiler-artifact","profile":{"test":true},"executable":null}"#,
            r#"{"reason":"build-finished","success":true}"#,
            "not JSON",
        ] {
            assert_eq!(program(other), None);
        }
    }
}
