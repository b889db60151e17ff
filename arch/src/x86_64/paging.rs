//! Four-level page tables that map addresses to themselves (SDM 3A §4.5).

use super::layout::PAGE_TABLES;

const PAGE: u64 = 4096;
const ENTRIES: u64 = 512;
const PRESENT_WRITABLE: u64 = 0x3;
const LARGE: u64 = 1 << 7;
const GIB_SHIFT: u32 = 30;
const TWO_MIB_SHIFT: u32 = 21;

/// What the large leaves of the tables are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leaf {
    /// 1 GiB pages: the first 512 GiB are mapped. CPUID 0x80000001 EDX bit 26 must be set.
    OneGib,
    /// 2 MiB pages: the first 4 GiB are mapped.
    TwoMib,
}

/// Table pages to stand at [`PAGE_TABLES`]; the first one is the root, for CR3.
pub(super) fn identity(leaf: Leaf) -> Vec<u8> {
    let root = PAGE_TABLES.base();
    let pointers = root + PAGE;
    let directories = pointers + PAGE;

    let mut entries = vec![0; 512];
    if let Some(first) = entries.first_mut() {
        *first = pointers | PRESENT_WRITABLE;
    }
    match leaf {
        Leaf::OneGib => {
            entries.extend((0..ENTRIES).map(|n| n << GIB_SHIFT | LARGE | PRESENT_WRITABLE));
        }
        Leaf::TwoMib => {
            let directory = |n| (directories + n * PAGE) | PRESENT_WRITABLE;
            entries.extend((0..ENTRIES).map(|n| if n < 4 { directory(n) } else { 0 }));
            entries.extend((0..4 * ENTRIES).map(|n| n << TWO_MIB_SHIFT | LARGE | PRESENT_WRITABLE));
        }
    }
    entries.into_iter().flat_map(u64::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn walk(tables: &[u8], address: u64) -> Option<u64> {
        let entry = |table: u64, index: u64| {
            let at = usize::try_from(table - PAGE_TABLES.base() + index * 8).unwrap();
            u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
        };
        let mut table = PAGE_TABLES.base();
        for shift in [39, GIB_SHIFT, TWO_MIB_SHIFT] {
            let found = entry(table, address >> shift & 511);
            if found & PRESENT_WRITABLE != PRESENT_WRITABLE {
                return None;
            }
            if found & LARGE != 0 {
                let offset = address & ((1 << shift) - 1);
                return Some((found & !0xfff) | offset);
            }
            table = found & !0xfff;
        }
        None
    }

    #[test]
    fn the_tables_fit_their_place() {
        for leaf in [Leaf::OneGib, Leaf::TwoMib] {
            assert!(identity(leaf).len() as u64 <= PAGE_TABLES.size());
        }
    }

    proptest! {
        #[test]
        fn low_addresses_map_to_themselves(address in 0u64..4 << 30) {
            for leaf in [Leaf::OneGib, Leaf::TwoMib] {
                prop_assert_eq!(walk(&identity(leaf), address), Some(address));
            }
        }

        #[test]
        fn what_is_not_mapped_is_absent(address in 4u64 << 30..1 << 46) {
            prop_assert_eq!(walk(&identity(Leaf::TwoMib), address), None);
            let wide = (address < 512 << 30).then_some(address);
            prop_assert_eq!(walk(&identity(Leaf::OneGib), address), wide);
        }
    }
}
