//! Which names have been found before, roughly.
//!
//! A lookup of a file the guest knows needs one system call, statx(2) by name, and no descriptor; of a new one it
//! needs openat2(2) and statx(2) of what that opened. Which of the two it is shows only afterwards, so a lookup
//! begins with what this guesses. A wrong guess costs a system call and nothing else.

/// Power of two. 16 KiB.
const PLACES: usize = 4096;

/// Tags of names, each in the one place it can have.
pub(super) struct Hints(Vec<u32>);

/// What is remembered of a name.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tag {
    place: usize,
    /// Not 0.
    rest: u32,
}

impl Tag {
    /// Of `name` in the directory `parent`: FNV-1a of 64 bits, mixed once more, for its upper bits differ little
    /// between names that differ in their ends.
    pub(super) fn of(parent: u64, name: &[u8]) -> Self {
        const MIX: u64 = 0x9e37_79b9_7f4a_7c15;
        let begin = 0xcbf2_9ce4_8422_2325_u64 ^ parent.wrapping_mul(MIX);
        let hash = name.iter().fold(begin, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
        });
        let hash = (hash ^ (hash >> 32)).wrapping_mul(MIX);
        let hash = hash ^ (hash >> 29);
        let [.., a, b] = hash.to_le_bytes();
        let [c, d, e, f, ..] = hash.to_le_bytes();
        Self {
            place: usize::from(u16::from_le_bytes([a, b])) % PLACES,
            rest: u32::from_le_bytes([c, d, e, f]) | 1,
        }
    }
}

impl Hints {
    /// Nothing was found yet; takes memory when something is.
    pub(super) fn new() -> Self {
        Self(Vec::new())
    }

    /// Whether it was found before, probably.
    pub(super) fn has(&self, tag: Tag) -> bool {
        self.0.get(tag.place) == Some(&tag.rest)
    }

    pub(super) fn remember(&mut self, tag: Tag) {
        if self.0.is_empty() {
            self.0.resize(PLACES, 0);
        }
        if let Some(place) = self.0.get_mut(tag.place) {
            *place = tag.rest;
        }
    }

    /// It is gone.
    pub(super) fn forget(&mut self, tag: Tag) {
        if self.has(tag)
            && let Some(place) = self.0.get_mut(tag.place)
        {
            *place = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_remembered_until_it_goes() {
        let mut hints = Hints::new();
        let (a, other) = (Tag::of(1, b"a"), Tag::of(2, b"a"));
        assert!(!hints.has(a));
        hints.forget(a);
        hints.remember(a);
        assert!(hints.has(a) && !hints.has(other));
        hints.forget(other);
        assert!(hints.has(a));
        hints.forget(a);
        assert!(!hints.has(a));
    }

    #[test]
    fn names_of_one_folder_seldom_share_a_place() {
        let mut hints = Hints::new();
        let tags: Vec<Tag> = (0..500)
            .map(|n| Tag::of(1 << 32 | 7, format!("file-{n}").as_bytes()))
            .collect();
        for tag in &tags {
            hints.remember(*tag);
        }
        let kept = tags.iter().filter(|tag| hints.has(**tag)).count();
        assert!(kept > 440, "{kept}");
    }
}
