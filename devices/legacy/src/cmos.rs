//! The MC146818 real-time clock and its CMOS RAM, behind an index and a data port (0x70, 0x71).
//!
//! The clock counts UTC. Nothing ticks: the time registers are computed when they are read, as
//! host time plus the offset the guest set. Update-in-progress therefore always reads 0, and no
//! guest waits for it. Periodic, alarm and update-ended interrupts do not exist; alarm registers
//! and plain CMOS RAM keep what is written. The NMI mask in bit 7 of the index is ignored.
//!
//! ```text
//!   running ──write B.SET=1──▶ set: registers frozen at the moment of SET, writes change them
//!      ▲                        │
//!      └──────write B.SET=0─────┘  the frozen registers become the time; offset = them − host
//! ```
//! A time register written while running takes effect at once, by the same arithmetic.

mod calendar;

use std::time::{SystemTime, UNIX_EPOCH};

use testudo_bus::{Access, Device, fill_absent};

use calendar::Civil;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

/// 32.768 kHz time base, 1.024 kHz rate: what a PC's firmware leaves behind.
const STATUS_A_DEFAULT: u8 = 0x26;
const STATUS_A_WRITABLE: u8 = 0x7f;
const STATUS_B_SET: u8 = 1 << 7;
const STATUS_B_BINARY: u8 = 1 << 2;
const STATUS_B_24H: u8 = 1 << 1;
const STATUS_B_DAYLIGHT: u8 = 1 << 0;
const STATUS_D_VALID: u8 = 1 << 7;
const HOUR_PM: u8 = 1 << 7;

const INDEX_MASK: u8 = 0x7f;

/// Seconds since 1970-01-01 UTC by the host's clock.
pub type HostClock = Box<dyn Fn() -> i64 + Send>;

/// The clock and its RAM. Offset 0 is the index port, 1 the data port.
pub struct Cmos {
    clock: HostClock,
    offset: i64,
    frozen: Option<Civil>,
    index: u8,
    status_a: u8,
    status_b: u8,
    ram: [u8; 128],
}

impl Default for Cmos {
    fn default() -> Self {
        Self::new()
    }
}

impl Cmos {
    /// Bytes of the port range.
    pub const LEN: u64 = 2;

    /// A clock that starts at the host's time.
    pub fn new() -> Self {
        Self::with_clock(Box::new(|| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH);
            since.map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(0))
        }))
    }

    /// A clock that takes host time from `clock`.
    pub fn with_clock(clock: HostClock) -> Self {
        Self {
            clock,
            offset: 0,
            frozen: None,
            index: 0,
            status_a: STATUS_A_DEFAULT,
            status_b: STATUS_B_24H,
            ram: [0; 128],
        }
    }

    fn now(&self) -> Civil {
        self.frozen
            .unwrap_or_else(|| Civil::from_unix((self.clock)().saturating_add(self.offset)))
    }

    fn set_time(&mut self, time: Civil) {
        match &mut self.frozen {
            Some(frozen) => *frozen = time,
            None => self.offset = time.to_unix().saturating_sub((self.clock)()),
        }
    }

    fn encode(&self, value: u8) -> u8 {
        if self.status_b & STATUS_B_BINARY != 0 {
            value
        } else {
            calendar::to_bcd(value)
        }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.status_b & STATUS_B_BINARY != 0 {
            value
        } else {
            calendar::from_bcd(value)
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.status_b & STATUS_B_24H != 0 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { HOUR_PM } else { 0 };
        let twelve = match hour % 12 {
            0 => 12,
            h => h,
        };
        self.encode(twelve) | pm
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.status_b & STATUS_B_24H != 0 {
            return self.decode(value);
        }
        let hour = self.decode(value & !HOUR_PM) % 12;
        if value & HOUR_PM != 0 {
            hour.saturating_add(12)
        } else {
            hour
        }
    }

    fn read_register(&mut self, index: u8) -> u8 {
        match index {
            SECONDS => self.encode(self.now().second),
            MINUTES => self.encode(self.now().minute),
            HOURS => self.encode_hour(self.now().hour),
            WEEKDAY => self.encode(self.now().weekday()),
            DAY => self.encode(self.now().day),
            MONTH => self.encode(self.now().month),
            YEAR => self.encode(self.now().year_of_century()),
            CENTURY => self.encode(self.now().century()),
            STATUS_A => self.status_a,
            STATUS_B => self.status_b,
            STATUS_C => 0,
            STATUS_D => STATUS_D_VALID,
            _ => self.ram.get(usize::from(index)).copied().unwrap_or(0xff),
        }
    }

    fn write_register(&mut self, index: u8, value: u8) {
        let mut time = self.now();
        match index {
            SECONDS => time.second = self.decode(value),
            MINUTES => time.minute = self.decode(value),
            HOURS => time.hour = self.decode_hour(value),
            DAY => time.day = self.decode(value),
            MONTH => time.month = self.decode(value),
            YEAR => time.set_year_of_century(self.decode(value)),
            CENTURY => time.set_century(self.decode(value)),
            STATUS_A => self.status_a = value & STATUS_A_WRITABLE,
            STATUS_B => self.write_status_b(value),
            // The weekday follows from the date.
            WEEKDAY | STATUS_C | STATUS_D => {}
            _ => {
                if let Some(cell) = self.ram.get_mut(usize::from(index)) {
                    *cell = value;
                }
            }
        }
        if matches!(
            index,
            SECONDS | MINUTES | HOURS | DAY | MONTH | YEAR | CENTURY
        ) {
            self.set_time(time);
        }
    }

    fn write_status_b(&mut self, value: u8) {
        let kept = STATUS_B_SET | STATUS_B_BINARY | STATUS_B_24H | STATUS_B_DAYLIGHT;
        self.status_b = value & kept;
        let set = value & STATUS_B_SET != 0;
        match self.frozen {
            None if set => self.frozen = Some(self.now()),
            Some(time) if !set => {
                self.frozen = None;
                self.set_time(time);
            }
            _ => {}
        }
    }
}

