//! Arrays of page frame numbers, as drivers give them, made into ranges. Pure.

/// Bytes of one number.
pub(super) const PFN: usize = 4;

/// The runs of `pfns`: first and count, ascending, none touching another.
pub(super) fn runs(mut pfns: Vec<u32>) -> Vec<(u32, u64)> {
    pfns.sort_unstable();
    pfns.dedup();
    let mut runs: Vec<(u32, u64)> = Vec::new();
    for pfn in pfns {
        match runs.last_mut() {
            Some((first, count)) if u64::from(*first).saturating_add(*count) == u64::from(pfn) => {
                *count = count.saturating_add(1);
            }
            _ => runs.push((pfn, 1)),
        }
    }
    runs
}

/// The numbers in `bytes`; a rest that is no number is left out.
pub(super) fn numbers(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    let (whole, _) = bytes.as_chunks::<PFN>();
    whole.iter().map(|n| u32::from_le_bytes(*n))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_last_number_there_is_ends_a_run() {
        assert_eq!(
            runs(vec![u32::MAX, 0, u32::MAX - 1]),
            [(0, 1), (u32::MAX - 1, 2)]
        );
        assert_eq!(runs(Vec::new()), []);
    }

    proptest! {
        /// Runs hold the numbers and nothing else, and are as few as can be.
        #[test]
        fn runs_are_the_numbers(pfns in prop::collection::vec(prop_oneof![0_u32..64, any::<u32>()], 0..200)) {
            let runs = runs(pfns.clone());
            let numbers: BTreeSet<u64> = pfns.iter().map(|n| u64::from(*n)).collect();
            let held: BTreeSet<u64> = runs
                .iter()
                .flat_map(|(first, count)| (0..*count).map(|n| u64::from(*first) + n))
                .collect();
            prop_assert_eq!(held, numbers);
            prop_assert!(runs.windows(2).all(|w| u64::from(w[0].0) + w[0].1 < u64::from(w[1].0)));
        }
    }
}
