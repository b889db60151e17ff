//! `cargo xtask setup`: Debian packages that the chores need. Installs those that are missing and
//! nothing else; when none is, it takes a moment.

use std::process::Command;

use anyhow::{Result, bail};

use crate::{debian, sh};

/// What, and for which chore.
const PACKAGES: &[(&str, &str)] = &[
    ("build-essential", "linking, the guest kernel"),
    ("qemu-system-x86", "the lab"),
    ("qemu-system-common", "vhost-user back-ends for tests"),
    ("passt", "tests of networks without privileges"),
    ("kmod", "the lab's modules"),
    ("zstd", "the lab's kernel"),
    ("xz-utils", "the lab's modules, kernel sources"),
    ("lz4", "stock kernels"),
    ("acpica-tools", "ACPI golden files"),
    ("device-tree-compiler", "FDT golden files"),
    ("flex", "the guest kernel"),
    ("bison", "the guest kernel"),
    ("bc", "the guest kernel"),
    ("libelf-dev", "the guest kernel"),
    ("libssl-dev", "the guest kernel"),
    ("mmdebstrap", "the guest userland"),
    ("erofs-utils", "the guest userland, tests of images"),
    (REGISTRY, "tests of images"),
    ("apache2-utils", "tests of images"),
    ("openssl", "tests of images"),
    ("curl", "the demo"),
    ("iproute2", "the demo's network"),
];

/// Its package starts it, for everybody to push to: tests start their own, so that one is kept from
/// starting.
const REGISTRY: &str = "docker-registry";

/// `cargo xtask setup`
#[derive(clap::Args)]
pub struct Args {
    /// Only say what is missing; exit status 1 if anything is.
    #[arg(long)]
    check: bool,
}

/// The chore.
pub fn run(args: &Args) -> Result<()> {
    let missing = missing()?;
    if missing.is_empty() {
        eprintln!("set up: all {} packages are there", PACKAGES.len());
        return Ok(());
    }
    if args.check {
        for (name, purpose) in PACKAGES.iter().filter(|(name, _)| missing.contains(name)) {
            println!("{name}: missing, for {purpose}");
        }
        bail!(
            "{} packages are missing: `cargo xtask setup` installs them",
            missing.len()
        );
    }
    install(&missing)
}

/// Installs what is missing, for chores that are about to need it.
pub fn ensure() -> Result<()> {
    match missing()?.as_slice() {
        [] => Ok(()),
        missing => install(missing),
    }
}

fn install(missing: &[&str]) -> Result<()> {
    let packages = missing.join(" ");
    let words = ["install", "-y", "--no-install-recommends"];
    let Ok(mut apt) = debian::as_root("apt-get") else {
        bail!(
            "packages are missing. Run, as root, and then start again:\n    apt-get update && apt-get {} {packages}",
            words.join(" ")
        );
    };
    eprintln!("installing {packages}");
    if missing.contains(&REGISTRY) {
        // Without systemd nothing starts it.
        let _ = sh::quiet(debian::as_root("systemctl")?.args(["mask", REGISTRY]));
    }
    apt.env("DEBIAN_FRONTEND", "noninteractive")
        .arg("-qq")
        .args(words)
        .args(missing);
    if sh::quiet(&mut apt).is_err() {
        debian::update()?;
        sh::quiet(&mut apt)?;
    }
    Ok(())
}

fn missing() -> Result<Vec<&'static str>> {
    let mut query = Command::new("dpkg-query");
    query
        .args(["-W", "-f=${Package} ${db:Status-Status}\\n"])
        .args(PACKAGES.iter().map(|(name, _)| name));
    // It fails when a package is unknown, and lists the others all the same.
    let Ok(output) = query.output() else {
        bail!("there is no dpkg-query: the chores need Debian 12 (or packages like {PACKAGES:?})")
    };
    Ok(not_listed(&String::from_utf8_lossy(&output.stdout)))
}

fn not_listed(listing: &str) -> Vec<&'static str> {
    let installed = |name: &str| {
        listing.lines().any(|l| {
            l.split_once(' ')
                .is_some_and(|(n, s)| n == name && s == "installed")
        })
    };
    PACKAGES
        .iter()
        .map(|(name, _)| *name)
        .filter(|name| !installed(name))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removed_and_unknown_packages_are_missing() {
        let listing: String = PACKAGES
            .iter()
            .filter(|(name, _)| *name != "bc")
            .map(|(name, _)| {
                let status = if *name == "flex" {
                    "config-files"
                } else {
                    "installed"
                };
                format!("{name} {status}\n")
            })
            .collect();
        assert_eq!(not_listed(&listing), ["flex", "bc"]);
    }
}
