//! The way out of a terminal in raw mode: Ctrl-A x.

/// Ctrl-A.
const PREFIX: u8 = 0x01;

/// Looks for the escape in what is typed.
///
/// ```text
///   plain ──Ctrl-A──▶ prefixed ──x──▶ end
///     ▲                  │ Ctrl-A: one Ctrl-A goes to the guest
///     └──────────────────┘ else: Ctrl-A and the key go to the guest
/// ```
#[derive(Default)]
pub(super) struct Escape {
    prefixed: bool,
}

impl Escape {
    /// What of `typed` the guest gets, and whether the user asked to end the VM.
    pub(super) fn filter(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut through = Vec::with_capacity(typed.len().saturating_add(1));
        for &byte in typed {
            match (self.prefixed, byte) {
                (true, b'x' | b'X') => return (through, true),
                (true, PREFIX) => {
                    self.prefixed = false;
                    through.push(PREFIX);
                }
                (true, byte) => {
                    self.prefixed = false;
                    through.extend([PREFIX, byte]);
                }
                (false, PREFIX) => self.prefixed = true,
                (false, byte) => through.push(byte),
            }
        }
        (through, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_across_reads() {
        let mut escape = Escape::default();
        assert_eq!(escape.filter(b"ab\x01"), (b"ab".to_vec(), false));
        assert_eq!(
            escape.filter(b"\x01c\x01d"),
            (b"\x01c\x01d".to_vec(), false)
        );
        assert_eq!(escape.filter(b"e\x01x!"), (b"e".to_vec(), true));
    }
}
