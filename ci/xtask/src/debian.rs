//! Debian packages fetched and unpacked without being installed: the kernels of the lab and of its
//! guests, and kernel sources. Keyed by name and version in the [`Cache`].

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cache::Cache;
use crate::sh;

/// An answer of apt's is taken for true this long.
const ASK_AGAIN: Duration = Duration::from_secs(24 * 3600);

/// `cargo xtask package NAME`
#[derive(clap::Args)]
pub struct Args {
    /// A package, or a meta package such as linux-image-6.12-amd64.
    name: String,
}

pub fn run(args: &Args) -> Result<()> {
    println!("{}", unpacked(&Cache::open()?, &args.name)?.display());
    Ok(())
}

/// The lab's own kernel: the full image, which has 9p and every device module.
pub const LAB_KERNEL: &str = "linux-image-6.12-amd64";
/// The guest that most tests boot: Debian's stock cloud kernel (6.1).
pub const CLOUD_KERNEL: &str = "linux-image-cloud-amd64";

/// A Debian kernel package, unpacked.
pub struct Kernel {
    /// `uname -r`.
    pub release: String,
    /// The bzImage.
    pub image: PathBuf,
    /// `lib/modules/<release>`.
    pub modules: PathBuf,
}

/// Fetches and unpacks a kernel image package or the meta package naming one.
pub fn kernel(cache: &Cache, package: &str) -> Result<Kernel> {
    let root = unpacked(cache, package)?;
    let boot = root.join("boot");
    let release = std::fs::read_dir(&boot)
        .with_context(|| format!("{package} has no /boot"))?
        .flatten()
        .find_map(|e| {
            e.file_name()
                .to_str()?
                .strip_prefix("vmlinuz-")
                .map(str::to_owned)
        })
        .with_context(|| format!("{package} has no vmlinuz in {}", boot.display()))?;
    Ok(Kernel {
        image: boot.join(format!("vmlinuz-{release}")),
        modules: root.join("lib/modules").join(&release),
        release,
    })
}

/// The package's files, unpacked into the cache.
pub fn unpacked(cache: &Cache, package: &str) -> Result<PathBuf> {
    let keyed = |found: &Resolved| {
        let key = [found.name.as_bytes(), found.version.as_bytes()];
        cache.entry(&format!("deb-{package}"), &key)
    };
    // Asking apt takes seconds; once a day is enough as long as the answer is still there.
    let note = cache.note(&format!("deb-{package}"));
    if let Some(dir) = note
        .read(ASK_AGAIN)
        .and_then(|text| Some(keyed(&Resolved::parse(&text)?)))
        .and_then(|entry| entry.get())
    {
        return Ok(dir);
    }
    let found = resolve(package)?;
    let dir = keyed(&found).get_or_build(|dir| {
        let Resolved { name, version } = &found;
        eprintln!("fetching {name} {version}");
        let deb = download(dir, name, version)?;
        sh::quiet(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(dir))?;
        std::fs::remove_file(&deb).with_context(|| format!("cannot remove {}", deb.display()))
    })?;
    note.write(&format!("{} {}", found.name, found.version));
    Ok(dir)
}

fn download(dir: &Path, name: &str, version: &str) -> Result<PathBuf> {
    let wanted = format!("{name}={version}");
    let get = || {
        sh::quiet(
            Command::new("apt-get")
                .args(["-qq", "download", &wanted])
                .current_dir(dir),
        )
    };
    // apt drops to the user _apt where it can; a folder it may not write to is only a warning.
    if get().is_err() {
        update()?;
        get()?;
    }
    std::fs::read_dir(dir)?
        .flatten()
        .map(|e| e.path())
        .find(|p| p.extension().is_some_and(|e| e == "deb"))
        .with_context(|| format!("apt-get download {wanted} left no .deb"))
}

/// A package and the version apt would install.
struct Resolved {
    name: String,
    version: String,
}

impl Resolved {
    fn parse(text: &str) -> Option<Resolved> {
        let (name, version) = text.split_once(' ')?;
        Some(Resolved {
            name: name.to_owned(),
            version: version.to_owned(),
        })
    }
}

fn resolve(package: &str) -> Result<Resolved> {
    if let Some(found) = lookup(package)? {
        return Ok(found);
    }
    update()?;
    match lookup(package)? {
        Some(found) => Ok(found),
        None => {
            bail!("apt knows no package {package}: is this Debian 12 with its main repository?")
        }
    }
}

fn lookup(package: &str) -> Result<Option<Resolved>> {
    let show = |name: &str| -> Result<Option<String>> {
        let mut command = Command::new("apt-cache");
        command
            .args(["show", "--no-all-versions", name])
            .env("LC_ALL", "C");
        let output = command
            .output()
            .context("cannot start apt-cache: this needs Debian")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(output
            .status
            .success()
            .then_some(text)
            .filter(|t| !t.is_empty()))
    };
    let Some(about) = show(package)? else {
        return Ok(None);
    };
    let (name, about) = match real_package(package, &about) {
        Some(real) => match show(&real)? {
            Some(about) => (real, about),
            None => return Ok(None),
        },
        None => (package.to_owned(), about),
    };
    let version = field(&about, "Version")
        .with_context(|| format!("apt-cache shows no version of {name}"))?;
    Ok(Some(Resolved {
        name,
        version: version.to_owned(),
    }))
}

