//! Proleptic Gregorian calendar arithmetic on a clock's registers, total for every input.
//!
//! Days are counted in 400-year eras that begin on 1 March, so that the leap day is the last of
//! its year and month lengths follow one linear rule.

const DAY_SECONDS: i64 = 86_400;
const ERA_DAYS: i64 = 146_097;
/// Days from 0000-03-01 to 1970-01-01.
const EPOCH_DAYS: i64 = 719_468;
/// The years a clock with a century register can show.
const YEARS: std::ops::RangeInclusive<i64> = 0..=9_999;

/// A time of day and a date as registers hold them; fields may be out of range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Civil {
    year: i64,
    pub(super) month: u8,
    pub(super) day: u8,
    pub(super) hour: u8,
    pub(super) minute: u8,
    pub(super) second: u8,
}

fn byte(value: i64) -> u8 {
    u8::try_from(value).unwrap_or(0)
}

#[allow(
    clippy::arithmetic_side_effects,
    reason = "every operand is bounded: seconds and days are clamped to years 0 to 9999 first"
)]
impl Civil {
    pub(super) fn from_unix(seconds: i64) -> Self {
        let seconds = seconds.clamp(Self::first().to_unix(), Self::last().to_unix());
        let of_day = seconds.rem_euclid(DAY_SECONDS);
        let days = seconds.div_euclid(DAY_SECONDS) + EPOCH_DAYS;
        let era = days.div_euclid(ERA_DAYS);
        let of_era = days.rem_euclid(ERA_DAYS);
        let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * of_year + 2) / 153;
        let day = of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = (shifted_month + 2) % 12 + 1;
        let january_or_february = i64::from(month <= 2);
        Self {
            year: year_of_era + era * 400 + january_or_february,
            month: byte(month),
            day: byte(day),
            hour: byte(of_day / 3_600),
            minute: byte(of_day / 60 % 60),
            second: byte(of_day % 60),
        }
    }

    /// Seconds since 1970-01-01; out-of-range fields carry over or, for the month, wrap.
    pub(super) fn to_unix(self) -> i64 {
        let month = (i64::from(self.month) + 11) % 12;
        let shifted_month = (month + 10) % 12;
        let year = self.year - i64::from(month < 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let of_year = (153 * shifted_month + 2) / 5 + i64::from(self.day) - 1;
        let of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year;
        let days = era * ERA_DAYS + of_era - EPOCH_DAYS;
        days * DAY_SECONDS
            + i64::from(self.hour) * 3_600
            + i64::from(self.minute) * 60
            + i64::from(self.second)
    }

    /// 1 is Sunday.
    pub(super) fn weekday(self) -> u8 {
        let days = self.to_unix().div_euclid(DAY_SECONDS);
        byte((days + 4).rem_euclid(7) + 1)
    }

    pub(super) fn year_of_century(self) -> u8 {
        byte(self.year.rem_euclid(100))
    }

    pub(super) fn century(self) -> u8 {
        byte(self.year.div_euclid(100))
    }

    pub(super) fn set_year_of_century(&mut self, year: u8) {
        self.set_year(i64::from(self.century()) * 100 + i64::from(year));
    }

    pub(super) fn set_century(&mut self, century: u8) {
        self.set_year(i64::from(century) * 100 + i64::from(self.year_of_century()));
    }

    fn set_year(&mut self, year: i64) {
        self.year = year.clamp(*YEARS.start(), *YEARS.end());
    }

    fn first() -> Self {
        Self {
            year: *YEARS.start(),
            month: 1,
            day: 1,
            hour: 0,
            minute: 0,
            second: 0,
        }
    }

    fn last() -> Self {
        Self {
            year: *YEARS.end(),
            month: 12,
            day: 31,
            hour: 23,
            minute: 59,
            second: 59,
        }
    }
}

/// Binary to packed BCD; values above 99 show their last two digits.
pub(super) fn to_bcd(value: u8) -> u8 {
    let value = value % 100;
    ((value / 10) << 4) | (value % 10)
}

/// Packed BCD to binary; digits above 9 count as they are.
pub(super) fn from_bcd(value: u8) -> u8 {
    (value >> 4).saturating_mul(10).saturating_add(value & 0x0f)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments() {
        let epoch = Civil::from_unix(0);
        assert_eq!((epoch.year, epoch.month, epoch.day), (1970, 1, 1));
        assert_eq!(epoch.weekday(), 5, "a Thursday");
        let leap = Civil::from_unix(951_782_400);
        assert_eq!((leap.year, leap.month, leap.day), (2000, 2, 29));
        assert_eq!(leap.weekday(), 3, "a Tuesday");
    }

    #[test]
    fn every_day_of_four_centuries_comes_back() {
        let start = Civil::from_unix(-11_676_096_000).to_unix();
        let mut previous = Civil::from_unix(start - DAY_SECONDS);
        for day in 0..ERA_DAYS {
            let seconds = start + day * DAY_SECONDS + day % DAY_SECONDS;
            let civil = Civil::from_unix(seconds);
            assert_eq!(civil.to_unix(), seconds);
            assert_ne!((civil.month, civil.day), (previous.month, previous.day));
            assert_eq!(civil.weekday(), previous.weekday() % 7 + 1);
            previous = civil;
        }
    }

    #[test]
    fn bcd_round_trip() {
        for value in 0..100 {
            assert_eq!(from_bcd(to_bcd(value)), value);
        }
    }
}
