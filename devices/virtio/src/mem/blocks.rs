//! Which blocks of a region are plugged. Pure.

/// Blocks by number from 0; made by [`Blocks::range`] alone, so they lie within the region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BlockRange {
    first: usize,
    end: usize,
}

/// What the blocks of a range are (virtio 1.2 §5.15.6.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mix {
    Plugged,
    Unplugged,
    Mixed,
}

/// The map.
pub(super) struct Blocks {
    /// Bytes in a block, a power of two.
    block: u64,
    /// Blocks in the region.
    count: usize,
    /// How many are plugged.
    plugged: usize,
    words: Vec<u64>,
}

impl Blocks {
    /// A region of `size` bytes in blocks of `block`, none plugged; a rest at the end is no block.
    pub(super) fn new(size: u64, block: u64) -> Self {
        let count = size.checked_div(block).unwrap_or(0);
        let count = usize::try_from(count).unwrap_or(0);
        Self {
            block,
            count,
            plugged: 0,
            words: vec![0; count.div_ceil(64)],
        }
    }

    /// The `count` blocks from byte `offset` on, if that is where a block begins, there is at least
    /// one, and all end at or before byte `limit`.
    pub(super) fn range(&self, offset: u64, count: u16, limit: u64) -> Option<BlockRange> {
        let whole = count != 0 && offset.checked_rem(self.block)? == 0;
        let len = u64::from(count).checked_mul(self.block)?;
        let within = offset.checked_add(len)? <= limit;
        let first = usize::try_from(offset.checked_div(self.block)?).ok()?;
        let end = first.checked_add(usize::from(count))?;
        (whole && within && end <= self.count).then_some(BlockRange { first, end })
    }

    /// Where a range begins in the region.
    pub(super) fn offset(&self, range: BlockRange) -> u64 {
        self.block.saturating_mul(range.first as u64)
    }

    /// Bytes in a range.
    pub(super) fn bytes(&self, range: BlockRange) -> u64 {
        let blocks = range.end.saturating_sub(range.first);
        self.block.saturating_mul(blocks as u64)
    }

    /// Bytes plugged.
    pub(super) fn plugged_bytes(&self) -> u64 {
        self.block.saturating_mul(self.plugged as u64)
    }

    fn is_plugged(&self, index: usize) -> bool {
        let word = index.checked_div(64).and_then(|w| self.words.get(w));
        word.is_some_and(|word| word & bit(index) != 0)
    }

    /// What the blocks of `range` are.
    pub(super) fn mix(&self, range: BlockRange) -> Mix {
        let plugged = (range.first..range.end)
            .filter(|n| self.is_plugged(*n))
            .count();
        match plugged {
            0 => Mix::Unplugged,
            n if n == range.end.saturating_sub(range.first) => Mix::Plugged,
            _ => Mix::Mixed,
        }
    }

    /// Makes the blocks of `range` plugged or not.
    pub(super) fn set(&mut self, range: BlockRange, plugged: bool) {
        for index in range.first..range.end {
            let was = self.is_plugged(index);
            let Some(word) = index.checked_div(64).and_then(|w| self.words.get_mut(w)) else {
                return;
            };
            if plugged {
                *word |= bit(index);
            } else {
                *word &= !bit(index);
            }
            self.plugged = match (was, plugged) {
                (false, true) => self.plugged.saturating_add(1),
                (true, false) => self.plugged.saturating_sub(1),
                _ => self.plugged,
            };
        }
    }

    /// Unplugs everything.
    pub(super) fn clear(&mut self) {
        self.words.fill(0);
        self.plugged = 0;
    }
}

fn bit(index: usize) -> u64 {
    1 << (index & 63)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const BLOCK: u64 = 2 << 20;

    #[test]
    fn ranges_are_whole_blocks_within_the_limit() {
        let blocks = Blocks::new(100 * BLOCK + 1, BLOCK);
        let usable = 50 * BLOCK;
        assert!(blocks.range(0, 50, usable).is_some());
        assert!(blocks.range(49 * BLOCK, 1, usable).is_some());
        for (offset, count) in [
            (0, 0),
            (1, 1),
            (BLOCK - 1, 1),
            (0, 51),
            (50 * BLOCK, 1),
            (u64::MAX, 1),
            (!(BLOCK - 1), u16::MAX),
        ] {
            assert_eq!(blocks.range(offset, count, usable), None, "{offset:#x}");
        }
        assert!(blocks.range(99 * BLOCK, 1, u64::MAX).is_some());
        assert!(blocks.range(100 * BLOCK, 1, u64::MAX).is_none());
        assert!(Blocks::new(4096, 0).range(0, 1, 4096).is_none());
    }

    proptest! {
        /// The map is a set of block numbers.
        #[test]
        fn it_is_a_set(
            count in 1_u64..300,
            steps in prop::collection::vec((0_u64..320, 1_u16..100, any::<bool>(), 0_u8..20), 1..100),
        ) {
            let mut blocks = Blocks::new(count * BLOCK, BLOCK);
            let mut set = BTreeSet::new();
            for (first, len, plug, clear) in steps {
                if clear == 0 {
                    blocks.clear();
                    set.clear();
                }
                let range = blocks.range(first * BLOCK, len, count * BLOCK);
                prop_assert_eq!(range.is_some(), first + u64::from(len) <= count);
                let Some(range) = range else { continue };
                let of_range = first..first + u64::from(len);
                let mix = match of_range.clone().filter(|n| set.contains(n)).count() {
                    0 => Mix::Unplugged,
                    n if n == usize::from(len) => Mix::Plugged,
                    _ => Mix::Mixed,
                };
                prop_assert_eq!(blocks.mix(range), mix);
                blocks.set(range, plug);
                for n in of_range {
                    if plug { set.insert(n); } else { set.remove(&n); }
                }
                prop_assert_eq!(blocks.plugged_bytes(), set.len() as u64 * BLOCK);
                prop_assert_eq!(blocks.bytes(range), u64::from(len) * BLOCK);
            }
        }
    }
}
