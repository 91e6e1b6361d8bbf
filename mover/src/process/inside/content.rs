//! What pages are filled with, and the guest's random choices.

#![forbid(unsafe_code)]

use crate::memory::PageBuf;

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Scrambles 64 bits (the finisher of splitmix64).
pub(super) fn mix(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// One number out of several.
pub(super) fn mix_all(numbers: &[u64]) -> u64 {
    numbers.iter().fold(GOLDEN, |sum, n| mix(sum ^ mix(n.wrapping_add(GOLDEN))))
}

/// Fills a page with incompressible bytes that follow from `key`.
pub(super) fn fill(key: u64, page: &mut PageBuf) {
    let mut state = key;
    for word in page.0.as_chunks_mut::<8>().0 {
        state = state.wrapping_add(GOLDEN);
        *word = mix(state).to_le_bytes();
    }
}

/// The guest's random choices: splitmix64, whose state is one word that moves with the vCPU.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Rng(pub(super) u64);

impl Rng {
    /// The next number.
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }
    /// A number below `end`; 0 if that is 0.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        u64::try_from((u128::from(self.next()) * u128::from(end)) >> 64).unwrap_or(0)
    }
    /// The length of a file in blocks: 1 to 256, each doubling as likely as the next.
    pub(super) fn file_blocks(&mut self) -> u64 {
        let doubling = self.below(8);
        (1 << doubling) + self.below((1 << doubling) + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_follow_from_their_key_and_do_not_repeat() {
        let (mut one, mut two) = (PageBuf::zeroed(), PageBuf::zeroed());
        fill(mix_all(&[1, 2, 3]), &mut one);
        fill(mix_all(&[1, 2, 3]), &mut two);
        assert!(one == two);
        fill(mix_all(&[1, 3, 2]), &mut two);
        assert!(one != two);
        let mut words: Vec<_> = one.0.as_chunks::<8>().0.to_vec();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), 512);
    }

    #[test]
    fn choices_stay_in_their_range() {
        let mut rng = Rng(7);
        assert_eq!(rng.below(0), 0);
        let mut seen = [false; 10];
        for _ in 0..1000 {
            seen[crate::units::usize_of(rng.below(10))] = true;
            assert!((1..=256).contains(&rng.file_blocks()));
        }
        assert!(seen.iter().all(|seen| *seen));
    }
}
