//! The debug port (0x80 on a PC): every byte written is posted to the machine's owner.

use std::sync::Arc;

use testudo_bus::{Access, Device, GuestEvent, Mailbox, fill_absent};

/// Posts [`GuestEvent::DebugPort`] for each byte the guest writes; reads all-ones.
pub struct DebugPort {
    mailbox: Arc<dyn Mailbox>,
}

impl DebugPort {
    /// Bytes of the port range.
    pub const LEN: u64 = 1;

    /// A debug port that reports to `mailbox`.
    pub fn new(mailbox: Arc<dyn Mailbox>) -> Self {
        Self { mailbox }
    }
}

impl Device for DebugPort {
    fn read(&mut self, _at: Access, data: &mut [u8]) {
        fill_absent(data);
    }

    fn write(&mut self, _at: Access, data: &[u8]) {
        if let [value] = data {
            self.mailbox.post(GuestEvent::DebugPort(*value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Letters, read, write};

    #[test]
    fn each_byte_is_posted_in_order() {
        let letters = Letters::new();
        let mut port = DebugPort::new(letters.clone());
        write(&mut port, 0, 0x41);
        write(&mut port, 0, 0x7e);
        assert_eq!(read(&mut port, 0), 0xff);
        assert_eq!(
            letters.take(),
            [GuestEvent::DebugPort(0x41), GuestEvent::DebugPort(0x7e)]
        );
    }
}
