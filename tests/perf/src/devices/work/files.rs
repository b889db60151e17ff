//! Files: what unpacking an archive, walking a tree and copying big files ask of a file system.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::ValueEnum;

/// Files in one folder.
const IN_A_FOLDER: u64 = 100;
const SMALL: usize = 4096;
const CHUNK: usize = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Work {
    /// So many files of 4 KiB in folders of 100, with mode and time, as tar does it.
    Create,
    /// Their attributes, one after the other.
    Stat,
    /// Their contents.
    Open,
    /// Away with them, and the folders.
    Unlink,
    /// One file of so many bytes, in pieces of 1 MiB, and fsync.
    Write,
    /// The same file from start to end.
    Read,
}

/// Returns files, or bytes.
pub(crate) fn run(folder: &Path, work: Work, amount: u64) -> io::Result<u64> {
    match work {
        Work::Create => create(folder, amount)?,
        Work::Stat => {
            for n in 0..amount {
                fs::symlink_metadata(small(folder, n))?;
            }
        }
        Work::Open => {
            for n in 0..amount {
                let length = fs::read(small(folder, n))?.len();
                if length != SMALL {
                    return Err(io::Error::other(format!("a file has {length} bytes")));
                }
            }
        }
        Work::Unlink => {
            for n in 0..amount {
                fs::remove_file(small(folder, n))?;
            }
            for n in (0..amount).step_by(usize::try_from(IN_A_FOLDER).unwrap_or(1)) {
                fs::remove_dir(subfolder(folder, n))?;
            }
        }
        Work::Write => {
            let mut file = File::create(folder.join("big"))?;
            let chunk = vec![0x5a; CHUNK];
            for _ in 0..amount / CHUNK as u64 {
                file.write_all(&chunk)?;
            }
            file.sync_all()?;
        }
        Work::Read => {
            let mut file = File::open(folder.join("big"))?;
            let mut chunk = vec![0; CHUNK];
            for _ in 0..amount / CHUNK as u64 {
                file.read_exact(&mut chunk)?;
            }
        }
    }
    Ok(amount)
}

fn create(folder: &Path, amount: u64) -> io::Result<()> {
    let data = [0x5a; SMALL];
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_686_355_200);
    for n in 0..amount {
        if n % IN_A_FOLDER == 0 {
            fs::create_dir(subfolder(folder, n))?;
        }
        let mut file = File::create_new(small(folder, n))?;
        file.write_all(&data)?;
        file.set_permissions(Permissions::from_mode(0o640))?;
        file.set_modified(time)?;
    }
    Ok(())
}

fn subfolder(folder: &Path, n: u64) -> PathBuf {
    folder.join(format!("folder-{}", n / IN_A_FOLDER))
}

fn small(folder: &Path, n: u64) -> PathBuf {
    subfolder(folder, n).join(format!("file-{n}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_created_is_found_read_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        for work in [Work::Create, Work::Stat, Work::Open] {
            assert_eq!(run(dir.path(), work, 150).unwrap(), 150);
        }
        assert!(run(dir.path(), Work::Stat, 151).is_err());
        run(dir.path(), Work::Unlink, 150).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        run(dir.path(), Work::Write, 3 << 20).unwrap();
        run(dir.path(), Work::Read, 3 << 20).unwrap();
        assert!(run(dir.path(), Work::Read, 4 << 20).is_err());
    }
}
