//! `/proc/PID/smaps`: what a VMM costs besides the memory of its guest.

/// A mapping this large is guest RAM: the VMM itself maps nothing near it.
const GUEST_RAM_KIB: u64 = 16 << 10;

/// The sum of `Pss` over all mappings but guest RAM, in KiB.
pub(crate) fn pss_without_guest_ram(smaps: &str) -> u64 {
    let (mut sum, mut size) = (0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else {
            continue;
        };
        match key {
            "Size:" => size = value.parse().unwrap_or(0),
            "Pss:" if size < GUEST_RAM_KIB => sum += value.parse::<u64>().unwrap_or(0),
            _ => {}
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_left_out() {
        let smaps = "00400000-00500000 r-xp 00000000 00:15 5 /bin/vmm\nSize: 1024 kB\nPss: 300 kB\nPss_Dirty: 9 kB\n\
                     7f0000000000-7f0010000000 rw-p 00000000 00:00 0\nSize: 262144 kB\nPss: 20000 kB\n\
                     7fff00000000-7fff00021000 rw-p 00000000 00:00 0 [stack]\nSize: 132 kB\nPss: 12 kB\n";
        assert_eq!(pss_without_guest_ram(smaps), 312);
    }
}
