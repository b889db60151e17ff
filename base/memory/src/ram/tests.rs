//! Guest RAM and its listeners.

use std::num::NonZeroUsize;
use std::sync::Mutex;

use vm_memory::{Bytes, GuestMemoryBackend};

use super::*;
use crate::{HugePages, Prefault, Share};

const MIB: u64 = 1 << 20;

type Log = Arc<Mutex<Vec<String>>>;

struct Listener {
    name: &'static str,
    log: Log,
    refuse_add: Option<u64>,
    refuse_remove: bool,
}

impl Listener {
    fn new(name: &'static str, log: &Log) -> Self {
        let log = Arc::clone(log);
        Self {
            name,
            log,
            refuse_add: None,
            refuse_remove: false,
        }
    }
}

impl RamListener for Listener {
    fn name(&self) -> &'static str {
        self.name
    }
    fn added(&mut self, range: &RamRange) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if self.refuse_add == Some(range.gpa) {
            return Err("no".into());
        }
        self.log
            .lock()
            .unwrap()
            .push(format!("{}+{:x}", self.name, range.gpa));
        Ok(())
    }
    fn removed(
        &mut self,
        range: &RamRange,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if self.refuse_remove {
            return Err("no".into());
        }
        self.log
            .lock()
            .unwrap()
            .push(format!("{}-{:x}", self.name, range.gpa));
        Ok(())
    }
}

fn take(log: &Log) -> String {
    std::mem::take(&mut *log.lock().unwrap()).join(" ")
}

#[test]
fn listeners_hear_in_order_and_in_reverse() {
    let log = Log::default();
    let mut ram = GuestRam::new();
    ram.add(0, 2 * MIB, &Backing::default()).unwrap();
    ram.listen(Box::new(Listener::new("a", &log))).unwrap();
    ram.listen(Box::new(Listener::new("b", &log))).unwrap();
    assert_eq!(take(&log), "a+0 b+0");
    ram.add(4 * MIB, 2 * MIB, &Backing::default()).unwrap();
    assert_eq!(take(&log), "a+400000 b+400000");
    ram.remove(0).unwrap();
    assert_eq!(take(&log), "b-0 a-0");
    assert_eq!(ram.size(), 2 * MIB);
    assert_eq!(ram.view().num_regions(), 1);
    assert!(matches!(ram.remove(0), Err(RamError::Absent { gpa: 0 })));
}

#[test]
fn a_refused_add_is_taken_back() {
    let log = Log::default();
    let mut ram = GuestRam::new();
    ram.listen(Box::new(Listener::new("a", &log))).unwrap();
    let b = Listener {
        refuse_add: Some(0),
        ..Listener::new("b", &log)
    };
    ram.listen(Box::new(b)).unwrap();
    let error = ram.add(0, 2 * MIB, &Backing::default()).unwrap_err();
    assert!(
        matches!(error, RamError::Refused { listener: "b", .. }),
        "{error}"
    );
    assert_eq!(take(&log), "a+0 a-0");
    assert_eq!(ram.size(), 0);
    assert_eq!(ram.view().num_regions(), 0);
}

#[test]
fn a_refused_remove_leaves_the_range() {
    let log = Log::default();
    let mut ram = GuestRam::new();
    let a = Listener {
        refuse_remove: true,
        ..Listener::new("a", &log)
    };
    ram.listen(Box::new(a)).unwrap();
    ram.listen(Box::new(Listener::new("b", &log))).unwrap();
    ram.add(0, 2 * MIB, &Backing::default()).unwrap();
    ram.view().write_obj(7u32, GuestAddress(16)).unwrap();
    ram.remove(0).unwrap_err();
    assert_eq!(take(&log), "a+0 b+0 b-0 b+0");
    assert_eq!(ram.view().read_obj::<u32>(GuestAddress(16)).unwrap(), 7);
}

#[test]
fn recycled_ram_is_zero_and_nobody_listens() {
    let log = Log::default();
    for share in [Share::Private, Share::Shared] {
        let mut ram = GuestRam::new();
        ram.listen(Box::new(Listener::new("a", &log))).unwrap();
        ram.add(
            0,
            2 * MIB,
            &Backing {
                share,
                ..Backing::default()
            },
        )
        .unwrap();
        ram.view().write_obj(7u32, GuestAddress(16)).unwrap();
        take(&log);
        ram.recycle().unwrap();
        assert_eq!(ram.view().read_obj::<u32>(GuestAddress(16)).unwrap(), 0);
        ram.listen(Box::new(Listener::new("b", &log))).unwrap();
        assert_eq!(take(&log), "b+0");
    }
}

