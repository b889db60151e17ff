//! A console on a pseudo-terminal of its own.

use std::fs::File;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

/// The terminal, and the path by which it is found; dropping it removes the path.
pub(super) struct Pty {
    master: File,
    path: PathBuf,
    /// Held open, so that whoever comes and goes at the terminal does not end it.
    _terminal: File,
}

impl Pty {
    /// A new terminal in raw mode, to which a symbolic link at `path` leads. A link that is there
    /// already is replaced.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let name = name.to_str().map_err(io::Error::other)?;
        let terminal = File::options().read(true).write(true).open(name)?;
        let mut modes = tcgetattr(&terminal)?;
        modes.make_raw();
        tcsetattr(&terminal, OptionalActions::Now, &modes)?;
        if path.is_symlink() {
            std::fs::remove_file(path)?;
        }
        symlink(name, path)?;
        Ok(Self {
            master: master.into(),
            path: path.to_path_buf(),
            _terminal: terminal,
        })
    }

    pub(super) fn master(&self) -> &File {
        &self.master
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn the_path_leads_to_the_terminal_and_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tty");
        symlink("/nonexistent", &path).unwrap();
        let pty = Pty::open(&path).unwrap();
        let mut user = File::options().read(true).write(true).open(&path).unwrap();
        user.write_all(b"typed\n").unwrap();
        let mut heard = [0; 6];
        pty.master().read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"typed\n");
        pty.master().write_all(b"said\n").unwrap();
        let mut seen = [0; 5];
        user.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"said\n", "raw");
        drop(pty);
        assert!(!path.is_symlink());
        std::fs::write(&path, "a file").unwrap();
        assert!(Pty::open(&path).is_err(), "what is no link stays");
    }
}
