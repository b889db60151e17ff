//! Which blocks of the data area are taken. Files that later layers remove or replace give theirs back,
//! and what comes after uses them.

use std::collections::{BTreeMap, BTreeSet};

/// Blocks there may be: addresses have 32 bits, and the last one means a hole.
const BLOCKS_MAX: u64 = 0xffff_0000;

/// A run of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) start: u32,
    pub(super) blocks: u32,
}

/// Best fit among what was given back, else at the end.
pub(super) struct Space {
    end: u64,
    by_start: BTreeMap<u32, u32>,
    by_len: BTreeSet<(u32, u32)>,
}

impl Space {
    /// Block 0 is the superblock's.
    pub(super) fn new() -> Self {
        Self {
            end: 1,
            by_start: BTreeMap::new(),
            by_len: BTreeSet::new(),
        }
    }

    /// The first block after all that are taken.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// What is free before the end, ascending.
    #[cfg(test)]
    pub(super) fn holes(&self) -> impl Iterator<Item = Span> {
        self.by_start
            .iter()
            .map(|(&start, &blocks)| Span { start, blocks })
    }

    /// `None` when the image would be larger than addresses reach.
    pub(super) fn take(&mut self, blocks: u64) -> Option<Span> {
        let blocks = u32::try_from(blocks).ok()?;
        if blocks == 0 {
            return Some(Span {
                start: 0,
                blocks: 0,
            });
        }
        let fit = self.by_len.range((blocks, 0)..).next().copied();
        if let Some((len, start)) = fit {
            self.forget(start, len);
            if let Some(rest) = len.checked_sub(blocks).filter(|rest| *rest > 0) {
                self.remember(start.checked_add(blocks)?, rest);
            }
            return Some(Span { start, blocks });
        }
        let start = u32::try_from(self.end).ok()?;
        let end = self.end.checked_add(u64::from(blocks))?;
        if end > BLOCKS_MAX {
            return None;
        }
        self.end = end;
        Some(Span { start, blocks })
    }

    /// Takes blocks back and joins them with free neighbours.
    pub(super) fn give_back(&mut self, span: Span) {
        let Span {
            mut start,
            mut blocks,
        } = span;
        if blocks == 0 {
            return;
        }
        let before = self.by_start.range(..start).next_back();
        if let Some((&s, &len)) = before
            && s.checked_add(len) == Some(start)
        {
            self.forget(s, len);
            start = s;
            blocks = blocks.saturating_add(len);
        }
        let next = start.saturating_add(blocks);
        if let Some(&len) = self.by_start.get(&next) {
            self.forget(next, len);
            blocks = blocks.saturating_add(len);
        }
        if u64::from(start) + u64::from(blocks) == self.end {
            self.end = u64::from(start);
        } else {
            self.remember(start, blocks);
        }
    }

    fn remember(&mut self, start: u32, len: u32) {
        self.by_start.insert(start, len);
        self.by_len.insert((len, start));
    }

    fn forget(&mut self, start: u32, len: u32) {
        self.by_start.remove(&start);
        self.by_len.remove(&(len, start));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_block_is_lent_twice_and_none_is_lost(steps in proptest::collection::vec((any::<bool>(), 1_u64..40), 1..200)) {
            let mut space = Space::new();
            let mut taken: Vec<Span> = Vec::new();
            for (take, n) in steps {
                if take || taken.is_empty() {
                    taken.push(space.take(n).unwrap());
                } else {
                    let at = usize::try_from(n).unwrap() % taken.len();
                    space.give_back(taken.swap_remove(at));
                }
                let mut all: Vec<Span> = taken.iter().copied().chain(space.holes()).collect();
                all.sort_by_key(|s| s.start);
                let mut next = 1;
                for span in all {
                    prop_assert_eq!(u64::from(span.start), next);
                    next += u64::from(span.blocks);
                }
                prop_assert_eq!(next, space.end());
            }
        }
    }

    #[test]
    fn addresses_end() {
        let mut space = Space::new();
        assert!(space.take(1 << 31).is_some());
        assert!(space.take(1 << 31).is_none());
        assert!(space.take(1 << 40).is_none());
    }
}
