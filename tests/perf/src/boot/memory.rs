//! A VMM's own memory: its proportional set size without the guest's RAM.

use std::fs;

use anyhow::{Context, Result};

/// PSS of process `pid` in KiB, mappings of at least half the guest's RAM left out: those are the
/// guest's RAM, whose size is the guest's affair.
pub(crate) fn pss_without_guest_ram(pid: u32, guest_ram: u64) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    Ok(sum(&text, guest_ram / 2 / 1024))
}

fn sum(smaps: &str, large_kib: u64) -> u64 {
    let mut size = 0;
    let mut total = 0;
    for line in smaps.lines() {
        if let Some(kib) = field(line, "Size:") {
            size = kib;
        }
        if let Some(kib) = field(line, "Pss:")
            && size < large_kib
        {
            total += kib;
        }
    }
    total
}

fn field(line: &str, name: &str) -> Option<u64> {
    line.strip_prefix(name)?
        .trim()
        .strip_suffix(" kB")?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_left_out() {
        let smaps = "\
7f00-7f01 rw-p 00000000 00:00 0
Size:             262144 kB
Rss:               90000 kB
Pss:               90000 kB
5500-5501 r-xp 00000000 00:01 7 /run/testudo-vmm
Size:               1200 kB
Pss:                 600 kB
Pss_Dirty:           600 kB
";
        assert_eq!(sum(smaps, 128 << 10), 600);
    }
}
