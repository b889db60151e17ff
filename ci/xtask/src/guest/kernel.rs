//! Our guest kernel, from Debian's kernel source package and the symbols in `ci/guest/`.
//!
//! The build leaves the clone alone: source and objects live in the cache's building folder and go
//! when the two images are out. Determined by the symbol list, the source's version and [`RECIPE`].

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, IsTerminal};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Images;
use crate::cache::Cache;
use crate::{debian, sh};

const SOURCE: &str = "linux-source-6.1";
const SYMBOLS: &str = include_str!("../../../guest/kernel-6.1.config");
/// Raised when the steps below change what comes out.
const RECIPE: &[u8] = b"1";
/// Lines that make prints for a whole build; only the progress line depends on it.
const STEPS: usize = 2260;
/// Lines of make's output that the error of a failed build quotes.
const TAIL: usize = 30;
/// What the build needs beyond a C compiler, and the Debian package of each.
const TOOLS: [(&str, &str); 7] = [
    ("make", "make"),
    ("gcc", "gcc"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("lz4c", "lz4"),
    ("xz", "xz-utils"),
];

pub(super) fn build(cache: &Cache) -> Result<Images> {
    let source = debian::unpacked(cache, SOURCE)?;
    // The folder's name is made of the package's name and version.
    let version = source.file_name().context("the cache entry has no name")?;
    let entry = cache.entry(
        "guest-kernel",
        &[SYMBOLS.as_bytes(), version.as_encoded_bytes(), RECIPE],
    );
    let dir = entry.get_or_build(|dir| {
        let archive = source.join(format!("usr/src/{SOURCE}.tar.xz"));
        compile(&archive, dir)
    })?;
    Ok(Images {
        bzimage: dir.join("bzImage"),
        vmlinux: dir.join("vmlinux"),
    })
}

fn compile(archive: &Path, dir: &Path) -> Result<()> {
    require_tools()?;
    let (source, objects) = (dir.join("source"), dir.join("objects"));
    for path in [&source, &objects] {
        fs::create_dir(path).with_context(|| format!("cannot create {}", path.display()))?;
    }
    eprintln!("guest kernel: unpacking {}", archive.display());
    sh::quiet(
        Command::new("tar")
            .args(["--strip-components=1", "-xJf"])
            .arg(archive)
            .arg("-C")
            .arg(&source),
    )?;
    let symbols = dir.join("symbols");
    fs::write(&symbols, SYMBOLS).context("cannot write the symbol list")?;
    let make = || {
        let mut command = Command::new("make");
        command.arg("-C").arg(&source);
        command.arg(format!("O={}", objects.display()));
        command.env("KCONFIG_ALLCONFIG", &symbols);
        for (name, value) in [
            ("KBUILD_BUILD_TIMESTAMP", "1970-01-01"),
            ("KBUILD_BUILD_USER", "testudo"),
            ("KBUILD_BUILD_HOST", "testudo"),
        ] {
            command.env(name, value);
        }
        command
    };
    sh::quiet(make().arg("allnoconfig"))?;
    let config = fs::read_to_string(objects.join(".config")).context("make left no .config")?;
    let differing = disagreements(SYMBOLS, &config);
    if !differing.is_empty() {
        bail!(
            "ci/guest/kernel-6.1.config asks for what {SOURCE} does not give:\n{}",
            differing.join("\n")
        );
    }
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    watched(make().arg(format!("-j{jobs}")).args(["bzImage", "vmlinux"]))?;
    fs::copy(objects.join("arch/x86/boot/bzImage"), dir.join("bzImage"))
        .context("the build left no bzImage")?;
    fs::copy(objects.join(".config"), dir.join("config")).context("cannot keep the .config")?;
    // Sections that are loaded stay, the PVH note among them.
    sh::quiet(
        Command::new("strip")
            .args(["--strip-all", "-R", ".comment", "-o"])
            .arg(dir.join("vmlinux"))
            .arg(objects.join("vmlinux")),
    )?;
    for path in [&source, &objects] {
        fs::remove_dir_all(path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

fn require_tools() -> Result<()> {
    let missing: Vec<&str> = TOOLS
        .iter()
        .filter(|(tool, _)| !sh::works("sh", &["-c", &format!("command -v {tool}")]))
        .map(|(_, package)| *package)
        .chain(
            [
                ("/usr/include/libelf.h", "libelf-dev"),
                ("/usr/include/openssl/ssl.h", "libssl-dev"),
            ]
            .into_iter()
            .filter(|(header, _)| !Path::new(header).exists())
            .map(|(_, package)| package),
        )
        .collect();
    if !missing.is_empty() {
        bail!(
            "the guest kernel's build needs: apt-get install {}",
            missing.join(" ")
        );
    }
    Ok(())
}

/// Lines of the symbol list that the configuration does not have, with what it has instead.
fn disagreements(symbols: &str, config: &str) -> Vec<String> {
    let mut found = Vec::new();
    for wanted in symbols.lines() {
        let (name, holds) = if let Some(rest) = wanted.strip_prefix("# CONFIG_") {
            let Some(name) = rest.strip_suffix(" is not set") else {
                continue;
            };
            let is_set = format!("CONFIG_{name}=");
            (name, !config.lines().any(|l| l.starts_with(&is_set)))
        } else if let Some((name, _)) = wanted
            .strip_prefix("CONFIG_")
            .and_then(|rest| rest.split_once('='))
        {
            (name, config.lines().any(|l| l == wanted))
        } else {
            continue;
        };
        if !holds {
            let (set, unset) = (format!("CONFIG_{name}="), format!("# CONFIG_{name} "));
            let have = config
                .lines()
                .find(|l| l.starts_with(&set) || l.starts_with(&unset))
                .unwrap_or("nothing: no such symbol, or what it depends on is off");
            found.push(format!("  wanted {wanted}, got {have}"));
        }
    }
    found
}

/// Runs make with a progress line on stderr; the tail of its output is in the error of a failure.
fn watched(command: &mut Command) -> Result<()> {
    let started = Instant::now();
    let every = if std::io::stderr().is_terminal() {
        Duration::from_secs(1)
    } else {
        Duration::from_secs(20)
    };
    let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
    let line = sh::line(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer.try_clone().context("cannot share a pipe")?)
        .stderr(writer)
        .spawn()
        .with_context(|| format!("cannot start `{line}`"))?;
    // The command keeps its copies of the pipe's end, without which reading would not end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut tail = VecDeque::new();
    let mut done = 0_usize;
    let mut shown: Option<Instant> = None;
    for said in BufReader::new(reader).split(b'\n') {
        let said = said.context("cannot read what make prints")?;
        done += 1;
        if tail.len() == TAIL {
            tail.pop_front();
        }
        tail.push_back(String::from_utf8_lossy(&said).into_owned());
        if shown.is_none_or(|at| at.elapsed() >= every) {
            shown = Some(Instant::now());
            progress(done, started, "\r");
        }
    }
    let status = child.wait().with_context(|| format!("lost `{line}`"))?;
    progress(done, started, "\n");
    if !status.success() {
        let tail: Vec<String> = tail.into();
        bail!("`{line}` failed: {status}\n{}", tail.join("\n"));
    }
    Ok(())
}

fn progress(done: usize, started: Instant, end: &str) {
    let percent = (done * 100 / STEPS).min(100);
    let seconds = started.elapsed().as_secs();
    let end = if std::io::stderr().is_terminal() {
        end
    } else {
        "\n"
    };
    eprint!(
        "guest kernel: building, {percent:3} %, {seconds} s (about 5 minutes on 2 idle cores){end}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_symbol_that_did_not_come_is_named_with_what_came() {
        let symbols =
            "# words\nCONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\nCONFIG_NR=4\nCONFIG_D=y\n";
        let config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=y\nCONFIG_NR=8\n";
        let found = disagreements(symbols, config);
        assert_eq!(found.len(), 4);
        assert!(found[0].contains("CONFIG_B=y, got # CONFIG_B is not set"));
        assert!(found[1].contains("# CONFIG_C is not set, got CONFIG_C=y"));
        assert!(found[2].contains("CONFIG_NR=4, got CONFIG_NR=8"));
        assert!(found[3].contains("CONFIG_D=y, got nothing"));
    }

    #[test]
    fn a_list_that_was_met_is_silent() {
        let config = "CONFIG_A=y\nCONFIG_AB=m\n# CONFIG_C is not set\n";
        assert!(
            disagreements(
                "CONFIG_A=y\n# CONFIG_C is not set\n# CONFIG_GONE is not set\n",
                config
            )
            .is_empty()
        );
    }

    #[test]
    fn our_list_is_read_whole() {
        let asked = SYMBOLS
            .lines()
            .filter(|l| l.starts_with("CONFIG_") || l.ends_with(" is not set"))
            .count();
        assert_eq!(
            disagreements(SYMBOLS, "").len(),
            asked - SYMBOLS.matches(" is not set").count()
        );
    }

    #[test]
    fn a_failed_build_is_quoted() {
        let error =
            watched(Command::new("sh").args(["-c", "echo one; echo two >&2; exit 2"])).unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("one") && text.contains("two") && text.contains("exit status: 2"),
            "{text}"
        );
    }
}
