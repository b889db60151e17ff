//! Compiles the system call profiles in `seccomp/` to BPF, one `kill` and one `log` variant each.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "a build script fails by panicking"
)]

use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

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
    let mut threads: Vec<String> = fs::read_dir("seccomp")
        .expect("the profiles are in the package")
        .filter_map(|entry| {
            let path = entry.expect("a folder can be listed").path();
            let json = path.extension().is_some_and(|e| e == "json");
            json.then(|| path.file_stem()?.to_str().map(str::to_owned))?
        })
        .collect();
    threads.sort();
    let mut code = String::new();
    let mut table = String::from("pub(super) static PROFILES: &[Profile] = &[\n");
    for thread in &threads {
        let path = format!("seccomp/{thread}.json");
        println!("cargo::rerun-if-changed={path}");
        let text = fs::read_to_string(&path).expect("the profile is in the package");
        write!(table, "    Profile {{ name: {thread:?}").expect("a string takes all");
        for action in ["kill_process", "log"] {
            let text = text.replacen("\"kill_process\"", &format!("\"{action}\""), 1);
            let filters = seccompiler::compile_from_json(text.as_bytes(), target)
                .unwrap_or_else(|error| panic!("{path}: {error}"));
            let program = filters
                .get(thread)
                .unwrap_or_else(|| panic!("{path}: no `{thread}`"));
            let name = format!("{thread}_{action}")
                .replace('-', "_")
                .to_uppercase();
            writeln!(code, "static {name}: [Instruction; {}] = [", program.len())
                .expect("a string takes all");
            for i in program {
                writeln!(code, "    ({}, {}, {}, {}),", i.code, i.jt, i.jf, i.k)
                    .expect("a string takes all");
            }
            code.push_str("];\n");
            write!(table, ", {action}: &{name}").expect("a string takes all");
        }
        table.push_str(" },\n");
    }
    code.push_str(&table);
    code.push_str("];\n");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    fs::write(Path::new(&out).join("seccomp.rs"), code).expect("OUT_DIR is writable");
}
