//! A VMM's own memory: its proportional set size without the guest's RAM.

use std::fs;

use anyhow::{Context, Result};

/// PSS of process `pid` in KiB, without the guest's RAM, whose size is the guest's affair: runs of
/// adjacent mappings that together have at least half its size. (A VMM may treat parts of guest RAM
/// differently, which makes several mappings of it.)
pub fn pss_without_guest_ram(pid: u32, guest_ram: u64) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    Ok(sum(&text, guest_ram / 2 / 1024))
}

fn sum(smaps: &str, large_kib: u64) -> u64 {
    let mut total = 0;
    let mut run = Run::default();
    for line in smaps.lines() {
        if let Some((start, end)) = range(line) {
            if start != run.end {
                total += std::mem::take(&mut run).counted(large_kib);
            }
            run.end = end;
        }
        run.size_kib += field(line, "Size:").unwrap_or(0);
        run.pss_kib += field(line, "Pss:").unwrap_or(0);
    }
    total + run.counted(large_kib)
}

/// Adjacent mappings.
#[derive(Default)]
struct Run {
    end: u64,
    size_kib: u64,
    pss_kib: u64,
}

impl Run {
    fn counted(self, large_kib: u64) -> u64 {
        if self.size_kib < large_kib {
            self.pss_kib
        } else {
            0
        }
    }
}

/// `7f0000000000-7f0010000000 rw-p …`
fn range(line: &str) -> Option<(u64, u64)> {
    let (range, _) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    Some((
        u64::from_str_radix(start, 16).ok()?,
        u64::from_str_radix(end, 16).ok()?,
    ))
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
55500000-55510000 r-xp 00000000 00:01 7 /run/testudo-vmm
Size:               1200 kB
Pss:                 600 kB
Pss_Dirty:           600 kB
7f0000000000-7f0000200000 rw-p 00000000 00:00 0
Size:               2048 kB
Pss:                  88 kB
7f0000200000-7f0010000000 rw-p 00000000 00:00 0
Size:             260096 kB
Pss:               90000 kB
7f0010001000-7f0010002000 rw-p 00000000 00:00 0
Size:                  4 kB
Pss:                   4 kB
";
        assert_eq!(sum(smaps, 128 << 10), 604);
    }
}
