//! System control port B (0x61): PIT channel 2 gate, speaker, refresh and timer status.
//!
//! Only for machines where KVM's in-kernel PIT does not claim the port itself. There is no timer
//! behind it: the channel-2 output reads as expired, so that a calibration loop that waits for it
//! ends at once and is discarded by the guest as too short.

use testudo_bus::{Access, Device};

const GATE_AND_SPEAKER: u8 = 0b11;
const REFRESH: u8 = 1 << 4;
const TIMER2_OUT: u8 = 1 << 5;

/// The port's state.
#[derive(Default)]
pub struct SystemControl {
    written: u8,
    refresh: bool,
}

impl SystemControl {
    /// Bytes of the port range.
    pub const LEN: u64 = 1;

    /// The port as it is after reset.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Device for SystemControl {
    fn read(&mut self, _at: Access, data: &mut [u8]) {
        self.refresh = !self.refresh;
        let refresh = if self.refresh { REFRESH } else { 0 };
        data.fill(self.written | refresh | TIMER2_OUT);
    }

    fn write(&mut self, _at: Access, data: &[u8]) {
        self.written = data.first().copied().unwrap_or(0) & GATE_AND_SPEAKER;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{read, write};

    #[test]
    fn refresh_toggles_and_the_timer_has_expired() {
        let mut port = SystemControl::new();
        write(&mut port, 0, 0xff);
        let first = read(&mut port, 0);
        let second = read(&mut port, 0);
        assert_eq!(first ^ second, REFRESH);
        assert_eq!(second & (TIMER2_OUT | 0x0f), TIMER2_OUT | 0b11);
    }
}
