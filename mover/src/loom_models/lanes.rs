//! What lanes share: a round's cursor, which hands out every page once, and the cap on their bandwidth.
#![forbid(unsafe_code)]

use std::sync::{Arc, OnceLock};

use loom::thread;

use crate::bitmap::Bitmap;
use crate::net::pace::Pace;
use crate::pipeline::work::{Purpose, Round};
use crate::runtime::{Moment, Threads};

const SECOND: u64 = 1_000_000_000;

fn runtime() -> &'static Threads {
    static RUNTIME: OnceLock<Threads> = OnceLock::new();
    RUNTIME.get_or_init(Threads::new)
}

#[test]
fn two_lanes_take_every_page_once() {
    loom::model(|| {
        let mut pages = Bitmap::new(128);
        for at in [0, 63, 64, 127] {
            pages.set(at);
        }
        let round = Arc::new(Round::new(1, Purpose::Live, &pages, None));
        let take = |round: &Round| {
            let mut batch = Vec::with_capacity(64);
            round.take(&mut batch, None);
            batch
        };
        let theirs = Arc::clone(&round);
        let other = thread::spawn(move || take(&theirs));
        let mut all = take(&round);
        all.extend(other.join().unwrap());
        let mut rest = take(&round);
        while !rest.is_empty() {
            all.append(&mut rest);
            rest = take(&round);
        }
        all.sort_unstable();
        assert_eq!(all.iter().map(|pfn| pfn.0).collect::<Vec<_>>(), [0, 63, 64, 127]);
        assert_eq!(round.left(), 0);
    });
}

/// Turns follow each other without a gap and without an overlap, whoever books first.
#[test]
fn lanes_never_book_the_same_moment() {
    loom::model(|| {
        let pace = Arc::new(Pace::new(Some(1_000_000)));
        let now = Moment(SECOND);
        let theirs = Arc::clone(&pace);
        let other =
            thread::spawn(move || [theirs.book(now, 1000, 1_000_000), theirs.book(now, 3000, 1_000_000)]);
        let own = pace.book(now, 2000, 1_000_000);
        let [first, second] = other.join().unwrap();
        let mut turns = [(first.0, 1), (second.0, 3), (own.0, 2)];
        turns.sort_unstable();
        for pair in turns.windows(2) {
            assert_eq!(pair[0].0 + pair[0].1 * 1_000_000, pair[1].0, "{turns:?}");
        }
        assert!(first < second);
    });
}

/// Lanes that would sleep for ever go on when the cap is lifted, whenever that comes: before one has looked at it, behind that, or
/// when the other has booked under the old one since.
#[test]
fn lifting_the_cap_is_never_missed() {
    loom::model(|| {
        let pace = Arc::new(Pace::new(Some(1)));
        // Speaks for the link for longer than any test runs, as each lane does again.
        pace.book(Moment(u64::MAX / 2), 1, 1);
        let take = |pace: &Pace| pace.take(runtime(), 1 << 40);
        let (theirs, control) = (Arc::clone(&pace), Arc::clone(&pace));
        let other = thread::spawn(move || take(&theirs));
        let lifting = thread::spawn(move || control.set(runtime(), None));
        take(&pace);
        other.join().unwrap();
        lifting.join().unwrap();
        assert_eq!(pace.rate(), None);
    });
}
