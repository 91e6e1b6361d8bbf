//! A round's work, shared by the lanes: which pages, taken in batches through one atomic cursor.
//!
//! Pages that change most go last: a round has a cold part and a hot one, and lanes begin the hot one when the cold
//! one is used up. A page known to be dirty again is skipped, for the next round has it.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};

use crate::bitmap::{Bitmap, SharedBitmap, bits_of};
use crate::units::{Pfn, usize_of};

/// What a round is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// Pages, while the guest runs.
    Live,
    /// Pages, the guest is paused.
    Last,
    /// Digests of all pages, the guest is paused.
    Digests,
}

/// One round.
pub struct Round {
    /// Its number; barriers carry it.
    pub number: u32,
    /// What is sent of each page.
    pub purpose: Purpose,
    /// The cold part, then the hot one.
    parts: [Bitmap; 2],
    /// The next word over both parts.
    cursor: AtomicUsize,
    /// Pages not taken yet.
    left: AtomicU64,
}

impl Round {
    /// With the pages of `pages`, those also in `hot` last.
    #[must_use]
    pub fn new(number: u32, purpose: Purpose, pages: &Bitmap, hot: Option<&Bitmap>) -> Self {
        let mut cold = pages.clone();
        let mut last = Bitmap::new(pages.len());
        if let Some(hot) = hot {
            cold.subtract(hot);
            last = pages.clone();
            last.intersect(hot);
        }
        let left = AtomicU64::new(pages.count());
        Self { number, purpose, parts: [cold, last], cursor: AtomicUsize::new(0), left }
    }

    /// Pages nobody has taken yet.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left.load(SeqCst)
    }

    /// Fills `batch` with pages nobody else gets, at most its capacity, none in `skip`. Empty only when the round is
    /// used up. Ascending within a part, so that pages adjacent in memory stay together.
    pub fn take(&self, batch: &mut Vec<Pfn>, skip: Option<&SharedBitmap>) {
        batch.clear();
        let words = self.parts[0].words().len();
        while batch.len() + 64 <= batch.capacity() {
            let word = self.cursor.fetch_add(1, SeqCst);
            let (part, at) = (word / words, word % words);
            let Some(part) = self.parts.get(part) else { return };
            let all = part.words()[at];
            if all == 0 {
                continue;
            }
            let now = all & !skip.map_or(0, |skip| skip.word(at));
            self.left.fetch_sub(u64::from(all.count_ones()), SeqCst);
            batch.extend(bits_of(now).map(|bit| Pfn::at(at * 64 + bit)));
        }
    }

    /// How much of the round is done, 0 to 1, by place.
    #[must_use]
    pub fn is_used_up(&self) -> bool {
        self.cursor.load(SeqCst) >= usize_of(2) * self.parts[0].words().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap(bits: usize, set: impl IntoIterator<Item = usize>) -> Bitmap {
        let mut map = Bitmap::new(bits);
        for at in set {
            map.set(at);
        }
        map
    }

    fn drain(round: &Round, skip: Option<&SharedBitmap>) -> Vec<u64> {
        let (mut all, mut batch) = (Vec::new(), Vec::with_capacity(64));
        loop {
            round.take(&mut batch, skip);
            if batch.is_empty() {
                return all;
            }
            all.extend(batch.iter().map(|p| p.0));
        }
    }

    #[test]
    fn hot_pages_go_last_and_every_page_once() {
        let round = Round::new(1, Purpose::Live, &bitmap(300, 0..300), Some(&bitmap(300, [0, 7, 290])));
        let order = drain(&round, None);
        assert_eq!(order[297..], [0, 7, 290]);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..300).collect::<Vec<u64>>());
        assert_eq!(round.left(), 0);
        assert!(round.is_used_up());
    }

    #[test]
    fn pages_dirty_again_are_left_to_the_next_round() {
        let skip = SharedBitmap::new(200);
        skip.set(3);
        skip.set(150);
        let round = Round::new(1, Purpose::Live, &bitmap(200, [3, 4, 150, 199]), None);
        assert_eq!(drain(&round, Some(&skip)), [4, 199]);
        assert_eq!(round.left(), 0);
    }

    #[test]
    fn a_batch_of_skipped_pages_only_does_not_end_the_round() {
        let skip = SharedBitmap::new(256);
        (0..192).for_each(|at| {
            skip.set(at);
        });
        let round = Round::new(1, Purpose::Live, &bitmap(256, 0..256), None);
        assert_eq!(drain(&round, Some(&skip)), (192..256).collect::<Vec<u64>>());
    }
}
