//! `/proc/PID/smaps`: what a VMM costs besides the memory of its guest.

use std::fmt;

/// A mapping this large is guest RAM: the VMM itself maps nothing near it.
const GUEST_RAM_KIB: u64 = 16 << 10;
/// Mappings that a report names.
const NAMED: usize = 12;

/// Proportional set size, in KiB, without guest RAM.
pub struct Pss {
    /// The sum.
    pub kib: u64,
    /// Each mapping's share and name, the largest first.
    mappings: Vec<(u64, String)>,
}

impl Pss {
    /// Sums up the text of an `smaps` file.
    pub(crate) fn read(smaps: &str) -> Pss {
        let mut mappings: Vec<(u64, String)> = Vec::new();
        let (mut name, mut size) = (String::new(), 0);
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let (Some(key), Some(value)) = (words.next(), words.next()) else {
                continue;
            };
            match key {
                "Size:" => size = value.parse().unwrap_or(0),
                "Pss:" if size < GUEST_RAM_KIB => {
                    mappings.push((value.parse().unwrap_or(0), std::mem::take(&mut name)));
                }
                key if !key.ends_with(':') => {
                    // Address, access, offset, device, inode, path.
                    let path: Vec<&str> = words.skip(3).collect();
                    name = format!("{value} {}", path.join(" "));
                }
                _ => {}
            }
        }
        mappings.sort();
        mappings.reverse();
        Pss {
            kib: mappings.iter().map(|(kib, _)| kib).sum(),
            mappings,
        }
    }
}

/// The `VmFlags` of guest RAM (Documentation/filesystems/proc.rst): `sh` shared, `ht` hugetlb, `hg` and
/// `nh` transparent huge pages wanted or not, `mg` mergeable.
pub(crate) fn guest_ram_flags(smaps: &str) -> Vec<String> {
    let mut size = 0;
    for line in smaps.lines() {
        if let Some(value) = line.strip_prefix("Size:") {
            let kib = value.split_whitespace().next();
            size = kib.and_then(|k| k.parse().ok()).unwrap_or(0);
        }
        let Some(flags) = line.strip_prefix("VmFlags:") else {
            continue;
        };
        // Allocators reserve ranges that are as large, and not writable.
        let flags: Vec<String> = flags.split_whitespace().map(str::to_owned).collect();
        if size >= GUEST_RAM_KIB && flags.iter().any(|f| f == "wr") {
            return flags;
        }
    }
    Vec::new()
}

impl fmt::Display for Pss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named: Vec<String> = self
            .mappings
            .iter()
            .take(NAMED)
            .map(|(kib, name)| format!("{kib} {name}"))
            .collect();
        write!(f, "{} KiB ({})", self.kib, named.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_those_of_guest_ram() {
        let smaps = "Size: 132 kB\nVmFlags: rd wr gd\nSize: 65404 kB\nVmFlags: mr mw\n\
                     Size: 262144 kB\nVmFlags: rd wr mg hg\n";
        assert_eq!(guest_ram_flags(smaps), ["rd", "wr", "mg", "hg"]);
        assert!(guest_ram_flags("").is_empty());
    }

    #[test]
    fn guest_ram_is_left_out() {
        let smaps = "00400000-00500000 r-xp 00000000 00:15 5 /bin/vmm\nSize: 1024 kB\nPss: 300 kB\nPss_Dirty: 9 kB\n\
                     7f0000000000-7f0010000000 rw-p 00000000 00:00 0\nSize: 262144 kB\nPss: 20000 kB\n\
                     7fff00000000-7fff00021000 rw-p 00000000 00:00 0 [stack]\nSize: 132 kB\nPss: 12 kB\n";
        let pss = Pss::read(smaps);
        assert_eq!(pss.kib, 312);
        assert_eq!(
            pss.to_string(),
            "312 KiB (300 r-xp /bin/vmm, 12 rw-p [stack])"
        );
    }
}
