//! The kernel log, told between `DMESG begin` and `DMESG end`: `<LEVEL> SECONDS.MICROS text`.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;

use crate::console::Console;

/// Each read of `/dev/kmsg` gives one record, of at most this size.
const RECORD: usize = 8192;
const EPIPE: i32 = 32;

/// Prints the records of `level` (0 emergency … 7 debug) and worse; returns how many there were.
pub(crate) fn print(console: &mut Console, level: u8) -> io::Result<usize> {
    let mut log = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg")?;
    let mut record = vec![0; RECORD];
    let mut printed = 0_usize;
    console.line("DMESG begin");
    loop {
        let length = match log.read(&mut record) {
            Ok(length) => length,
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            // The ring was overwritten below the reader, which now stands at the oldest record.
            Err(e) if e.raw_os_error() == Some(EPIPE) => continue,
            Err(e) => return Err(e),
        };
        let text = String::from_utf8_lossy(record.get(..length).unwrap_or_default());
        if let Some(r) = Record::parse(&text).filter(|r| r.level <= level) {
            let (seconds, micros) = (r.micros / 1_000_000, r.micros % 1_000_000);
            console.line(format_args!(
                "<{}> {seconds}.{micros:06} {}",
                r.level, r.text
            ));
            printed = printed.saturating_add(1);
        }
    }
    console.line("DMESG end");
    Ok(printed)
}

/// `prefix,sequence,microseconds,flags[,…];text`, then lines of ` KEY=value`
/// (Documentation/ABI/testing/dev-kmsg).
#[derive(Debug, PartialEq, Eq)]
struct Record<'a> {
    level: u8,
    micros: u64,
    text: &'a str,
}

impl Record<'_> {
    fn parse(record: &str) -> Option<Record<'_>> {
        let (head, body) = record.split_once(';')?;
        let mut fields = head.split(',');
        let prefix: u64 = fields.next()?.parse().ok()?;
        let micros = fields.nth(1)?.parse().ok()?;
        Some(Record {
            level: u8::try_from(prefix & 7).ok()?,
            micros,
            text: body.lines().next()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_level_time_and_first_line() {
        let record = "6,339,5140900,-;NET: Registered protocol family 10\n SUBSYSTEM=net\n";
        let parsed = Record::parse(record).unwrap();
        let text = "NET: Registered protocol family 10";
        assert_eq!(
            parsed,
            Record {
                level: 6,
                micros: 5_140_900,
                text
            }
        );
    }

    #[test]
    fn the_facility_is_not_part_of_the_level() {
        assert_eq!(
            Record::parse("12,1,2,-;from user space\n").unwrap().level,
            4
        );
        assert_eq!(Record::parse("no record"), None);
    }
}
