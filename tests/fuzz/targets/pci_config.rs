//! Any sequence of accesses to configuration space (ECAM and 0xcf8) and to the BARs of a segment
//! with a host bridge and two functions, one of which has MSI-X.
#![no_main]

use libfuzzer_sys::fuzz_target;
use testudo_bus::{Access, Bus, IrqError, Msi, MsiMessage, MsiVector, Range};
use testudo_pci::{
    Bar, BarOffset, Bdf, Capability, ClassCode, ConfigSpace, HostBridge, Identity, Msix,
    PciFunction, PcieType, Segment, fuzz,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const TABLE_BAR: u8 = 1;
const PBA: u32 = 0x800;
const VECTORS: u16 = 3;
const WINDOW_32: (u64, u64) = (0x8000_0000, 0x6000_0000);
const WINDOW_64: (u64, u64) = (0x1_0000_0000, 1 << 38);

struct Vector(EventFd);

impl MsiVector for Vector {
    fn enable(&self, _message: MsiMessage) -> Result<(), IrqError> {
        Ok(())
    }
    fn disable(&self) {}
    fn eventfd(&self) -> &EventFd {
        &self.0
    }
}

struct Vectors;

impl Msi for Vectors {
    fn vector(&self) -> Result<Box<dyn MsiVector>, IrqError> {
        Ok(Box::new(Vector(
            EventFd::new(EFD_NONBLOCK).expect("an eventfd"),
        )))
    }
}

/// A function with a 32-bit BAR, an MSI-X table and a 64-bit BAR of plain bytes.
struct Function {
    config: ConfigSpace,
    msix: Option<Msix>,
    bytes: [u8; 64],
}

impl Function {
    fn new(with_msix: bool) -> Self {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1044,
            revision: 1,
            class: ClassCode {
                base: 0xff,
                sub: 0,
                interface: 0,
            },
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        let mut config = ConfigSpace::new(&identity);
        let bars = [
            (0, 4096, false),
            (TABLE_BAR, 4096, false),
            (2, 1 << 20, true),
        ];
        for (index, size, wide) in bars {
            let bar = Bar {
                index,
                size,
                wide,
                prefetchable: wide,
            };
            config.add_bar(bar).expect("a BAR");
        }
        config
            .add_capability(&Capability::pci_express(PcieType::RootComplexIntegrated))
            .expect("room");
        let msix = with_msix.then(|| {
            let mut msix = Msix::new(VECTORS, &Vectors).expect("vectors");
            let at = |offset| BarOffset {
                bar: TABLE_BAR,
                offset,
            };
            msix.add_capability(&mut config, at(0), at(PBA))
                .expect("room");
            msix
        });
        Self {
            config,
            msix,
            bytes: [0; 64],
        }
    }
}

impl PciFunction for Function {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        if let Some(msix) = &mut self.msix {
            msix.config_written(&self.config);
        }
    }
    fn bar_read(&mut self, bar: u8, at: Access, data: &mut [u8]) {
        match &self.msix {
            Some(msix) if bar == TABLE_BAR && at.offset < u64::from(PBA) => {
                msix.table_read(at.offset, data)
            }
            Some(msix) if bar == TABLE_BAR => msix.pba_read(at.offset - u64::from(PBA), data),
            _ => data.fill(self.bytes[at.offset as usize % 64]),
        }
    }
    fn bar_write(&mut self, bar: u8, at: Access, data: &[u8]) {
        match &mut self.msix {
            Some(msix) if bar == TABLE_BAR => {
                msix.table_write(at.offset, data);
                msix.vectors().fire(u16::from(data[0]));
            }
            _ => self.bytes[at.offset as usize % 64] = data[0],
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let mmio = Bus::new("mmio");
    let windows =
        [WINDOW_32, WINDOW_64].map(|(base, len)| Range::new(base, len).expect("a window"));
    let segment = Segment::new(mmio.clone(), windows.to_vec());
    let at = |slot| Bdf::new(0, slot, 0).expect("a slot");
    let _bridge = segment
        .plug(at(0), Box::new(HostBridge::new()), &[])
        .expect("an empty slot");
    let bars = [(0, 0x8000_0000), (1, 0x8000_1000), (2, 0x1_0000_0000)];
    let _plain = segment
        .plug(at(1), Box::new(Function::new(false)), &bars)
        .expect("an empty slot");
    let _msix = segment
        .plug(at(2), Box::new(Function::new(true)), &[])
        .expect("an empty slot");
    fuzz::run(&segment, &mmio, data);
});
