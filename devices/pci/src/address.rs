//! Where a function sits in a segment.

use std::fmt;

/// Bus, device and function numbers, always in range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    bus: u8,
    device: u8,
    function: u8,
}

impl Bdf {
    /// The root bus's device 0, function 0: the host bridge.
    pub const HOST_BRIDGE: Self = Self {
        bus: 0,
        device: 0,
        function: 0,
    };

    /// `None` unless `device` < 32 and `function` < 8.
    pub const fn new(bus: u8, device: u8, function: u8) -> Option<Self> {
        if device < 32 && function < 8 {
            Some(Self {
                bus,
                device,
                function,
            })
        } else {
            None
        }
    }

    /// From a 16-bit routing id; every value names a function.
    pub const fn from_routing_id(id: u16) -> Self {
        let [devfn, bus] = id.to_le_bytes();
        Self {
            bus,
            device: devfn >> 3,
            function: devfn & 7,
        }
    }

    /// The 16-bit routing id (requester id).
    pub const fn routing_id(self) -> u16 {
        u16::from_le_bytes([(self.device << 3) | self.function, self.bus])
    }

    /// Bus number.
    pub const fn bus(self) -> u8 {
        self.bus
    }

    /// Device number, below 32.
    pub const fn device(self) -> u8 {
        self.device
    }

    /// Function number, below 8.
    pub const fn function(self) -> u8 {
        self.function
    }

    pub(crate) fn with_function(self, function: u8) -> Self {
        Self {
            function: function & 7,
            ..self
        }
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus, self.device, self.function)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routing_ids_round_trip() {
        for id in 0..=u16::MAX {
            let bdf = Bdf::from_routing_id(id);
            assert_eq!(bdf.routing_id(), id);
            assert_eq!(Bdf::new(bdf.bus, bdf.device, bdf.function), Some(bdf));
        }
        assert_eq!(Bdf::from_routing_id(0x1209).to_string(), "12:01.1");
        assert!(Bdf::new(0, 32, 0).is_none());
        assert!(Bdf::new(0, 0, 8).is_none());
    }
}
