//! The simulator's randomness: small, seeded, split into streams so that a draw in one part of the world does not
//! shift those of another.

use crate::units::{u64_of, usize_of};

/// A stream of numbers (splitmix64).
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

/// One step of splitmix64's output function: every bit of `n` changes about half the bits of the result.
pub(crate) const fn mix(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

impl Rng {
    /// The stream named `name` of `seed`.
    pub(crate) fn new(seed: u64, name: &str) -> Self {
        Self(name.bytes().fold(mix(seed), |state, byte| mix(state ^ u64::from(byte)).wrapping_add(state)))
    }

    /// The next 64 bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number under `n`.
    ///
    /// # Panics
    /// If `n` is 0.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "nothing is below 0");
        let wide = u128::from(self.next()) * u128::from(n);
        u64::try_from(wide >> 64).unwrap_or(0)
    }

    /// A place in a table of `n` entries.
    pub(crate) fn index(&mut self, n: usize) -> usize {
        usize_of(self.below(u64_of(n)))
    }

    /// A number from `from` to `to`, both included.
    pub(crate) fn range(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to - from + 1)
    }

    /// True once in `odds`; never if `odds` is 0.
    pub(crate) fn once_in(&mut self, odds: u64) -> bool {
        odds > 0 && self.below(odds) == 0
    }

    /// One of `choices`.
    pub(crate) fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.index(choices.len())]
    }

    /// A number about as often in every power of two up to `to`.
    pub(crate) fn magnitude(&mut self, from: u64, to: u64) -> u64 {
        let top = self.range(from.max(1), to.max(1)).ilog2();
        let bits = self.below(u64::from(top) + 1);
        self.range(1 << bits, 2 << bits).clamp(from, to)
    }

    /// Random bytes.
    pub(crate) fn fill(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}
