//! The index: one writer, lookups from other threads. What was forgotten is not found any more by whoever knows that it
//! was; and what is found lies on the disk and once had that content.
#![forbid(unsafe_code)]

use std::sync::Arc;

use loom::thread;

use crate::index::layout::Layout;
use crate::index::table::{Learned, Table};
use crate::sync::{AtomicBool, Ordering};
use crate::units::Sector;

const HINT: u64 = 7 << 40 | 9;
const OTHER: u64 = 8 << 40 | 9;

fn table() -> Arc<Table> {
    Arc::new(Table::new(Layout::plain(16 * 4096), 4))
}

#[test]
fn what_was_forgotten_is_not_found_by_who_knows_it() {
    loom::model(|| {
        let table = table();
        assert_eq!(table.learn(2, HINT), Learned::Added);
        let forgotten = Arc::new(AtomicBool::new(false));
        let (theirs, known) = (Arc::clone(&table), Arc::clone(&forgotten));
        let looker = thread::spawn(move || {
            let knew = known.load(Ordering::Acquire);
            let found = theirs.find(HINT, None);
            assert!(!(knew && found.is_some()), "forgotten, and found");
            assert!(found.is_none_or(|sector| sector == Sector(16)));
        });
        assert!(table.forget(2));
        forgotten.store(true, Ordering::Release);
        looker.join().unwrap();
        assert_eq!((table.entries(), table.find(HINT, None)), (0, None));
    });
}

#[test]
fn what_is_found_amid_a_change_lies_on_the_disk_and_had_that_content() {
    loom::model(|| {
        let table = table();
        table.learn(2, HINT);
        let theirs = Arc::clone(&table);
        let looker = thread::spawn(move || {
            assert!(theirs.find(HINT, None).is_none_or(|sector| [16, 24].contains(&sector.0)));
            assert!(theirs.find(OTHER, None).is_none_or(|sector| sector.0 == 16));
        });
        table.learn(2, OTHER);
        table.learn(3, HINT);
        looker.join().unwrap();
        assert_eq!(table.find(HINT, None), Some(Sector(24)));
        assert_eq!(table.find(OTHER, None), Some(Sector(16)));
        assert_eq!(table.entries(), 2);
    });
}
