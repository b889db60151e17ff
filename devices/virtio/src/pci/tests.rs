use testudo_bus::{Bus, Range};
use testudo_pci::{Bdf, Segment, fuzz};

use super::*;
use crate::driver::{Driver, FakeDoorbells, FakeMsi, FakeWindows, reg};
use crate::model::{ActivateError, Activated, Queues, SavedState, Shape, SharedMemory};
use crate::signal::DeviceEvents;

const LOW: u64 = 0xc000_0000;
const BDF: Bdf = match Bdf::new(0, 3, 0) {
    Some(bdf) => bdf,
    None => Bdf::HOST_BRIDGE,
};

/// A model with a configuration space and two queues that does nothing with them.
#[derive(Default)]
struct Still {
    config: [u8; 12],
    queues: Queues,
    device: Arc<std::sync::Mutex<Option<DeviceEvents>>>,
    refuse: bool,
    stops: Arc<AtomicU8>,
    shared_memory: Option<SharedMemory>,
}

impl VirtioModel for Still {
    fn shape(&self) -> Shape {
        Shape {
            name: "still",
            device_type: 1,
            features: 1 << 5,
            queues: vec![16, 32],
            config_len: 12,
            shared_memory: self.shared_memory.clone(),
            ..Shape::default()
        }
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap();
        data.copy_from_slice(&self.config[start..start + data.len()]);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let start = usize::try_from(offset).unwrap();
        self.config[start..start + data.len()].copy_from_slice(data);
    }
    fn start(&mut self, on: Activated) -> Result<(), ActivateError> {
        self.queues = on.queues;
        if self.refuse {
            return Err(ActivateError::QueueMissing { index: 7 });
        }
        *self.device.lock().unwrap() = Some(on.device);
        Ok(())
    }
    fn stop(&mut self) -> Queues {
        self.stops.fetch_add(1, Ordering::SeqCst);
        std::mem::take(&mut self.queues)
    }
    fn saved_state(&self) -> SavedState {
        SavedState::Unsupported
    }
}

fn driver() -> Driver {
    Driver::new(|_| Box::<Still>::default())
}

/// The function in a segment, at [`LOW`] once decoding is on.
fn plugged(function: VirtioPci) -> (Bus, Segment, testudo_pci::Plugged) {
    let mmio = Bus::new("mmio");
    let windows = vec![Range::new(LOW, 0x1000_0000).unwrap()];
    let segment = Segment::new(mmio.clone(), windows);
    let plugged = segment.plug(BDF, Box::new(function), &[(0, LOW)]).unwrap();
    (mmio, segment, plugged)
}

#[test]
fn identity_and_capabilities_are_the_specifications() {
    let driver = driver();
    let config = driver.function.config();
    assert_eq!(config.get_u32(0x00), 0x1041_1af4);
    assert_eq!(config.get_u32(0x08), 0x0200_0001);
    assert_eq!(config.get_u8(0x3d), 0, "no INTx pin");
    let mut seen = Vec::new();
    let mut at = u16::from(config.get_u8(0x34));
    while at != 0 {
        let id = config.get_u8(at);
        if id == 9 {
            let kind = config.get_u8(at + 3);
            let (offset, length) = (config.get_u32(at + 8), config.get_u32(at + 12));
            seen.push((kind, offset, length));
            let size = if matches!(kind, 2 | 5) { 20 } else { 16 };
            assert_eq!(config.get_u8(at + 2), size);
        } else {
            assert_eq!((id, config.get_u16(at + 2)), (0x11, 2), "three vectors");
        }
        at = u16::from(config.get_u8(at + 1));
    }
    seen.sort_unstable();
    assert_eq!(
        seen,
        [
            (1, 0x0000, 0x3c),
            (2, 0x3000, 8),
            (3, 0x1000, 1),
            (4, 0x2000, 12),
            (5, 0, 0)
        ]
    );
}

