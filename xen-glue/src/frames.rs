//! A set of frames that takes memory for the regions it has frames in alone: a stream may name frames far apart, so that one
//! bitmap over all of them could be made to take any amount.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use mover::units::usize_of;

/// Frames of a region: a superpage's.
pub(crate) const REGION_FRAMES: u64 = 512;
/// 64-bit words of a region's bitmap.
const WORDS: usize = 8;

/// A set of frame numbers.
#[derive(Debug, Default)]
pub(crate) struct FrameSet {
    regions: HashMap<u64, [u64; WORDS]>,
    count: u64,
}

impl FrameSet {
    fn place(frame: u64) -> (u64, usize, u64) {
        let (region, at) = (frame / REGION_FRAMES, frame % REGION_FRAMES);
        (region, usize_of(at / 64), 1 << (at % 64))
    }
    /// Whether `frame` is in it.
    pub(crate) fn has(&self, frame: u64) -> bool {
        let (region, word, bit) = Self::place(frame);
        self.regions.get(&region).is_some_and(|words| words[word] & bit != 0)
    }
    /// Puts `frame` in.
    pub(crate) fn insert(&mut self, frame: u64) {
        let (region, word, bit) = Self::place(frame);
        let words = self.regions.entry(region).or_default();
        self.count += u64::from(words[word] & bit == 0);
        words[word] |= bit;
    }
    /// Takes `frame` out; whether it was in it.
    pub(crate) fn remove(&mut self, frame: u64) -> bool {
        let (region, word, bit) = Self::place(frame);
        let Some(words) = self.regions.get_mut(&region) else { return false };
        let was = words[word] & bit != 0;
        words[word] &= !bit;
        self.count -= u64::from(was);
        if words.iter().all(|&word| word == 0) {
            self.regions.remove(&region);
        }
        was
    }
    /// Whether nothing of `region` (of [`REGION_FRAMES`]) is in it.
    pub(crate) fn is_empty_in(&self, region: u64) -> bool {
        self.regions.get(&region).is_none_or(|words| words.iter().all(|&word| word == 0))
    }
    /// Frames in it.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }
    /// The lowest frame in it.
    pub(crate) fn first(&self) -> Option<u64> {
        let (region, words) = self.regions.iter().filter(|(region, _)| !self.is_empty_in(**region)).min()?;
        let at = words.iter().position(|&word| word != 0)?;
        Some(region * REGION_FRAMES + mover::units::u64_of(at) * 64 + u64::from(words[at].trailing_zeros()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_far_apart_take_little_memory_and_are_told_apart() {
        let mut set = FrameSet::default();
        for frame in [(1 << 40) - 1, 512, 511, 0] {
            set.insert(frame);
            set.insert(frame);
            assert!(set.has(frame));
            assert_eq!(set.first(), Some(frame));
        }
        assert_eq!((set.count(), set.regions.len()), (4, 3));
        assert!(!set.has(1) && !set.has(1 << 39) && set.is_empty_in(7) && !set.is_empty_in(1));
        assert!(set.remove(0) && !set.remove(0) && !set.remove(1 << 39));
        assert_eq!((set.count(), set.first()), (3, Some(511)));
        assert!(set.remove(511) && set.remove(512) && set.remove((1 << 40) - 1));
        assert_eq!(
            (set.count(), set.first(), set.regions.len()),
            (0, None, 0),
            "what is empty takes no memory"
        );
    }
}
