//! A plain bitmap of pages or blocks: u64 words, which beat compressed ones in every round that matters
//! (`docs/DEPENDENCIES.md`).

/// One bit per page (or per 4 KiB block of a disk).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Bitmap {
    words: Vec<u64>,
    bits: usize,
}

impl Bitmap {
    /// All clear.
    #[must_use]
    pub fn new(bits: usize) -> Self {
        Self { words: vec![0; bits.div_ceil(64)], bits }
    }
    /// Bits it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bits
    }
    /// Whether it has no bits at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bits == 0
    }
    /// Sets bit `at`; whether it was clear.
    ///
    /// # Panics
    /// If there is no such bit.
    pub fn set(&mut self, at: usize) -> bool {
        assert!(at < self.bits, "bit {at} of {}", self.bits);
        let word = &mut self.words[at / 64];
        let was_clear = *word & (1 << (at % 64)) == 0;
        *word |= 1 << (at % 64);
        was_clear
    }
    /// Clears bit `at`; whether it was set.
    ///
    /// # Panics
    /// If there is no such bit.
    pub fn clear(&mut self, at: usize) -> bool {
        assert!(at < self.bits, "bit {at} of {}", self.bits);
        let word = &mut self.words[at / 64];
        let was_set = *word & (1 << (at % 64)) != 0;
        *word &= !(1 << (at % 64));
        was_set
    }
    /// Whether bit `at` is set; a bit past the end is clear.
    #[must_use]
    pub fn get(&self, at: usize) -> bool {
        self.words.get(at / 64).is_some_and(|w| w & (1 << (at % 64)) != 0)
    }
    /// Sets bits `from..to`; how many were clear.
    pub fn set_range(&mut self, from: usize, to: usize) -> usize {
        assert!(from <= to && to <= self.bits, "bits {from}..{to} of {}", self.bits);
        let mut fresh = 0;
        let mut at = from;
        while at < to {
            let word = at / 64;
            let end = to.min((word + 1) * 64);
            let ones = u64::MAX >> (64 - (end - at)) << (at % 64);
            fresh += usize::try_from((ones & !self.words[word]).count_ones()).unwrap_or(0);
            self.words[word] |= ones;
            at = end;
        }
        fresh
    }
    /// Clears all.
    pub fn clear_all(&mut self) {
        self.words.fill(0);
    }
    /// Sets all.
    pub fn set_all(&mut self) {
        self.set_range(0, self.bits);
    }
    /// How many are set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }
    /// Sets what is set in `other`, of the same length.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn union(&mut self, other: &Self) {
        assert_eq!(self.bits, other.bits);
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
    }
    /// Clears what is set in `other`, of the same length.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn subtract(&mut self, other: &Self) {
        assert_eq!(self.bits, other.bits);
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine &= !theirs;
        }
    }
    /// Keeps what is set in `other` too, of the same length.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn intersect(&mut self, other: &Self) {
        assert_eq!(self.bits, other.bits);
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine &= theirs;
        }
    }
    /// The words, 64 bits each, the last one padded with clear bits.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }
    /// The set bits, ascending.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.words
            .iter()
            .enumerate()
            .filter(|(_, w)| **w != 0)
            .flat_map(|(i, w)| bits_of(*w).map(move |b| i * 64 + b))
    }
}

/// The set bits of one word, ascending.
pub fn bits_of(mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        if word == 0 {
            return None;
        }
        let bit = word.trailing_zeros();
        word &= word - 1;
        usize::try_from(bit).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_as_a_set(bits in 1usize..300, ops in proptest::collection::vec((0usize..300, 0usize..300, 0u8..3), 0..60)) {
            let (mut map, mut set) = (Bitmap::new(bits), BTreeSet::new());
            for (a, b, op) in ops {
                let (a, b) = (a % bits, b % (bits + 1));
                match op {
                    0 => prop_assert_eq!(map.set(a), set.insert(a)),
                    1 => prop_assert_eq!(map.clear(a), set.remove(&a)),
                    _ => {
                        let range = a.min(b)..b.max(a);
                        let fresh = range.clone().filter(|i| set.insert(*i)).count();
                        prop_assert_eq!(map.set_range(range.start, range.end), fresh);
                    }
                }
            }
            prop_assert_eq!(map.iter().collect::<Vec<_>>(), set.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(map.count(), u64::try_from(set.len()).unwrap());
        }
    }
}
