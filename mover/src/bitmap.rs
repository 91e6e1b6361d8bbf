//! A plain bitmap of pages or blocks: u64 words, which beat compressed ones in every round that matters
//! (`docs/DEPENDENCIES.md`). [`Bitmap`] has one owner, [`SharedBitmap`] many.
#![forbid(unsafe_code)]

use crate::sync::{AtomicU64, Ordering::SeqCst};

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
    /// Sets the bits that are set in `bits`, 64 of them from `64 * word`; how many were clear.
    ///
    /// # Panics
    /// If some of them are past the end.
    pub fn set_word(&mut self, word: usize, bits: u64) -> u64 {
        let past_end = (word + 1) * 64 > self.bits && bits >> (self.bits % 64) != 0;
        assert!(!past_end, "bits {bits:#x} of word {word} reach past {} bits", self.bits);
        let fresh = bits & !self.words[word];
        self.words[word] |= bits;
        u64::from(fresh.count_ones())
    }
    /// Clears bits `from..to`.
    ///
    /// # Panics
    /// If some of them are past the end.
    pub fn clear_range(&mut self, from: usize, to: usize) {
        assert!(from <= to && to <= self.bits, "bits {from}..{to} of {}", self.bits);
        let mut at = from;
        while at < to {
            let end = to.min((at / 64 + 1) * 64);
            self.words[at / 64] &= !(u64::MAX >> (64 - (end - at)) << (at % 64));
            at = end;
        }
    }
    /// The next run of set bits that starts at or after `from`, as its first bit and the one after its last.
    #[must_use]
    pub fn next_run(&self, from: usize) -> Option<(usize, usize)> {
        let first = self.seek(from, |word| word)?;
        Some((first, self.seek(first, |word| !word).unwrap_or(self.bits).min(self.bits)))
    }
    /// The first bit at or after `from` that is set in the words as `view` shows them.
    fn seek(&self, from: usize, view: impl Fn(u64) -> u64) -> Option<usize> {
        let mut word = from / 64;
        let mut bits = view(*self.words.get(word)?) & (u64::MAX << (from % 64));
        while bits == 0 {
            word += 1;
            bits = view(*self.words.get(word)?);
        }
        Some(word * 64 + usize::try_from(bits.trailing_zeros()).unwrap_or(0))
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

/// A bitmap that several tasks set, take and test at once, without a lock. Every operation is sequentially
/// consistent: a bit set before a bell is rung is seen by whom the bell wakes.
#[derive(Debug)]
pub struct SharedBitmap {
    words: Box<[AtomicU64]>,
    bits: usize,
}

impl SharedBitmap {
    /// All clear.
    #[must_use]
    pub fn new(bits: usize) -> Self {
        Self { words: (0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(), bits }
    }
    /// Words of 64 bits.
    #[must_use]
    pub fn words(&self) -> usize {
        self.words.len()
    }
    /// Sets bit `at`; whether it was clear.
    ///
    /// # Panics
    /// If there is no such bit.
    pub fn set(&self, at: usize) -> bool {
        assert!(at < self.bits, "bit {at} of {}", self.bits);
        self.words[at / 64].fetch_or(1 << (at % 64), SeqCst) & (1 << (at % 64)) == 0
    }
    /// Clears bit `at`; whether it was set.
    ///
    /// # Panics
    /// If there is no such bit.
    pub fn clear(&self, at: usize) -> bool {
        assert!(at < self.bits, "bit {at} of {}", self.bits);
        self.words[at / 64].fetch_and(!(1 << (at % 64)), SeqCst) & (1 << (at % 64)) != 0
    }
    /// Whether bit `at` is set.
    #[must_use]
    pub fn get(&self, at: usize) -> bool {
        self.words[at / 64].load(SeqCst) & (1 << (at % 64)) != 0
    }
    /// Word number `word`.
    #[must_use]
    pub fn word(&self, word: usize) -> u64 {
        self.words[word].load(SeqCst)
    }
    /// Clears word number `word` and returns what it held.
    pub fn take_word(&self, word: usize) -> u64 {
        match self.words[word].load(SeqCst) {
            0 => 0,
            _ => self.words[word].swap(0, SeqCst),
        }
    }
    /// Makes it equal to `other`, of the same length, a word at a time.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy_from(&self, other: &Bitmap) {
        assert_eq!(self.bits, other.bits);
        for (mine, theirs) in self.words.iter().zip(&other.words) {
            mine.store(*theirs, SeqCst);
        }
    }
    /// What is set now, a word at a time.
    #[must_use]
    pub fn snapshot(&self) -> Bitmap {
        let mut all = Bitmap::new(self.bits);
        for (at, word) in self.words.iter().enumerate() {
            match word.load(SeqCst) {
                0 => {}
                bits => drop(all.set_word(at, bits)),
            }
        }
        all
    }
    /// Whether no bit is set, as far as that can be said while others set some.
    #[must_use]
    pub fn is_clear(&self) -> bool {
        self.words.iter().all(|w| w.load(SeqCst) == 0)
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
        fn behaves_as_a_set(bits in 1usize..300, ops in proptest::collection::vec((0usize..300, 0usize..300, 0u8..5), 0..60)) {
            let (mut map, mut set) = (Bitmap::new(bits), BTreeSet::new());
            for (a, b, op) in ops {
                let (a, b) = (a % bits, b % (bits + 1));
                let range = a.min(b)..b.max(a);
                match op {
                    3 => {
                        map.clear_range(range.start, range.end);
                        set.retain(|i| !range.contains(i));
                    }
                    4 => {
                        let word = a / 64;
                        let ones = crate::units::u64_of(b).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                        let ones = ones & u64::MAX.checked_shr(u32::try_from((word * 64 + 64).saturating_sub(bits)).unwrap()).unwrap();
                        let fresh = bits_of(ones).filter(|i| set.insert(word * 64 + i)).count();
                        prop_assert_eq!(map.set_word(word, ones), crate::units::u64_of(fresh));
                    }
                    0 => prop_assert_eq!(map.set(a), set.insert(a)),
                    1 => prop_assert_eq!(map.clear(a), set.remove(&a)),
                    _ => {
                        let fresh = range.clone().filter(|i| set.insert(*i)).count();
                        prop_assert_eq!(map.set_range(range.start, range.end), fresh);
                    }
                }
            }
            let mut runs = Vec::new();
            let mut at = 0;
            while let Some((from, to)) = map.next_run(at) {
                prop_assert!(from < to && (runs.is_empty() || from > at));
                runs.extend(from..to);
                at = to;
            }
            prop_assert_eq!(&runs, &map.iter().collect::<Vec<_>>());
            prop_assert_eq!(map.iter().collect::<Vec<_>>(), set.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(map.count(), u64::try_from(set.len()).unwrap());
        }
    }
}
