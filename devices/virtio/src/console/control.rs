//! Control messages of the multiport form (virtio 1.2 §5.3.6.2), and what each port has to tell.

/// Header of a message: port, event, value.
pub(super) const LEN: usize = 8;

pub(super) const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
pub(super) const PORT_READY: u16 = 3;
pub(super) const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// A message of the driver's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) port: u32,
    pub(super) event: u16,
    pub(super) value: u16,
}

impl Message {
    pub(super) fn from_bytes(bytes: [u8; LEN]) -> Self {
        let [a, b, c, d, e, f, g, h] = bytes;
        Self {
            port: u32::from_le_bytes([a, b, c, d]),
            event: u16::from_le_bytes([e, f]),
            value: u16::from_le_bytes([g, h]),
        }
    }

    fn to_bytes(self) -> Vec<u8> {
        let mut bytes = self.port.to_le_bytes().to_vec();
        bytes.extend(self.event.to_le_bytes());
        bytes.extend(self.value.to_le_bytes());
        bytes
    }
}

/// What the driver knows of a port, and what it is to be told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Told {
    add: bool,
    name: bool,
    /// The driver has the port set up.
    ready: bool,
    open: bool,
    /// The driver's end is open.
    pub(super) guest_open: bool,
}

impl Told {
    /// The driver is ready for ports.
    pub(super) fn device_ready(&mut self) {
        *self = Self {
            add: true,
            ..Self::default()
        };
    }

    /// The driver has set the port up.
    pub(super) fn port_ready(&mut self) {
        self.ready = true;
        self.name = true;
        self.open = false;
    }

    /// The next message for the driver; [`Self::sent`] once it is on its way.
    pub(super) fn due(&self, port: u32, name: &str, connected: bool) -> Option<Vec<u8>> {
        let message = |event, value| Message { port, event, value }.to_bytes();
        if self.add {
            return Some(message(PORT_ADD, 1));
        }
        if !self.ready {
            return None;
        }
        if self.name {
            let mut bytes = message(PORT_NAME, 1);
            bytes.extend(name.as_bytes());
            return Some(bytes);
        }
        (self.open != connected).then(|| message(PORT_OPEN, connected.into()))
    }

    pub(super) fn sent(&mut self, connected: bool) {
        if self.add {
            self.add = false;
        } else if self.name {
            self.name = false;
        } else {
            self.open = connected;
        }
    }
}