/// Shared memory is where the guest has put BAR 2, and nowhere while that is off.
#[test]
fn shared_memory_follows_its_bar() {
    let window = Arc::new(testudo_memory::HostWindow::reserve(1 << 20).unwrap());
    let model = Still {
        shared_memory: Some(SharedMemory { id: 3, window }),
        ..Still::default()
    };
    let driver = Driver::new(|_| Box::new(model));
    let windows = driver.windows.clone();
    let config = driver.function.config();
    let mut at = u16::from(config.get_u8(0x34));
    while config.get_u8(at) != 9 || config.get_u8(at + 3) != 8 {
        at = u16::from(config.get_u8(at + 1));
        assert_ne!(at, 0, "no shared memory capability");
    }
    let head = [
        config.get_u8(at + 2),
        config.get_u8(at + 4),
        config.get_u8(at + 5),
    ];
    assert_eq!(head, [24, 2, 3], "length, BAR, id");
    let parts = [8, 12, 16, 20].map(|field| config.get_u32(at + field));
    assert_eq!(parts, [0, 1 << 20, 0, 0]);
    let (mmio, segment, plugged) = plugged(driver.function);
    segment.config_write(BDF, 0x18, &0xc010_0000_u32.to_le_bytes());
    segment.config_write(BDF, 0x1c, &0_u32.to_le_bytes());
    assert_eq!(windows.shown(), []);
    segment.config_write(BDF, 4, &[2, 0]);
    assert_eq!(windows.shown(), [(0xc010_0000, 1 << 20)]);
    segment.config_write(BDF, 0x18, &0xc020_0000_u32.to_le_bytes());
    assert_eq!(windows.shown(), [(0xc020_0000, 1 << 20)]);
    let mut data = [0];
    mmio.read(0xc020_0000, &mut data);
    assert_eq!(data, [0xff], "an access that misses the memory");
    drop(plugged);
    assert_eq!(windows.shown(), []);
}

#[test]
fn device_configuration_is_bounded_and_generations_count() {
    let device = Arc::default();
    let model = Still {
        device: Arc::clone(&device),
        ..Still::default()
    };
    let mut driver = Driver::new(|_| Box::new(model));
    driver.put_u32(0x2004, 0x1234_5678);
    assert_eq!(driver.read::<4>(0x2004), 0x1234_5678_u32.to_le_bytes());
    assert_eq!(driver.read::<4>(0x200c), [0xff; 4]);
    assert_eq!(driver.read::<8>(0x2008), [0xff; 8], "half outside");
    driver.put_u64(0x2008, 0);
    driver.start_full();
    let [before] = driver.read(0x15);
    device.lock().unwrap().as_ref().unwrap().config_changed();
    driver.interrupt(0);
    let [after] = driver.read(0x15);
    assert_eq!(after, before.wrapping_add(1));
    assert_eq!(driver.read(0x1000), [ISR_CONFIG]);
    assert_eq!(driver.read(0x1000), [0], "cleared by the read");
}

#[test]
fn a_model_that_refuses_to_start_is_stopped_once() {
    let stops = Arc::default();
    let model = Still {
        refuse: true,
        stops: Arc::clone(&stops),
        ..Still::default()
    };
    let mut driver = Driver::new(|_| Box::new(model));
    assert!(driver.negotiate(crate::features::COMMON));
    driver.driver_ok();
    assert_eq!(driver.status(), 0x4f);
    assert_eq!(stops.load(Ordering::SeqCst), 1);
    driver.set_status(0);
    assert_eq!(driver.status(), 0);
    assert_eq!(stops.load(Ordering::SeqCst), 1, "it never ran");
}

#[test]
fn doorbells_follow_the_bar_and_the_device() {
    let mut driver = driver();
    driver.start_full();
    let doorbells = driver.doorbells.clone();
    assert!(doorbells.addresses().is_empty(), "nothing is mapped yet");
    let (mmio, segment, plugged) = plugged(driver.function);
    segment.config_write(BDF, 4, &[2, 0]);
    assert_eq!(doorbells.addresses(), [LOW + 0x3000, LOW + 0x3004]);
    let moved = LOW + 0x8_0000;
    let low = u32::try_from(moved).unwrap();
    segment.config_write(BDF, 0x10, &low.to_le_bytes());
    assert_eq!(doorbells.addresses(), [moved + 0x3000, moved + 0x3004]);
    segment.config_write(BDF, 0x10, &[0xff; 4]);
    assert_eq!(doorbells.addresses().len(), 2, "sizing moves nothing");
    segment.config_write(BDF, 0x10, &low.to_le_bytes());
    segment.config_write(BDF, 4, &[0, 0]);
    assert!(doorbells.addresses().is_empty());
    segment.config_write(BDF, 4, &[2, 0]);
    assert_eq!(doorbells.addresses().len(), 2);
    mmio.write(moved + reg::STATUS, &[0]);
    assert!(doorbells.addresses().is_empty(), "reset");
    drop(plugged);
}