/// The versions that apt would install of these packages, one line each.
pub fn versions(packages: &[&str]) -> Result<String> {
    let ask = || {
        let mut policy = Command::new("apt-cache");
        policy.arg("policy").args(packages).env("LC_ALL", "C");
        Ok::<_, anyhow::Error>(candidates(&sh::read(&mut policy)?))
    };
    let mut found = ask()?;
    if found.len() < packages.len() {
        update()?;
        found = ask()?;
    }
    if let Some(missing) = packages
        .iter()
        .find(|p| !found.iter().any(|(name, _)| name == *p))
    {
        bail!("apt knows no package {missing}: is this Debian 12 with its main repository?");
    }
    found.sort();
    let lines: Vec<String> = found
        .iter()
        .map(|(name, version)| format!("{name} {version}"))
        .collect();
    Ok(lines.join("\n"))
}

/// Package and candidate out of what `apt-cache policy` says.
fn candidates(policy: &str) -> Vec<(String, String)> {
    let mut name = "";
    let mut found = Vec::new();
    for line in policy.lines() {
        if let Some(package) = line.strip_suffix(':').filter(|p| !p.starts_with(' ')) {
            name = package;
        } else if let Some(version) = line
            .strip_prefix("  Candidate: ")
            .filter(|v| *v != "(none)")
        {
            found.push((name.to_owned(), version.to_owned()));
        }
    }
    found
}

/// For a meta package of the kernel (`linux-image-amd64`, `linux-source`), the package it stands for.
fn real_package(package: &str, about: &str) -> Option<String> {
    let depends = field(about, "Depends")?;
    let flavour = package.strip_prefix("linux-image-")?;
    if flavour.bytes().filter(|b| *b == b'.').count() >= 2 {
        return None; // already a release, such as 6.1.0-51-cloud-amd64
    }
    let first = depends.split(',').next()?.split_whitespace().next()?;
    first.starts_with("linux-image-").then(|| first.to_owned())
}

fn field<'a>(about: &'a str, name: &str) -> Option<&'a str> {
    about
        .lines()
        .find_map(|l| l.strip_prefix(name)?.strip_prefix(": "))
}

/// Refreshes apt's lists: as root directly, else by a sudo that asks for nothing.
pub fn update() -> Result<()> {
    eprintln!("refreshing apt's package lists");
    sh::quiet(as_root("apt-get")?.args(["-qq", "update"]))
}

/// A command that will run as root; an error naming what to do when that cannot be had.
pub fn as_root(program: &str) -> Result<Command> {
    // /proc/self belongs to the effective user.
    use std::os::unix::fs::MetadataExt;
    let root = std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0);
    if root {
        return Ok(Command::new(program));
    }
    if sh::works("sudo", &["-n", "true"]) {
        let mut command = Command::new("sudo");
        command.args(["-n", "env", "DEBIAN_FRONTEND=noninteractive", program]);
        return Ok(command);
    }
    bail!(
        "{program} needs root, and there is no sudo without a password: run it as root, then start again"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const META: &str = "Package: linux-image-cloud-amd64\nVersion: 6.1.177-1\nDepends: linux-image-6.1.0-51-cloud-amd64 (= 6.1.177-1)\n";
    const REAL: &str = "Package: linux-image-6.1.0-51-cloud-amd64\nVersion: 6.1.177-1\nDepends: kmod, linux-base (>= 4.3~)\n";

    #[test]
    fn a_meta_package_names_its_kernel() {
        let real = real_package("linux-image-cloud-amd64", META);
        assert_eq!(real.as_deref(), Some("linux-image-6.1.0-51-cloud-amd64"));
        assert_eq!(real_package("linux-image-6.1.0-51-cloud-amd64", REAL), None);
        assert_eq!(
            real_package("acpica-tools", "Version: 1\nDepends: libc6\n"),
            None
        );
    }

    #[test]
    fn candidates_are_what_apt_would_install() {
        let policy = "fio:\n  Installed: (none)\n  Candidate: 3.33-3\n  Version table:\n     3.33-3 500\n\
                      gone:\n  Installed: 1\n  Candidate: (none)\n";
        assert_eq!(
            candidates(policy),
            [("fio".to_owned(), "3.33-3".to_owned())]
        );
    }

    #[test]
    fn fields_are_found_by_whole_name() {
        assert_eq!(field(REAL, "Version"), Some("6.1.177-1"));
        assert_eq!(field(REAL, "Vers"), None);
    }
}