#[test]
fn overlap_and_emptiness_are_refused() {
    let mut ram = GuestRam::new();
    ram.add(2 * MIB, 2 * MIB, &Backing::default()).unwrap();
    for (gpa, size) in [(MIB, 2 * MIB), (3 * MIB, MIB), (8 * MIB, 0), (u64::MAX, 2)] {
        let error = ram.add(gpa, size, &Backing::default()).unwrap_err();
        assert!(
            matches!(error, RamError::Overlap { .. }),
            "{gpa:#x}+{size:#x}: {error}"
        );
    }
}

#[test]
fn shared_ram_is_visible_through_its_file_and_sealed() {
    let backing = Backing {
        share: Share::Shared,
        prefault: Some(Prefault {
            threads: NonZeroUsize::new(3).unwrap(),
        }),
        ..Backing::default()
    };
    let mut ram = GuestRam::new();
    ram.add(0, 16 * MIB, &backing).unwrap();
    ram.view()
        .write_obj(0x5a5a_u16, GuestAddress(4096))
        .unwrap();
    let file = ram.ranges().next().unwrap().file.clone().unwrap();
    let mut word = [0; 2];
    std::os::unix::fs::FileExt::read_exact_at(&*file, &mut word, 4096).unwrap();
    assert_eq!(word, [0x5a; 2]);
    assert!(file.set_len(0).is_err(), "a peer may not shrink guest RAM");
}

#[test]
fn mappings_suit_huge_pages_and_sizes_must_too() {
    let mut ram = GuestRam::new();
    ram.add(0, 3 * MIB, &Backing::default()).unwrap();
    assert!(ram.ranges().next().unwrap().host.is_multiple_of(2 << 20));
    let huge = Backing {
        huge: HugePages::Huge1G,
        ..Backing::default()
    };
    let error = ram.add(1 << 30, 3 * MIB, &huge).unwrap_err();
    assert_eq!(
        error.to_string(),
        "3 MiB of guest RAM is not a multiple of the 1024 MiB huge page; round the memory size up"
    );
}

#[test]
fn a_view_taken_before_a_removal_stays_safe_to_use() {
    let mut ram = GuestRam::new();
    ram.add(0, 2 * MIB, &Backing::default()).unwrap();
    let stale = ram.view();
    stale.write_obj(1u8, GuestAddress(0)).unwrap();
    ram.remove(0).unwrap();
    assert_eq!(stale.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
}

/// What /proc/self/smaps says of the mapping that holds `address`.
fn vm_flags(address: usize) -> String {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in smaps.lines() {
        let range = line.split(' ').next().and_then(|r| r.split_once('-'));
        let bounds = range.and_then(|(start, end)| {
            let hex = |s| usize::from_str_radix(s, 16).ok();
            Some(hex(start)?..hex(end)?)
        });
        if let Some(bounds) = bounds {
            inside = bounds.contains(&address);
        } else if inside && let Some(flags) = line.strip_prefix("VmFlags:") {
            return flags.to_owned();
        }
    }
    panic!("no mapping holds {address:#x}");
}

#[test]
fn transparent_huge_pages_are_asked_for_or_refused() {
    if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
        println!("SKIP transparent_huge_pages: this host's kernel has none");
        return;
    }
    for (huge, flag) in [(HugePages::Transparent, "hg"), (HugePages::Never, "nh")] {
        let mut ram = GuestRam::new();
        let backing = Backing {
            huge,
            ..Backing::default()
        };
        ram.add(0, 4 * MIB, &backing).unwrap();
        let flags = vm_flags(ram.ranges().next().unwrap().host);
        assert!(flags.split(' ').any(|f| f == flag), "{huge:?}: {flags}");
        assert!(
            flags.split(' ').any(|f| f == "dd"),
            "not in core dumps: {flags}"
        );
    }
}

