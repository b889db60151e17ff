//! Places in the checkout, and building its packages for the lab and for guests.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::sh;

/// Everything that is run outside the build: static, so that it also runs in a bare guest. Named
/// explicitly, so that build scripts stay as they are.
pub const TARGET: &str = "x86_64-unknown-linux-gnu";
const STATIC: &str =
    r#"target.x86_64-unknown-linux-gnu.rustflags=["-Ctarget-feature=+crt-static"]"#;

/// The checkout this tool was built from.
pub fn root() -> Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = here
        .ancestors()
        .nth(2)
        .context("xtask is not in ci/xtask")?;
    root.canonicalize()
        .with_context(|| format!("{} is gone: build xtask anew", root.display()))
}

/// The cargo that runs us.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // What `cargo run` sets for us is not meant for the cargo we start.
    for (name, _) in std::env::vars_os() {
        let ours = name
            .to_str()
            .is_some_and(|n| n.starts_with("CARGO_PKG_") || n.starts_with("CARGO_MANIFEST_"));
        if ours {
            command.env_remove(name);
        }
    }
    command
}

/// What runs in every guest: with musl it has half the size, and without a place of its own to be moved to
/// it has no relocations to make pages its own.
const SMALL_TARGET: &str = "x86_64-unknown-linux-musl";
const SMALL: &str = r#"target.x86_64-unknown-linux-musl.rustflags=["-Crelocation-model=static"]"#;

/// Builds a binary, statically linked; returns its path.
pub fn static_binary(package: &str, binary: &str, profile: &str) -> Result<PathBuf> {
    built(package, binary, profile, TARGET, STATIC)
}

/// Builds a binary, statically linked and as small as can be; returns its path.
pub fn small_binary(package: &str, binary: &str, profile: &str) -> Result<PathBuf> {
    built(package, binary, profile, SMALL_TARGET, SMALL)
}

fn built(
    package: &str,
    binary: &str,
    profile: &str,
    target: &str,
    config: &str,
) -> Result<PathBuf> {
    let root = root()?;
    let mut command = cargo();
    command
        .current_dir(&root)
        .args(["build", "--quiet", "--config", config]);
    command.args([
        "--target",
        target,
        "--profile",
        profile,
        "--package",
        package,
        "--bin",
        binary,
    ]);
    sh::live(&mut command)?;
    let profile_dir = if profile == "dev" { "debug" } else { profile };
    Ok(target_dir(&root)
        .join(target)
        .join(profile_dir)
        .join(binary))
}

/// Where cargo puts what it builds.
pub fn target_dir(root: &Path) -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => root.join(dir),
        None => root.join("target"),
    }
}

/// A binary of the workspace.
pub struct Binary {
    pub package: String,
    pub name: String,
    /// The package's folder, relative to the checkout.
    pub folder: PathBuf,
}

/// All binaries of all members.
pub fn binaries() -> Result<Vec<Binary>> {
    let root = root()?;
    let mut command = cargo();
    command
        .current_dir(&root)
        .args(["metadata", "--no-deps", "--format-version=1"]);
    let metadata: Metadata =
        serde_json::from_str(&sh::read(&mut command)?).context("cargo metadata makes no sense")?;
    Ok(listed(&root, &metadata))
}

fn listed(root: &Path, metadata: &Metadata) -> Vec<Binary> {
    let mut binaries = Vec::new();
    for package in &metadata.packages {
        let folder = package
            .manifest_path
            .parent()
            .and_then(|p| p.strip_prefix(root).ok());
        for target in package
            .targets
            .iter()
            .filter(|t| t.kind.iter().any(|k| k == "bin"))
        {
            binaries.push(Binary {
                package: package.name.clone(),
                name: target.name.clone(),
                folder: folder.unwrap_or(Path::new("")).to_owned(),
            });
        }
    }
    binaries
}

#[derive(serde::Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(serde::Deserialize)]
struct Package {
    name: String,
    manifest_path: PathBuf,
    targets: Vec<Target>,
}

#[derive(serde::Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binaries_are_listed_with_their_folders() {
        let json = r#"{"packages": [{"name": "testudo-vmm", "manifest_path": "/w/vmm/Cargo.toml",
            "targets": [{"name": "testudo_vmm", "kind": ["lib"]}, {"name": "testudo-vmm", "kind": ["bin"]}]}]}"#;
        let binaries = listed(Path::new("/w"), &serde_json::from_str(json).unwrap());
        assert_eq!(binaries.len(), 1);
        assert_eq!(
            (binaries[0].name.as_str(), binaries[0].folder.to_str()),
            ("testudo-vmm", Some("vmm"))
        );
    }
}
