//! Bytes that show loss, doubling and disorder: the byte at each position depends on the position and
//! on a seed. VM tests make the same (`tests/vm/src/pattern.rs`).

/// The bytes of one seed, from a position on.
pub(crate) struct Pattern {
    seed: u64,
    position: u64,
}

const WORD: usize = 8;

impl Pattern {
    pub(crate) fn new(seed: u64) -> Pattern {
        Pattern { seed, position: 0 }
    }

    /// The next `len` bytes.
    pub(crate) fn next(&mut self, len: usize) -> Vec<u8> {
        let first = self.position / 8;
        let skip = usize::try_from(self.position % 8).unwrap_or(0);
        let words = skip.saturating_add(len).div_ceil(WORD);
        let mut bytes: Vec<u8> = (first..)
            .take(words)
            .flat_map(|n| mix(self.seed.wrapping_add(n)).to_le_bytes())
            .collect();
        bytes.drain(..skip);
        bytes.truncate(len);
        self.position = self
            .position
            .saturating_add(u64::try_from(len).unwrap_or(0));
        bytes
    }

    pub(crate) fn position(&self) -> u64 {
        self.position
    }
}

/// The finaliser of splitmix64.
fn mix(n: u64) -> u64 {
    let n = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_make_the_whole() {
        let whole = Pattern::new(7).next(1000);
        let mut pieces = Pattern::new(7);
        let mut made = Vec::new();
        for len in [1, 7, 8, 9, 0, 500, 475] {
            made.extend(pieces.next(len));
        }
        assert_eq!((made == whole, pieces.position()), (true, 1000));
        assert_ne!(Pattern::new(8).next(8), whole[..8]);
    }
}