impl Device for Cmos {
    fn read(&mut self, at: Access, data: &mut [u8]) {
        fill_absent(data);
        if at.offset == 1
            && let [byte] = data
        {
            *byte = self.read_register(self.index);
        }
    }

    fn write(&mut self, at: Access, data: &[u8]) {
        match (at.offset, data) {
            (0, [index]) => self.index = index & INDEX_MASK,
            (0, [index, value]) => {
                self.index = index & INDEX_MASK;
                self.write_register(self.index, *value);
            }
            (1, [value]) => self.write_register(self.index, *value),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicI64, Ordering};

    use super::*;
    use crate::testing::{read, write};

    /// 2026-11-23 09:31:58 UTC, a Monday.
    const THEN: i64 = 1_795_426_318;

    fn clock(at: i64) -> (Cmos, Arc<AtomicI64>) {
        let now = Arc::new(AtomicI64::new(at));
        let host = Arc::clone(&now);
        let cmos = Cmos::with_clock(Box::new(move || host.load(Ordering::SeqCst)));
        (cmos, now)
    }

    fn get(cmos: &mut Cmos, index: u8) -> u8 {
        write(cmos, 0, index);
        read(cmos, 1)
    }

    fn set(cmos: &mut Cmos, index: u8, value: u8) {
        write(cmos, 0, index);
        write(cmos, 1, value);
    }

    fn date(cmos: &mut Cmos) -> [u8; 7] {
        [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS].map(|i| get(cmos, i))
    }

    #[test]
    fn host_time_in_bcd_and_in_binary() {
        let (mut cmos, _) = clock(THEN);
        assert_eq!(date(&mut cmos), [0x20, 0x26, 0x11, 0x23, 0x09, 0x31, 0x58]);
        assert_eq!(get(&mut cmos, WEEKDAY), 2);
        set(&mut cmos, STATUS_B, STATUS_B_24H | STATUS_B_BINARY);
        assert_eq!(date(&mut cmos), [20, 26, 11, 23, 9, 31, 58]);
    }

    #[test]
    fn twelve_hour_mode_marks_the_afternoon() {
        let (mut cmos, now) = clock(THEN);
        set(&mut cmos, STATUS_B, 0);
        for (hour, shown) in [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (23, 0x91)] {
            now.store(hour * 3600, Ordering::SeqCst);
            assert_eq!(get(&mut cmos, HOURS), shown, "{hour} h");
            set(&mut cmos, HOURS, shown);
            assert_eq!(get(&mut cmos, HOURS), shown, "{hour} h after writing it");
        }
    }

    #[test]
    fn set_mode_freezes_and_then_keeps_an_offset() {
        let (mut cmos, now) = clock(THEN);
        set(&mut cmos, STATUS_B, STATUS_B_SET | STATUS_B_24H);
        now.fetch_add(100, Ordering::SeqCst);
        assert_eq!(get(&mut cmos, SECONDS), 0x58, "frozen");
        for (index, value) in [
            (CENTURY, 0x19),
            (YEAR, 0x99),
            (MONTH, 0x12),
            (DAY, 0x31),
            (HOURS, 0x23),
            (MINUTES, 0x59),
            (SECONDS, 0x59),
        ] {
            set(&mut cmos, index, value);
        }
        set(&mut cmos, STATUS_B, STATUS_B_24H);
        assert_eq!(get(&mut cmos, SECONDS), 0x59);
        now.fetch_add(1, Ordering::SeqCst);
        assert_eq!(date(&mut cmos), [0x20, 0x00, 0x01, 0x01, 0, 0, 0]);
    }

    #[test]
    fn no_update_is_ever_in_progress_and_the_ram_is_valid() {
        let (mut cmos, _) = clock(THEN);
        set(&mut cmos, STATUS_A, 0xff);
        assert_eq!(get(&mut cmos, STATUS_A) & 0x80, 0);
        assert_eq!(get(&mut cmos, STATUS_D), STATUS_D_VALID);
        assert_eq!(get(&mut cmos, STATUS_C), 0);
    }

    #[test]
    fn ram_and_alarms_keep_what_is_written_and_bit_7_is_the_nmi_mask() {
        let (mut cmos, _) = clock(THEN);
        for index in [0x01, 0x03, 0x05, 0x0f, 0x40, 0x7f] {
            set(&mut cmos, index | 0x80, index ^ 0x5a);
            assert_eq!(get(&mut cmos, index), index ^ 0x5a);
        }
        assert_eq!(read(&mut cmos, 0), 0xff, "the index port is write-only");
    }

    #[test]
    fn nonsense_times_are_taken_without_a_fault() {
        let (mut cmos, _) = clock(THEN);
        for value in [0xff, 0x00, 0xa5, 0x99] {
            for index in 0..0x80 {
                set(&mut cmos, index, value);
                get(&mut cmos, index);
            }
        }
        let (mut cmos, _) = clock(i64::MAX);
        date(&mut cmos);
        let (mut cmos, _) = clock(i64::MIN);
        date(&mut cmos);
    }
}