fn resident_kib(address: usize) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in smaps.lines() {
        let range = line.split(' ').next().and_then(|r| r.split_once('-'));
        let hex = |s| usize::from_str_radix(s, 16).ok();
        if let Some((start, end)) = range.and_then(|(s, e)| Some((hex(s)?, hex(e)?))) {
            inside = (start..end).contains(&address);
        } else if inside && let Some(kib) = line.strip_prefix("Rss:") {
            return kib.trim().trim_end_matches(" kB").parse().unwrap();
        }
    }
    panic!("no mapping holds {address:#x}");
}

#[test]
fn prefaulted_ram_is_faulted_in_again_when_it_is_recycled() {
    let threads = NonZeroUsize::new(2).unwrap();
    for share in [Share::Private, Share::Shared] {
        let backing = Backing {
            share,
            prefault: Some(Prefault { threads }),
            ..Backing::default()
        };
        let mut ram = GuestRam::new();
        ram.add(0, 16 * MIB, &backing).unwrap();
        let host = ram.ranges().next().unwrap().host;
        assert!(resident_kib(host) >= 16 << 10);
        ram.view().write_obj(7u32, GuestAddress(16)).unwrap();
        ram.recycle().unwrap();
        assert_eq!(ram.view().read_obj::<u32>(GuestAddress(16)).unwrap(), 0);
        assert!(resident_kib(host) >= 16 << 10, "{share:?}");
    }
}

#[test]
fn a_range_that_comes_and_goes_uses_the_same_addresses_and_comes_empty() {
    for share in [Share::Private, Share::Shared] {
        let backing = Backing {
            share,
            ..Backing::default()
        };
        let mut ram = GuestRam::new();
        ram.add(0, 2 * MIB, &backing).unwrap();
        let mut hosts = Vec::new();
        for _ in 0..3 {
            ram.add(8 * MIB, 16 * MIB, &backing).unwrap();
            let stale = ram.view();
            let at = GuestAddress(9 * MIB);
            assert_eq!(stale.read_obj::<u32>(at).unwrap(), 0);
            stale.write_obj(7u32, at).unwrap();
            let host = ram.ranges().last().unwrap().host;
            ram.remove(8 * MIB).unwrap();
            // A worker that still holds the view does no harm.
            stale.write_obj(7u32, at).unwrap();
            hosts.push(host);
        }
        assert!(hosts.iter().all(|h| *h == hosts[0]), "{hosts:x?}");
        assert_eq!(ram.size(), 2 * MIB);
    }
}

#[test]
fn a_refused_range_may_be_added_later() {
    let log = Log::default();
    let mut ram = GuestRam::new();
    let refuses = Listener {
        refuse_add: Some(0),
        ..Listener::new("a", &log)
    };
    ram.listen(Box::new(refuses)).unwrap();
    ram.add(0, 2 * MIB, &Backing::default()).unwrap_err();
    ram.recycle().unwrap();
    ram.add(0, 2 * MIB, &Backing::default()).unwrap();
    assert_eq!(ram.size(), 2 * MIB);
}

#[test]
fn parts_of_a_range_are_given_back_and_faulted_in() {
    let mut ram = GuestRam::new();
    ram.add(0, 8 * MIB, &Backing::default()).unwrap();
    let view = ram.view();
    view.write_obj(7u32, GuestAddress(2 * MIB)).unwrap();
    view.write_obj(7u32, GuestAddress(4 * MIB)).unwrap();
    ram.discard(2 * MIB, 2 * MIB).unwrap();
    assert_eq!(view.read_obj::<u32>(GuestAddress(2 * MIB)).unwrap(), 0);
    assert_eq!(view.read_obj::<u32>(GuestAddress(4 * MIB)).unwrap(), 7);
    let threads = NonZeroUsize::MIN;
    ram.prefault(0, 8 * MIB, Prefault { threads }).unwrap();
    let host = ram.ranges().next().unwrap().host;
    assert!(resident_kib(host) >= 8 << 10);
    for (gpa, size) in [(0, 9 * MIB), (u64::MAX, 1), (8 * MIB, 1), (1, u64::MAX)] {
        assert!(ram.discard(gpa, size).is_err());
        assert!(ram.prefault(gpa, size, Prefault { threads }).is_err());
    }
}
