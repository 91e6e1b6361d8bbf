//! Bits that are set and taken at once: none is lost, none is taken twice, and who takes one sees what came before it.
#![forbid(unsafe_code)]

use std::sync::Arc;

use loom::thread;

use crate::bitmap::{Bitmap, SharedBitmap, bits_of};
use crate::memory::watched::WatchedPage;

/// Two set, one takes words meanwhile: what it took and what is left are what was set, each once.
#[test]
fn every_bit_is_taken_once_and_with_what_it_announces() {
    loom::model(|| {
        let bits = Arc::new(SharedBitmap::new(64));
        let pages = [WatchedPage::new(), WatchedPage::new()];
        let setters: Vec<_> = [3, 40]
            .into_iter()
            .zip(pages.clone())
            .map(|(at, page)| {
                let bits = Arc::clone(&bits);
                thread::spawn(move || {
                    page.write(7);
                    assert!(bits.set(at), "nobody else sets it");
                })
            })
            .collect();
        let mut taken = Vec::new();
        for _ in 0..2 {
            taken.extend(bits_of(bits.take_word(0)));
        }
        for at in &taken {
            assert_eq!(pages[usize::from(*at == 40)].read(), 7, "what was written before the bit was set");
        }
        for setter in setters {
            setter.join().unwrap();
        }
        taken.extend(bits_of(bits.take_word(0)));
        taken.sort_unstable();
        assert_eq!(taken, [3, 40]);
        assert!(bits.is_clear());
    });
}

/// Of two that clear one bit, one hears that it was set; of two that set it, one that it was clear.
#[test]
fn one_of_two_has_the_bit() {
    loom::model(|| {
        let bits = Arc::new(SharedBitmap::new(70));
        let theirs = Arc::clone(&bits);
        let other = thread::spawn(move || (theirs.set(65), theirs.clear(65)));
        let own = (bits.set(65), bits.clear(65));
        let other = other.join().unwrap();
        let count = |had: [bool; 2]| had.into_iter().filter(|had| *had).count();
        assert_eq!(count([own.0, other.0]), count([own.1, other.1]), "set as often as cleared");
        assert!(count([own.0, other.0]) >= 1 && !bits.get(65));
    });
}

/// Words that one thread copies in while another takes some: each word is one or the other, never half.
#[test]
fn words_are_copied_whole() {
    loom::model(|| {
        let bits = Arc::new(SharedBitmap::new(128));
        let theirs = Arc::clone(&bits);
        let mut all = Bitmap::new(128);
        all.set_all();
        let copier = thread::spawn(move || theirs.copy_from(&all));
        let early = [bits.take_word(0), bits.take_word(1)];
        copier.join().unwrap();
        let late = [bits.word(0), bits.word(1)];
        for (early, late) in early.into_iter().zip(late) {
            assert!(matches!((early, late), (0, u64::MAX) | (u64::MAX, 0)), "{early:x} then {late:x}");
        }
    });
}
