use testudo_pci::regs;

use super::*;
use crate::testing::Letters;

struct Bench {
    device: I6300Esb,
    handle: WatchdogHandle,
    letters: Arc<Letters>,
}

impl Bench {
    fn new() -> Self {
        let letters = Letters::new();
        let (device, handle) = I6300Esb::new(letters.clone(), Arc::default()).unwrap();
        Self {
            device,
            handle,
            letters,
        }
    }

    fn write(&mut self, offset: u64, value: u32) {
        let at = Access { offset };
        if offset == RELOAD {
            let [a, b, ..] = value.to_le_bytes();
            self.device.bar_write(0, at, &[a, b]);
        } else {
            self.device.bar_write(0, at, &value.to_le_bytes());
        }
    }

    fn unlocked(&mut self, offset: u64, value: u32) {
        self.write(RELOAD, UNLOCK_FIRST);
        self.write(RELOAD, UNLOCK_SECOND);
        self.write(offset, value);
    }

    fn reload_register(&mut self) -> u16 {
        let mut data = [0; 2];
        self.device
            .bar_read(0, Access { offset: RELOAD }, &mut data);
        u16::from_le_bytes(data)
    }

    /// As Linux does it, with this many ticks in each stage.
    fn enable(&mut self, ticks: u32) {
        self.device.config_write(CONFIG, &[3, 0]);
        self.unlocked(PRELOAD_1, ticks);
        self.unlocked(PRELOAD_2, ticks);
        self.unlocked(RELOAD, RELOAD_TIMER);
        self.device.config_write(CONTROL, &[CONTROL_ENABLE]);
    }

    /// Serves the timer for so long, as the thread does that watches it.
    fn serve(&self, time: Duration) -> Vec<GuestEvent> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.handle.expired();
            std::thread::sleep(Duration::from_millis(1));
        }
        self.letters.take()
    }
}

/// Ticks of a stage that no pause of a busy machine is as long as: 0.3 s.
const LONG: u32 = 300;

impl Bench {
    /// What is told, waited for.
    fn told(&self) -> Vec<GuestEvent> {
        let limit = Instant::now() + Duration::from_secs(20);
        loop {
            let told = self.serve(Duration::from_millis(1));
            if !told.is_empty() {
                return told;
            }
            assert!(Instant::now() < limit, "nothing is told");
        }
    }
}

#[test]
fn drivers_find_it() {
    let bench = Bench::new();
    let config = bench.device.config();
    assert_eq!(config.get_u32(regs::VENDOR_ID), 0x25ab_8086);
    assert_eq!(config.get_u16(regs::CLASS + 1), 0x0880);
}

#[test]
fn a_guest_that_stops_reloading_is_told_of_once() {
    let mut bench = Bench::new();
    bench.enable(LONG);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(900) {
        assert!(bench.serve(Duration::from_millis(10)).is_empty());
        bench.unlocked(RELOAD, RELOAD_TIMER);
    }
    assert_eq!(bench.reload_register(), 0);
    assert_eq!(bench.told(), [GuestEvent::Watchdog]);
    assert_eq!(u32::from(bench.reload_register()), RELOAD_TIMED_OUT);
    assert!(bench.serve(Duration::from_millis(100)).is_empty());
    // It wakes up, and hangs again.
    bench.unlocked(RELOAD, RELOAD_TIMER | RELOAD_TIMED_OUT);
    assert_eq!(bench.reload_register(), 0);
    assert_eq!(bench.told(), [GuestEvent::Watchdog]);
}

#[test]
fn without_the_two_writes_nothing_counts() {
    let mut bench = Bench::new();
    bench.enable(20);
    bench.write(PRELOAD_1, 0xfffff);
    bench.write(RELOAD, UNLOCK_SECOND);
    bench.write(PRELOAD_1, 0xfffff);
    bench.write(RELOAD, UNLOCK_FIRST);
    bench.write(PRELOAD_1, 0xfffff);
    bench.write(RELOAD, UNLOCK_SECOND);
    bench.write(PRELOAD_1, 0xfffff);
    let mut data = [0; 4];
    bench
        .device
        .bar_read(0, Access { offset: PRELOAD_1 }, &mut data);
    assert_eq!(u32::from_le_bytes(data), 20);
    for _ in 0..20 {
        bench.write(RELOAD, RELOAD_TIMER);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(bench.told(), [GuestEvent::Watchdog]);
}

#[test]
fn disabling_stops_it_unless_it_is_locked() {
    let mut bench = Bench::new();
    bench.enable(LONG);
    bench.device.config_write(CONTROL, &[0]);
    assert!(bench.serve(Duration::from_millis(800)).is_empty());
    bench
        .device
        .config_write(CONTROL, &[CONTROL_ENABLE | CONTROL_LOCK]);
    bench.device.config_write(CONTROL, &[0]);
    let mut control = [0];
    bench.device.config_read(CONTROL, &mut control);
    assert_eq!(control, [CONTROL_ENABLE | CONTROL_LOCK]);
    assert_eq!(bench.told(), [GuestEvent::Watchdog]);
}

#[test]
fn an_output_that_is_off_is_silent() {
    let mut bench = Bench::new();
    bench.device.config_write(CONFIG, &[0x23, 0]);
    bench.unlocked(PRELOAD_1, 5);
    bench.unlocked(PRELOAD_2, 5);
    bench.device.config_write(CONTROL, &[CONTROL_ENABLE]);
    assert!(bench.serve(Duration::from_millis(60)).is_empty());
    assert_eq!(u32::from(bench.reload_register()), RELOAD_TIMED_OUT);
}

#[test]
fn a_pause_does_not_count() {
    let mut bench = Bench::new();
    bench.enable(LONG);
    bench.device.pause();
    assert!(bench.serve(Duration::from_millis(800)).is_empty());
    bench.unlocked(RELOAD, RELOAD_TIMER);
    bench.device.resume();
    let resumed = Instant::now();
    assert_eq!(bench.told(), [GuestEvent::Watchdog]);
    assert!(resumed.elapsed() > Duration::from_millis(500));
}

#[test]
fn the_last_time_out_is_known_after_a_reset() {
    let timed_out = Arc::new(AtomicBool::new(true));
    let (mut device, _handle) = I6300Esb::new(Letters::new(), Arc::clone(&timed_out)).unwrap();
    let mut data = [0; 2];
    device.bar_read(0, Access { offset: RELOAD }, &mut data);
    assert_eq!(u32::from(u16::from_le_bytes(data)), RELOAD_TIMED_OUT);
}

#[test]
fn accesses_of_any_width_and_place_are_survived() {
    let mut bench = Bench::new();
    for offset in 0..16 {
        for width in [1, 2, 4, 8] {
            let at = Access { offset };
            bench.device.bar_write(0, at, &vec![0x86; width]);
            bench.device.bar_write(0, at, &vec![0xff; width]);
            bench.device.bar_read(0, at, &mut vec![0; width]);
        }
    }
    for offset in 0..256 {
        bench.device.config_write(offset, &[0xff; 8]);
    }
    // No time at all, at the highest rate.
    bench.enable(0);
    bench.serve(Duration::from_millis(5));
}
