//! A round's work, shared by the lanes: which pages, taken in batches through one atomic cursor.
//!
//! A part is walked in stripes: a piece of the first, a piece of the second, and so on round. What stands on disk and
//! what does not lie apart in a guest's memory, and link and disk are both to have work from the start to the end.
//!
//! Pages that change most go last: a round has a cold part and a hot one, and lanes begin the hot one when the cold
//! one is used up. A page known to be dirty again is skipped, for the next round has it.

use crate::bitmap::{Bitmap, SharedBitmap, bits_of};
use crate::sync::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use crate::units::Pfn;

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

/// Words of 64 pages in a piece: a frame's worth, so that neighbours in memory stay together.
const PIECE_WORDS: usize = 4;
/// Stripes a part is walked in.
const STRIPES: usize = 16;

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
        let steps = self.steps();
        while batch.len() + 64 <= batch.capacity() {
            let step = self.cursor.fetch_add(1, SeqCst);
            let Some(part) = self.parts.get(step / steps) else { return };
            let at = self.word_at(step % steps);
            let Some(all) = part.words().get(at).copied().filter(|all| *all != 0) else { continue };
            let now = all & !skip.map_or(0, |skip| skip.word(at));
            self.left.fetch_sub(u64::from(all.count_ones()), SeqCst);
            batch.extend(bits_of(now).map(|bit| Pfn::at(at * 64 + bit)));
        }
    }

    /// Pieces of a stripe.
    fn stripe_pieces(&self) -> usize {
        self.parts[0].words().len().div_ceil(PIECE_WORDS).div_ceil(STRIPES)
    }

    /// Steps of the cursor over one part; some lead past its end.
    fn steps(&self) -> usize {
        self.stripe_pieces() * STRIPES * PIECE_WORDS
    }

    /// The word of a part that a step leads to.
    fn word_at(&self, step: usize) -> usize {
        let (piece, word) = (step / PIECE_WORDS, step % PIECE_WORDS);
        let (stripe, place) = (piece % STRIPES, piece / STRIPES);
        (stripe * self.stripe_pieces() + place) * PIECE_WORDS + word
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
    fn stripes_take_every_page_once_and_from_all_over_early() {
        for pages in [1, 64, 4095, 4096, 4097, 70_000] {
            let round = Round::new(1, Purpose::Live, &bitmap(pages, 0..pages), None);
            let mut order = drain(&round, None);
            let early = &order[..order.len().min(5000)];
            assert!(early.iter().any(|pfn| *pfn >= u64::try_from(pages).unwrap() * 9 / 10), "{pages} pages");
            order.sort_unstable();
            assert_eq!(order, (0..u64::try_from(pages).unwrap()).collect::<Vec<_>>());
        }
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
