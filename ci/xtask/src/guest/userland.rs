//! A Debian userland for guests: what tests and measurements run besides a kernel. mmdebstrap makes it
//! from the repositories that apt has here, as root or as anybody who may have a user namespace.
//!
//! ```text
//! <entry>/root/            the files, for a shared file system; owned by whoever built it
//! <entry>/userland.erofs   the same as a disk image, owned by root
//! ```
//! EROFS and not ext4: it has no free space and no journal, is read-only whatever the host does, and
//! the same files give the same bytes. Not compressed, for a guest in an emulated host decompresses
//! ten times slower than its disk delivers. The image's UUID is how a guest's init knows its disk.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{Userland, stock};
use crate::cache::Cache;
use crate::{debian, sh};

/// Raised when what is made of the same packages changes.
const RECIPE: &str = "1";
/// Beside what Debian calls essential, and what all of these need.
const PACKAGES: &[&str] = &[
    "acl",
    "attr",
    "e2fsprogs",
    "ethtool",
    "fio",
    "gcc",
    "git",
    "iperf3",
    "iproute2",
    "iputils-ping",
    "kmod",
    "libc6-dev",
    "make",
    "mount",
    "procps",
    "python3",
    "socat",
    "strace",
];
/// What nobody reads in a guest; left out of the archive once all is installed, for maintainer scripts
/// want some of it.
const EXCLUDED: &[&str] = &[
    "./dev/*",
    "./usr/bin/*-lto-dump-*",
    "./usr/lib/gcc/*/lto1",
    "./usr/lib/python3*/idlelib/*",
    "./usr/lib/python3*/lib2to3/*",
    "./usr/lib/python3*/pydoc_data/*",
    "./usr/lib/x86_64-linux-gnu/gconv/*",
    "./usr/lib/x86_64-linux-gnu/gprofng/*",
    "./usr/lib/x86_64-linux-gnu/lib?san.*",
    "./usr/share/doc/*",
    "./usr/share/info/*",
    "./usr/share/locale/*",
    "./usr/share/man/*",
    "./usr/share/zoneinfo/*",
    "./var/lib/dpkg/info/*",
];
/// Of apt here, what apt there needs to reach the same repositories.
const APT_SETTINGS: &[&str] = &[
    "Acquire::Check-Date",
    "Acquire::Check-Valid-Until",
    "Acquire::http::Proxy",
    "Acquire::https::Proxy",
];
/// In the place of what mmdebstrap takes from the machine it runs on.
const FILES: &[(&str, &str)] = &[
    ("etc/hostname", "guest\n"),
    ("etc/hosts", "127.0.0.1 localhost guest\n::1 localhost\n"),
    ("etc/resolv.conf", ""),
];
/// The time of files that the build makes: that of Debian 12's release.
const EPOCH: &str = "1686355200";
/// Known to the guest's init.
const UUID: &str = "7e57ed00-b007-4a11-8e55-0000da7aba5e";

pub(super) fn build(cache: &Cache) -> Result<Userland> {
    let sources = sources()?;
    let versions = debian::versions(PACKAGES)?;
    let modules = stock::modules_input(cache)?;
    let recipe = format!("{RECIPE} {EXCLUDED:?} {FILES:?} {EPOCH} {UUID}");
    let inputs = [&recipe, &sources.suite, &sources.lines, &versions, &modules];
    let entry = cache.entry("guest-userland", &inputs.map(String::as_bytes));
    let dir = entry.get_or_build(|dir| {
        eprintln!(
            "making a Debian userland ({}), a minute or two",
            sources.suite
        );
        let folder = dir.join("root");
        bootstrap(&sources, dir, &folder)?;
        stock::install_modules(cache, &folder, &dir.join("index"))?;
        let mut mkfs = Command::new("mkfs.erofs");
        mkfs.args(["--quiet", "--all-root", "-T", EPOCH, "-U", UUID]);
        sh::quiet(mkfs.arg(dir.join("userland.erofs")).arg(&folder))
    })?;
    Ok(Userland {
        image: dir.join("userland.erofs"),
        folder: dir.join("root"),
    })
}

/// By way of an archive: whoever unpacks it owns the files, and no file is a device.
fn bootstrap(sources: &Sources, dir: &Path, folder: &Path) -> Result<()> {
    let archive = dir.join("userland.tar");
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap
        .env("SOURCE_DATE_EPOCH", EPOCH)
        .args(["--quiet", "--variant=essential", "--format=tar"])
        .arg(format!("--include={}", PACKAGES.join(",")))
        .args(
            apt_settings()?
                .iter()
                .map(|line| format!("--aptopt={line}")),
        )
        .arg(&sources.suite)
        .arg(&archive)
        .args(sources.lines.lines());
    sh::quiet(&mut mmdebstrap)?;
    fs::create_dir(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--no-same-owner"])
        .args(EXCLUDED.iter().map(|path| format!("--exclude={path}")));
    sh::quiet(
        tar.arg("--directory")
            .arg(folder)
            .arg("--file")
            .arg(&archive),
    )?;
    for (name, text) in FILES {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    fs::remove_file(&archive).with_context(|| format!("cannot remove {}", archive.display()))
}

/// Repositories, as `sources.list` has them.
#[derive(Debug, PartialEq, Eq)]
struct Sources {
    suite: String,
    lines: String,
}

/// Debian's own among those that apt has here.
fn sources() -> Result<Sources> {
    let mut indextargets = Command::new("apt-get");
    indextargets.args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE) $(COMPONENT)",
        "Created-By: Packages",
        "Origin: Debian",
    ]);
    let mut listed = sh::read(&mut indextargets)?;
    if listed.is_empty() {
        debian::update()?;
        listed = sh::read(&mut indextargets)?;
    }
    ensure!(
        !listed.is_empty(),
        "apt has no repository of Debian: see /etc/apt/sources.list"
    );
    parse_sources(&listed).context("apt-get indextargets makes no sense")
}

fn parse_sources(listed: &str) -> Option<Sources> {
    let mut lines: Vec<String> = listed.lines().map(|l| format!("deb {l}")).collect();
    lines.sort();
    lines.dedup();
    let releases = listed.lines().filter_map(|l| l.split(' ').nth(1));
    // bookworm, beside bookworm-updates and bookworm-security.
    let suite = releases.min_by_key(|r| r.len())?.to_owned();
    Some(Sources {
        suite,
        lines: lines.join("\n"),
    })
}

fn apt_settings() -> Result<Vec<String>> {
    let dumped = sh::read(Command::new("apt-config").arg("dump").args(APT_SETTINGS))?;
    // A key that is not set is listed as empty, or with the keys below it.
    let set = |line: &&str| {
        line.split_once(' ')
            .is_some_and(|(key, value)| APT_SETTINGS.contains(&key) && value != "\"\";")
    };
    Ok(dumped.lines().filter(set).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_suite_is_the_one_the_others_are_named_after() {
        let listed = "http://d/debian/ bookworm-updates main\nhttp://d/debian/ bookworm main\n\
                      http://s/debian-security/ bookworm-security main";
        let sources = parse_sources(listed).unwrap();
        assert_eq!(sources.suite, "bookworm");
        assert_eq!(sources.lines.lines().count(), 3);
        assert!(sources.lines.contains("deb http://d/debian/ bookworm main"));
        assert_eq!(parse_sources(""), None);
    }
}
