//! The initramfs of test guests: `/init` from `ci/guest/init` or the agent, linked statically, and the folders and
//! the console node it expects. Not compressed: unpacking would be time in every boot.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use testudo_lab::cpio::Cpio;

use super::{Contents, stock};
use crate::cache::Cache;
use crate::workspace;

/// Raised when the archive's layout changes.
const RECIPE: &[u8] = b"1";
/// The entry of the padding, beyond the padding itself: head, name, alignment.
const PAD_HEAD: usize = 110 + 4 + 2;

pub(super) fn build(cache: &Cache, contents: Contents) -> Result<PathBuf> {
    let init = match contents {
        Contents::Agent => workspace::small_binary("testudo-agent", "testudo-agent", "agent")?,
        _ => workspace::static_binary("guest-init", "guest-init", "guest")?,
    };
    let init = fs::read(&init).with_context(|| format!("cannot read {}", init.display()))?;
    let (label, archive) = match contents {
        Contents::Bare => ("guest-initramfs-bare", archive(&init, |_| Ok(()))?),
        Contents::Agent => ("agent-initramfs", archive(&init, |_| Ok(()))?),
        Contents::Modules => {
            let (release, files) = stock::modules(cache)?;
            let with = |cpio: &mut Cpio<Vec<u8>>| {
                cpio.dir("modules")?;
                cpio.dir(&format!("modules/{release}"))?;
                for file in &files {
                    let name = file.file_name().context("a module without a name")?;
                    let path = format!("modules/{release}/{}", name.to_string_lossy());
                    cpio.file(&path, 0o644, &fs::read(file)?)?;
                }
                Ok(())
            };
            ("guest-initramfs", archive(&init, with)?)
        }
        Contents::Padded(size) => ("guest-initramfs-padded", padded(&init, size)?),
    };
    let dir = cache
        .entry(label, &[&archive, RECIPE])
        .get_or_build(|dir| {
            fs::write(dir.join("initramfs.cpio"), &archive).context("cannot write the initramfs")
        })?;
    Ok(dir.join("initramfs.cpio"))
}

/// The archive every guest needs, and what `more` adds.
fn archive(init: &[u8], more: impl FnOnce(&mut Cpio<Vec<u8>>) -> Result<()>) -> Result<Vec<u8>> {
    let mut cpio = Cpio::new(Vec::new());
    for dir in ["dev", "proc", "sys"] {
        cpio.dir(dir)?;
    }
    cpio.char_device("dev/console", 5, 1)?;
    cpio.file("init", 0o755, init)?;
    more(&mut cpio)?;
    Ok(cpio.finish()?)
}

fn padded(init: &[u8], size: u64) -> Result<Vec<u8>> {
    let size = usize::try_from(size)?;
    let bare = archive(init, |_| Ok(()))?.len();
    let missing = size
        .checked_sub(bare + PAD_HEAD)
        .with_context(|| format!("the initramfs has {bare} bytes without any padding"))?;
    let archive = archive(init, |cpio| Ok(cpio.file("pad", 0o644, &noise(missing))?))?;
    ensure!(
        archive.len().abs_diff(size) < 4,
        "padded to {} bytes instead of {size}",
        archive.len()
    );
    Ok(archive)
}

/// The same bytes each time, and no compressor finds a pattern in them: SHA-256 of a counter.
fn noise(length: usize) -> Vec<u8> {
    let blocks = length.div_ceil(32);
    let mut bytes: Vec<u8> = (0..blocks)
        .flat_map(|n| Sha256::digest(n.to_le_bytes()))
        .collect();
    bytes.truncate(length);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_meets_the_size_asked_for() {
        for size in [4096, 1 << 20, (1 << 20) + 3] {
            let length = padded(b"init", size).unwrap().len() as u64;
            assert!(length.abs_diff(size) < 4, "{length} for {size}");
        }
        assert!(padded(b"init", 100).is_err());
    }

    #[test]
    fn noise_repeats_and_does_not_compress_by_eye() {
        let bytes = noise(1000);
        assert_eq!(bytes, noise(1000));
        let distinct: std::collections::HashSet<u8> = bytes.iter().copied().collect();
        assert!(distinct.len() > 200);
    }
}
