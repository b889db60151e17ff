//! Compiles the system call profiles in `seccomp/` to BPF, one `kill` and one `log` variant each.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a build script fails by panicking"
)]

#[path = "build/tree.rs"]
mod tree;

use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

use seccompiler::sock_filter;

/// Functions that the standard library refers to weakly, to do without them on an old libc. When
/// fat LTO merges such a reference with one of ours, nothing pulls the function out of a static
/// libc any more and the call goes to address 0. Naming them to the linker pulls them.
const WEAK_IN_STD: [&str; 6] = [
    "copy_file_range",
    "getrandom",
    "gettid",
    "statx",
    "preadv2",
    "pwritev2",
];

fn main() {
    let features = env::var("CARGO_CFG_TARGET_FEATURE").unwrap_or_default();
    if features.split(',').any(|f| f == "crt-static") {
        for function in WEAK_IN_STD {
            println!("cargo::rustc-link-arg-bins=-Wl,--undefined={function}");
        }
    }
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets the architecture");
    let target = arch.as_str().try_into().unwrap_or_else(|_| {
        panic!("seccompiler knows no system calls of {arch}: there are no filters for it yet")
    });
    println!("cargo::rerun-if-changed=seccomp");
    println!("cargo::rerun-if-changed=build");
    let mut threads: Vec<String> = fs::read_dir("seccomp")
        .expect("the profiles are in the package")
        .filter_map(|entry| {
            let path = entry.expect("a folder can be listed").path();
            let json = path.extension().is_some_and(|e| e == "json");
            json.then(|| path.file_stem()?.to_str().map(str::to_owned))?
        })
        .collect();
    threads.sort();
    let (mut searching, mut linear) = (Table::default(), Table::default());
    for thread in &threads {
        let path = format!("seccomp/{thread}.json");
        println!("cargo::rerun-if-changed={path}");
        let text = fs::read_to_string(&path).expect("the profile is in the package");
        let [kill, log] = ["kill_process", "log"].map(|action| {
            let text = text.replacen("\"kill_process\"", &format!("\"{action}\""), 1);
            let mut filters = seccompiler::compile_from_json(text.as_bytes(), target)
                .unwrap_or_else(|error| panic!("{path}: {error}"));
            filters
                .remove(thread)
                .unwrap_or_else(|| panic!("{path}: no `{thread}`"))
        });
        searching.add(thread, &tree::search(&kill), &tree::search(&log));
        linear.add(thread, &kill, &log);
    }
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let write = |name: &str, table: &Table| {
        fs::write(Path::new(&out).join(name), table.code()).expect("OUT_DIR is writable");
    };
    write("seccomp.rs", &searching);
    // What the tests hold the others against.
    write("seccomp_linear.rs", &linear);
}

/// Rust code of a table of profiles.
#[derive(Default)]
struct Table {
    programs: String,
    rows: String,
}

impl Table {
    fn add(&mut self, thread: &str, kill_process: &[sock_filter], log: &[sock_filter]) {
        let kill_process = self.program(thread, "kill_process", kill_process);
        let log = self.program(thread, "log", log);
        writeln!(
            self.rows,
            "    Profile {{ name: {thread:?}, kill_process: &{kill_process}, log: &{log} }},"
        )
        .expect("a string takes all");
    }

    fn program(&mut self, thread: &str, action: &str, program: &[sock_filter]) -> String {
        let name = format!("{thread}_{action}")
            .replace('-', "_")
            .to_uppercase();
        let len = program.len();
        writeln!(self.programs, "static {name}: [Instruction; {len}] = [")
            .expect("a string takes all");
        for i in program {
            writeln!(
                self.programs,
                "    ({}, {}, {}, {}),",
                i.code, i.jt, i.jf, i.k
            )
            .expect("a string takes all");
        }
        self.programs.push_str("];\n");
        name
    }

    fn code(&self) -> String {
        let Self { programs, rows } = self;
        format!("{programs}pub(super) static PROFILES: &[Profile] = &[\n{rows}];\n")
    }
}
