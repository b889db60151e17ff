//! `cargo xtask guest …`: what VM tests and demos boot. Our kernel, Debian's stock cloud kernel in
//! both of its forms, the initramfs of `ci/guest/init`, and a Debian userland. Each is built once and then found in the
//! [`Cache`]; what is printed on stdout are `name path` lines, for people and for scripts.

mod initramfs;
mod kernel;
mod lz4;
mod stock;
mod userland;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cache::Cache;

/// `cargo xtask guest`
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Build our guest kernel (ci/guest/kernel-6.1.config) and print where it is.
    Kernel,
    /// Fetch Debian's cloud kernel, unpack its vmlinux, and print where both are.
    Stock,
    /// Build the test initramfs and print where it is.
    Initramfs {
        /// Leave out the modules that Debian's kernel needs: ours has them built in.
        #[arg(long, conflicts_with = "pad")]
        bare: bool,
        /// Bare, then filled up to this size with data that does not compress: 2M, 512K.
        #[arg(long, value_parser = size)]
        pad: Option<u64>,
    },
    /// Build the agent and an initramfs in which it is the init, for our kernel, and print where it is.
    Agent,
    /// Put our kernel and the agent where `testudo` finds them: into `testudo-guest` in its program's folder.
    Install {
        /// The folder that `testudo` is in.
        #[arg(default_value = "target/release")]
        folder: PathBuf,
    },
    /// Make a Debian userland with fio, iperf3, git, gcc and the like, and print where its disk image
    /// and its folder are.
    Userland,
}

pub fn run(args: &Args) -> Result<()> {
    let cache = Cache::open()?;
    match args.what {
        What::Kernel => print(&kernel(&cache)?),
        What::Stock => print(&stock(&cache)?),
        What::Initramfs { bare, pad } => {
            let contents = match (bare, pad) {
                (_, Some(size)) => Contents::Padded(size),
                (true, None) => Contents::Bare,
                (false, None) => Contents::Modules,
            };
            println!("initramfs {}", initramfs(&cache, contents)?.display());
        }
        What::Agent => {
            println!(
                "initramfs {}",
                initramfs(&cache, Contents::Agent)?.display()
            );
        }
        What::Install { ref folder } => println!("guest {}", install(&cache, folder)?.display()),
        What::Userland => {
            let userland = userland(&cache)?;
            println!("image {}", userland.image.display());
            println!("folder {}", userland.folder.display());
        }
    }
    Ok(())
}

fn print(kernel: &Images) {
    println!("bzimage {}", kernel.bzimage.display());
    println!("vmlinux {}", kernel.vmlinux.display());
}

/// One kernel in the two forms a VMM may load.
pub struct Images {
    /// The compressed image with the Linux boot header.
    pub bzimage: PathBuf,
    /// The ELF file with the PVH note, without symbols.
    pub vmlinux: PathBuf,
}

/// Our guest kernel, built if it is not in the cache. Minutes the first time.
pub fn kernel(cache: &Cache) -> Result<Images> {
    kernel::build(cache)
}

/// Debian's kernel for clouds, as the distribution ships it.
pub fn stock(cache: &Cache) -> Result<Images> {
    stock::fetch(cache)
}

/// Puts our kernel and the agent's initramfs beside a program `testudo`; returns where.
pub fn install(cache: &Cache, folder: &Path) -> Result<PathBuf> {
    let to = folder.join("testudo-guest");
    std::fs::create_dir_all(&to).with_context(|| format!("cannot make {}", to.display()))?;
    for (from, name) in [
        (kernel(cache)?.vmlinux, "vmlinux"),
        (initramfs(cache, Contents::Agent)?, "agent.cpio"),
    ] {
        // Never half of one, for a VM may be starting.
        let new = to.join(format!("{name}.new"));
        std::fs::copy(&from, &new)
            .and_then(|_| std::fs::rename(&new, to.join(name)))
            .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    }
    Ok(to)
}

/// A root file system in two forms with the same contents.
pub struct Userland {
    /// An EROFS image, for a read-only disk.
    pub image: PathBuf,
    /// A folder, for a shared file system.
    pub folder: PathBuf,
}

/// The Debian userland for guests, made if it is not in the cache. A minute or two the first time.
pub fn userland(cache: &Cache) -> Result<Userland> {
    userland::build(cache)
}

/// What is in an initramfs besides the init.
#[derive(Debug, Clone, Copy)]
pub enum Contents {
    /// Nothing.
    Bare,
    /// The modules of Debian's cloud kernel that a VM test needs, for its order `modules`.
    Modules,
    /// The agent in the place of the test init, and nothing else.
    Agent,
    /// Incompressible padding up to this many bytes in all, for measurements.
    Padded(u64),
}

/// The test initramfs: an uncompressed cpio archive.
pub fn initramfs(cache: &Cache, contents: Contents) -> Result<PathBuf> {
    initramfs::build(cache, contents)
}

/// `2M`, `512K`, `1G` or a number of bytes.
fn size(text: &str) -> Result<u64, String> {
    let units = [('K', 1 << 10), ('M', 1 << 20), ('G', 1 << 30)];
    let (digits, unit) = units
        .iter()
        .find_map(|(letter, unit)| Some((text.strip_suffix(*letter)?, *unit)))
        .unwrap_or((text, 1));
    let number: Option<u64> = digits.parse().ok();
    number
        .and_then(|n| n.checked_mul(unit))
        .ok_or_else(|| format!("{text} is no size: give bytes, or a number with K, M or G"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!(size("2M"), Ok(2 << 20));
        assert_eq!(size("100"), Ok(100));
        for bad in [
            "",
            "M",
            "-1",
            "2 M",
            "99999999999999999999G",
            "18446744073709551615K",
        ] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
