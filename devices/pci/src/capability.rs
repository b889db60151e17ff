//! Capabilities as bytes and write masks.

/// A capability of the conventional list: what follows its id and next pointer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capability {
    /// Capability id.
    pub id: u8,
    /// Bytes after the two header bytes.
    pub body: Vec<u8>,
    /// Which of them the guest may write; missing bytes are read-only.
    pub writable: Vec<u8>,
}

/// What a PCI Express function is (PCIe 6.0 §7.5.3.2, Device/Port Type).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PcieType {
    /// Behind a root port.
    Endpoint,
    /// On the root bus itself: it has no link and no link registers.
    RootComplexIntegrated,
}

impl Capability {
    /// Vendor-specific capability id.
    pub const VENDOR: u8 = 0x09;
    /// PCI Express capability id.
    pub const PCI_EXPRESS: u8 = 0x10;
    /// MSI-X capability id.
    pub const MSIX: u8 = 0x11;

    /// A vendor-specific capability; its length byte is filled in from `payload`.
    pub fn vendor(payload: &[u8], writable: &[u8]) -> Self {
        let length = u8::try_from(payload.len().saturating_add(3)).unwrap_or(u8::MAX);
        let mut body = vec![length];
        body.extend(payload);
        let mut mask = vec![0];
        mask.extend(writable);
        Self {
            id: Self::VENDOR,
            body,
            writable: mask,
        }
    }

    /// A PCI Express capability, version 2, for a function with no optional feature.
    pub fn pci_express(kind: PcieType) -> Self {
        /// Role-based error reporting, which every function since PCIe 1.1 must set.
        const DEVICE_CAP_ROLE_BASED_ERRORS: u32 = 1 << 15;
        /// Error reporting enables, relaxed ordering, payload size, no snoop, read request size.
        const DEVICE_CONTROL_WRITABLE: u16 = 0x78ff;
        /// 2.5 GT/s, one lane: the least a link can be.
        const LINK_CAP_X1_GEN1: u32 = 0x11;
        const LINK_STATUS_X1_GEN1: u16 = 0x11;
        const VERSION: u16 = 2;
        const SIZE: usize = 0x3c - 2;

        let port_type = match kind {
            PcieType::Endpoint => 0,
            PcieType::RootComplexIntegrated => 9,
        };
        let mut body = Vec::with_capacity(SIZE);
        body.extend((VERSION | (port_type << 4)).to_le_bytes());
        body.extend(DEVICE_CAP_ROLE_BASED_ERRORS.to_le_bytes());
        // Device control and status.
        body.extend([0; 4]);
        if kind == PcieType::Endpoint {
            body.extend(LINK_CAP_X1_GEN1.to_le_bytes());
            body.extend([0; 2]);
            body.extend(LINK_STATUS_X1_GEN1.to_le_bytes());
        }
        body.resize(SIZE, 0);
        let mut writable = vec![0; 6];
        writable.extend(DEVICE_CONTROL_WRITABLE.to_le_bytes());
        Self {
            id: Self::PCI_EXPRESS,
            body,
            writable,
        }
    }
}