#[test]
fn only_enabled_queues_have_doorbells_and_unplugging_takes_them() {
    let mut driver = driver();
    assert!(driver.negotiate(crate::features::COMMON));
    driver.set_up(1, &crate::driver::Areas::of(1, 16));
    driver.driver_ok();
    assert_eq!(driver.status(), 0x0f);
    let doorbells = driver.doorbells.clone();
    let (_mmio, segment, plugged) = plugged(driver.function);
    segment.config_write(BDF, 4, &[2, 0]);
    assert_eq!(doorbells.addresses(), [LOW + 0x3004]);
    let function = plugged.unplug();
    assert!(doorbells.addresses().is_empty());
    drop(function);
}

#[test]
fn a_device_that_starts_in_a_mapped_bar_has_doorbells() {
    let mut driver = driver();
    driver.function.bar_moved(0, Some(LOW));
    assert!(driver.doorbells.addresses().is_empty());
    driver.start_full();
    assert_eq!(driver.doorbells.addresses(), [LOW + 0x3000, LOW + 0x3004]);
}

#[test]
fn kicks_trap_where_there_are_no_doorbells() {
    let mut driver = driver();
    driver.doorbells.refuse();
    driver.start_full();
    driver.function.bar_moved(0, Some(LOW));
    driver.kick(1);
    let kick = driver.function.device.kick(1).unwrap();
    assert_eq!(kick.read().unwrap(), 1);
    driver.kick(1);
    driver.set_status(0);
    let kick = driver.function.device.kick(1).unwrap();
    assert!(kick.read().is_err(), "a reset forgets kicks");
}

#[test]
fn vectors_out_of_range_read_back_as_none() {
    let mut driver = driver();
    for (vector, shown) in [(0, 0), (2, 2), (3, 0xffff), (0xffff, 0xffff)] {
        driver.put_u16(reg::CONFIG_VECTOR, vector);
        driver.put_u16(reg::QUEUE_VECTOR, vector);
        assert_eq!(driver.u16(reg::CONFIG_VECTOR), shown);
        assert_eq!(driver.u16(reg::QUEUE_VECTOR), shown);
    }
}

#[test]
fn too_many_queues_are_refused() {
    struct Wide(usize);
    impl VirtioModel for Wide {
        fn shape(&self) -> Shape {
            Shape {
                queues: vec![2; self.0],
                ..Still::default().shape()
            }
        }
        fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
        fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
        fn start(&mut self, _on: Activated) -> Result<(), ActivateError> {
            Ok(())
        }
        fn stop(&mut self) -> Queues {
            Vec::new()
        }
        fn saved_state(&self) -> SavedState {
            SavedState::Unsupported
        }
    }
    let make = |queues| {
        VirtioPci::new(
            Box::new(Wide(queues)),
            Wiring {
                ram: RamHandle::new(crate::driver::ram()),
                msi: &FakeMsi::default(),
                doorbells: Arc::new(FakeDoorbells::default()),
                windows: Arc::new(FakeWindows::default()),
            },
        )
    };
    assert!(matches!(
        make(256),
        Err(VirtioPciError::Queues { queues: 256, .. })
    ));
    assert!(make(255).is_ok());
}

proptest::proptest! {
    #[test]
    fn any_accesses_through_the_segment_are_survived(
        bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..1024),
    ) {
        let (mmio, segment, _plugged) = plugged(driver().function);
        segment.config_write(BDF, 4, &[2, 0]);
        fuzz::run(&segment, &mmio, &bytes);
    }
}
