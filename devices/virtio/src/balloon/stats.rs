//! Statistics as the guest gives them: a tag of 16 bits and a value of 64, packed (§5.5.6.4).

/// Bytes of one entry.
pub(super) const ENTRY: usize = 10;
/// Entries that are looked at.
pub(super) const ENTRIES: usize = 32;

/// Names by tag.
pub(super) const NAMES: [&str; 10] = [
    "guest_swap_in_bytes",
    "guest_swap_out_bytes",
    "guest_major_faults",
    "guest_minor_faults",
    "guest_free_bytes",
    "guest_total_bytes",
    "guest_available_bytes",
    "guest_disk_caches_bytes",
    "guest_hugetlb_allocations",
    "guest_hugetlb_failures",
];

/// Tags and values.
pub(super) fn entries(bytes: &[u8]) -> impl Iterator<Item = (usize, u64)> + '_ {
    let (whole, _) = bytes.as_chunks::<ENTRY>();
    whole.iter().map(|[t0, t1, v @ ..]| {
        let tag = u16::from_le_bytes([*t0, *t1]);
        (usize::from(tag), u64::from_le_bytes(*v))
    })
}
