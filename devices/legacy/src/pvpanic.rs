//! pvpanic: the port (0x505 by custom) by which a guest kernel says that it died.
//!
//! QEMU `docs/specs/pvpanic.rst`: a read returns the supported events, a write reports them.

use std::sync::Arc;

use testudo_bus::{Access, Device, GuestEvent, Mailbox};

const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;

/// Posts [`GuestEvent::Panicked`] and [`GuestEvent::CrashLoaded`].
pub struct Pvpanic {
    mailbox: Arc<dyn Mailbox>,
}

impl Pvpanic {
    /// Bytes of the port range.
    pub const LEN: u64 = 1;

    /// A pvpanic port that reports to `mailbox`.
    pub fn new(mailbox: Arc<dyn Mailbox>) -> Self {
        Self { mailbox }
    }
}

impl Device for Pvpanic {
    fn read(&mut self, _at: Access, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&mut self, _at: Access, data: &[u8]) {
        let events = data.first().copied().unwrap_or(0);
        if events & PANICKED != 0 {
            self.mailbox.post(GuestEvent::Panicked);
        }
        if events & CRASH_LOADED != 0 {
            self.mailbox.post(GuestEvent::CrashLoaded);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Letters, read, write};

    #[test]
    fn supported_events_are_readable_and_only_they_are_posted() {
        let letters = Letters::new();
        let mut port = Pvpanic::new(letters.clone());
        assert_eq!(read(&mut port, 0), 3);
        write(&mut port, 0, 0xfc);
        assert!(letters.take().is_empty());
        write(&mut port, 0, PANICKED);
        write(&mut port, 0, CRASH_LOADED);
        assert_eq!(
            letters.take(),
            [GuestEvent::Panicked, GuestEvent::CrashLoaded]
        );
    }
}
