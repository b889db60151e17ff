//! The terminal a command was given in.

use std::io;
use std::os::fd::AsFd;

use rustix::stdio::{stderr, stdin, stdout};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

/// Rows and columns, if any of the standard descriptors is a terminal.
pub fn size() -> Option<(u16, u16)> {
    let sizes = [
        tcgetwinsize(stdin()),
        tcgetwinsize(stdout()),
        tcgetwinsize(stderr()),
    ];
    let size = sizes.into_iter().flatten().find(|size| size.ws_row > 0)?;
    Some((size.ws_row, size.ws_col))
}

/// Whether input comes from a terminal.
pub fn is_input() -> bool {
    isatty(stdin())
}

/// The terminal in raw mode; as it was when this is dropped.
pub struct Raw {
    before: Termios,
}

impl Raw {
    /// Of standard input.
    pub fn begin() -> io::Result<Self> {
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin().as_fd(), OptionalActions::Now, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // If it has gone, nobody sees how it is.
        let _ = tcsetattr(stdin(), OptionalActions::Drain, &self.before);
    }
}

/// Finds keys in input as it passes.
#[derive(Debug, Clone)]
pub struct KeyWatch {
    keys: Vec<u8>,
    seen: usize,
}

impl KeyWatch {
    /// These, one after another.
    pub fn new(keys: Vec<u8>) -> Self {
        Self { keys, seen: 0 }
    }

    /// What is to be passed on, and whether the keys were pressed. The beginning of them is held back.
    pub fn pass(&mut self, bytes: &[u8]) -> (Vec<u8>, bool) {
        let mut out = Vec::with_capacity(bytes.len());
        for byte in bytes {
            if self.keys.get(self.seen) == Some(byte) {
                self.seen = self.seen.saturating_add(1);
                if self.seen == self.keys.len() {
                    self.seen = 0;
                    return (out, true);
                }
                continue;
            }
            out.extend_from_slice(self.keys.get(..self.seen).unwrap_or_default());
            self.seen = usize::from(self.keys.first() == Some(byte));
            if self.seen == 0 {
                out.push(*byte);
            }
        }
        (out, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_and_nothing_else_is_lost() {
        let mut watch = KeyWatch::new(vec![16, 17]);
        assert_eq!(watch.pass(b"ab\x10"), (b"ab".to_vec(), false));
        assert_eq!(watch.pass(b"c\x10\x10"), (b"\x10c\x10".to_vec(), false));
        assert_eq!(watch.pass(b"\x11rest"), (Vec::new(), true));
        assert_eq!(KeyWatch::new(Vec::new()).pass(b"x"), (b"x".to_vec(), false));
    }
}
