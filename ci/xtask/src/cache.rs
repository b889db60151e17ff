//! What takes long to make and depends only on its inputs: kernels, packages, tools. Owns a folder
//! outside the clone, so a fresh clone finds what an older one has built.
//!
//! ```text
//! <root>/<name>-<first 16 hex of sha256(inputs)>/    a finished entry, never written again
//! <root>/.building/<name>-<…>/                       being built, by the holder of the lock
//! <root>/.locks/<name>-<…>                           flock: a second process waits for the first
//! ```
//! An entry appears by one rename, so a reader sees all of it or none. After a build, entries of the
//! same name are removed but for the newest [`KEPT`] and those in use within [`GRACE`].

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// Entries of one name that stay, the new one included.
const KEPT: usize = 2;
/// An entry handed out this recently may still be in use by another process.
const GRACE: Duration = Duration::from_secs(3600);
const HEX: usize = 16;

/// The cache's root folder.
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// `$TESTUDO_CACHE`, else `$XDG_CACHE_HOME/testudo`, else `$HOME/.cache/testudo`.
    pub fn open() -> Result<Cache> {
        let var = |name| {
            std::env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        let root = var("TESTUDO_CACHE")
            .or_else(|| var("XDG_CACHE_HOME").map(|d| d.join("testudo")))
            .or_else(|| var("HOME").map(|d| d.join(".cache/testudo")))
            .context("no place for the cache: set TESTUDO_CACHE or HOME")?;
        Cache::at(&root)
    }

    /// A cache in this folder, made if missing.
    pub fn at(root: &Path) -> Result<Cache> {
        for dir in [".building", ".locks", ".notes"] {
            let dir = root.join(dir);
            fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        let root = root
            .canonicalize()
            .with_context(|| format!("cannot resolve {}", root.display()))?;
        Ok(Cache { root })
    }

    /// The entry that these inputs determine. Whatever changes the result belongs into `inputs`:
    /// sources, configuration, versions of tools, and the recipe itself.
    pub fn entry(&self, name: &str, inputs: &[&[u8]]) -> Entry {
        let mut hash = Sha256::new();
        for input in inputs {
            hash.update(u64::try_from(input.len()).unwrap_or(u64::MAX).to_le_bytes());
            hash.update(input);
        }
        let mut digest: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        digest.truncate(HEX);
        Entry {
            root: self.root.clone(),
            name: name.to_owned(),
            digest,
        }
    }

    /// The note of this name, written or not.
    pub fn note(&self, name: &str) -> Note {
        Note(self.root.join(".notes").join(name))
    }
}

/// A line worth remembering for a while; losing it costs time and nothing else.
pub struct Note(PathBuf);

impl Note {
    /// What was written, unless that is longer ago than `fresh`.
    pub fn read(&self, fresh: Duration) -> Option<String> {
        let age = fs::metadata(&self.0)
            .ok()?
            .modified()
            .ok()?
            .elapsed()
            .ok()?;
        if age > fresh {
            return None;
        }
        fs::read_to_string(&self.0).ok()
    }

    /// Remembers this. One rename, so that a reader sees a whole line.
    pub fn write(&self, line: &str) {
        let new = self.0.with_extension(format!("{}", std::process::id()));
        if fs::write(&new, line).is_ok() {
            let _ = fs::rename(&new, &self.0);
        }
    }
}

/// One folder of the cache, built or not.
pub struct Entry {
    root: PathBuf,
    name: String,
    digest: String,
}

impl Entry {
    fn label(&self) -> String {
        format!("{}-{}", self.name, self.digest)
    }

    /// Where the entry is once built.
    pub fn dir(&self) -> PathBuf {
        self.root.join(self.label())
    }

    /// The folder, if it has been built.
    pub fn get(&self) -> Option<PathBuf> {
        let dir = self.dir();
        // Its time says when it was last used; a read-only cache still serves.
        let opened = File::open(&dir).ok()?;
        let _ = opened.set_modified(SystemTime::now());
        Some(dir)
    }

    /// The folder, built first if need be: `build` fills the empty folder it is given. When it fails
    /// nothing is kept. A second process asking for the same entry waits for the first.
    pub fn get_or_build(&self, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        if let Some(dir) = self.get() {
            return Ok(dir);
        }
        let lock_path = self.root.join(".locks").join(self.label());
        let lock = File::create(&lock_path)
            .with_context(|| format!("cannot create {}", lock_path.display()))?;
        lock.lock()
            .with_context(|| format!("cannot lock {}", lock_path.display()))?;
        if let Some(dir) = self.get() {
            return Ok(dir);
        }
        let building = self.root.join(".building").join(self.label());
        if building.exists() {
            fs::remove_dir_all(&building)
                .with_context(|| format!("cannot remove {}", building.display()))?;
        }
        fs::create_dir(&building)
            .with_context(|| format!("cannot create {}", building.display()))?;
        if let Err(error) = build(&building) {
            let _ = fs::remove_dir_all(&building);
            return Err(error.context(format!("building {} for the cache", self.name)));
        }
        let dir = self.dir();
        fs::rename(&building, &dir)
            .with_context(|| format!("cannot move {} into place", dir.display()))?;
        self.prune();
        self.get()
            .with_context(|| format!("{} is gone", dir.display()))
    }

    /// Old entries of this name go; one that cannot be removed only costs room.
    fn prune(&self) {
        let Ok(entries) = fs::read_dir(&self.root) else {
            return;
        };
        let mut same: Vec<(SystemTime, PathBuf)> = entries
            .flatten()
            .filter(|e| e.file_name().to_str().is_some_and(|n| self.is_sibling(n)))
            .filter_map(|e| Some((e.metadata().ok()?.modified().ok()?, e.path())))
            .collect();
        same.sort();
        let surplus = same.len().saturating_sub(KEPT);
        for (used, path) in same.into_iter().take(surplus) {
            if used.elapsed().is_ok_and(|age| age > GRACE) {
                let _ = fs::remove_dir_all(path);
            }
        }
    }

    fn is_sibling(&self, file_name: &str) -> bool {
        file_name
            .strip_prefix(&self.name)
            .and_then(|rest| rest.strip_prefix('-'))
            .is_some_and(|hex| hex.len() == HEX && hex.bytes().all(|b| b.is_ascii_hexdigit()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(&dir.path().join("cache")).unwrap();
        (dir, cache)
    }

    #[test]
    fn the_key_is_the_inputs_and_their_borders() {
        let (_dir, cache) = cache();
        let one = cache.entry("a", &[b"xy", b"z"]).dir();
        assert_eq!(one, cache.entry("a", &[b"xy", b"z"]).dir());
        assert_ne!(one, cache.entry("a", &[b"x", b"yz"]).dir());
        assert_ne!(one, cache.entry("b", &[b"xy", b"z"]).dir());
    }

    #[test]
    fn a_failed_build_leaves_nothing_and_may_be_tried_again() {
        let (_dir, cache) = cache();
        let entry = cache.entry("a", &[]);
        let failed = entry.get_or_build(|dir| {
            fs::write(dir.join("half"), b"")?;
            anyhow::bail!("no luck")
        });
        assert!(failed.is_err() && entry.get().is_none());
        let dir = entry
            .get_or_build(|dir| Ok(fs::write(dir.join("whole"), b"")?))
            .unwrap();
        assert!(dir.join("whole").exists() && !dir.join("half").exists());
    }

    #[test]
    fn notes_are_forgotten_in_time() {
        let (_dir, cache) = cache();
        let note = cache.note("linux-image-6.12");
        assert_eq!(note.read(GRACE), None);
        note.write("it");
        assert_eq!(note.read(GRACE).as_deref(), Some("it"));
        let then = SystemTime::now() - Duration::from_secs(60);
        File::open(&note.0).unwrap().set_modified(then).unwrap();
        assert_eq!(note.read(Duration::from_secs(30)), None);
    }

    #[test]
    fn two_at_once_build_once() {
        let (_dir, cache) = cache();
        let builds = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let built = cache.entry("a", &[b"k"]).get_or_build(|_| {
                        builds.fetch_add(1, Ordering::SeqCst);
                        std::thread::sleep(Duration::from_millis(50));
                        Ok(())
                    });
                    assert!(built.unwrap().is_dir());
                });
            }
        });
        assert_eq!(builds.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn the_oldest_entries_of_a_name_go() {
        let (_dir, cache) = cache();
        let mut built = Vec::new();
        for hours in [5_u64, 4, 3] {
            let dir = cache
                .entry("a", &[&hours.to_le_bytes()])
                .get_or_build(|_| Ok(()))
                .unwrap();
            let then = SystemTime::now() - Duration::from_secs(hours * 3600);
            File::open(&dir).unwrap().set_modified(then).unwrap();
            built.push(dir);
        }
        let other = cache.entry("a-b", &[]).get_or_build(|_| Ok(())).unwrap();
        let newest = cache
            .entry("a", &[b"new"])
            .get_or_build(|_| Ok(()))
            .unwrap();
        let left: Vec<bool> = built.iter().map(|d| d.exists()).collect();
        assert_eq!(left, [false, false, true]);
        assert!(newest.exists() && other.exists());
    }
}
