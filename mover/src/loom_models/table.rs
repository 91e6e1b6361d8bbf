//! The page table: the newest version wins, whoever comes first; one writes a page at a time; a reference is read whole.
#![forbid(unsafe_code)]

use std::sync::Arc;

use loom::thread;

use super::reference;
use crate::memory::watched::WatchedPage;
use crate::pipeline::table::{Claim, PageTable, State};
use crate::units::{PageCount, Pfn, Version};

const PFN: Pfn = Pfn(1);

/// What a lane does with data, without a bell: looks again and again while an older version is being written.
fn place(table: &PageTable, page: &WatchedPage, version: u32) {
    loop {
        match table.claim(PFN, Version(version), false) {
            Claim::Granted(before) => {
                page.write(version);
                return table.placed(PFN, Version(version), before);
            }
            Claim::Stale => return,
            Claim::Busy => thread::yield_now(),
        }
    }
}

/// What the loader does with a reference, if it finds one.
fn load(table: &PageTable, page: &WatchedPage) {
    let Some(wanted) = table.reference(PFN) else { return };
    if table.claim_load(PFN, wanted.version) {
        page.write(wanted.version.0);
        table.placed(PFN, wanted.version, State::Outstanding(wanted.version));
    }
}

#[test]
fn of_two_lanes_the_newer_wins_and_neither_writes_into_the_other() {
    loom::model(|| {
        let (table, page) = (Arc::new(PageTable::new(PageCount(2))), WatchedPage::new());
        let (their_table, their_page) = (Arc::clone(&table), Arc::clone(&page));
        let older = thread::spawn(move || place(&their_table, &their_page, 5));
        place(&table, &page, 6);
        older.join().unwrap();
        assert_eq!(table.state(PFN), State::Placed(Version(6)));
        assert_eq!(page.read(), 6);
    });
}

#[test]
fn a_load_under_way_is_waited_for_and_the_count_is_right() {
    loom::model(|| {
        let (table, page) = (Arc::new(PageTable::new(PageCount(2))), WatchedPage::new());
        let (block, check) = reference(5);
        table.refer(PFN, Version(5), block, check);
        let (their_table, their_page) = (Arc::clone(&table), Arc::clone(&page));
        let loader = thread::spawn(move || load(&their_table, &their_page));
        place(&table, &page, 6);
        loader.join().unwrap();
        assert_eq!((table.state(PFN), page.read()), (State::Placed(Version(6)), 6));
        assert_eq!(table.outstanding(), 0);
        assert!(!table.ask.get(1) && !table.asked.get(1));
    });
}

/// Place and check of one reference, never of two: half of each would be read from the wrong block and asked for again,
/// or worse, be the right bytes under the wrong version.
#[test]
fn a_reference_is_read_whole_while_a_newer_one_comes() {
    loom::model(|| {
        let table = Arc::new(PageTable::new(PageCount(2)));
        let (block, check) = reference(5);
        table.refer(PFN, Version(5), block, check);
        let theirs = Arc::clone(&table);
        let lane = thread::spawn(move || {
            let (block, check) = reference(6);
            assert_eq!(
                theirs.refer(PFN, Version(6), block, check),
                Claim::Granted(State::Outstanding(Version(5)))
            );
        });
        if let Some(wanted) = table.reference(PFN) {
            let number = u8::try_from(wanted.version.0).unwrap();
            assert_eq!((wanted.block, wanted.check), reference(number), "version {number}");
        }
        lane.join().unwrap();
        assert_eq!(table.reference(PFN).unwrap().version, Version(6));
        assert_eq!(table.outstanding(), 1);
        assert!(table.wanted.get(1));
    });
}

/// A newer reference against newer data, in any order: the newest stays, and is counted if it is outstanding.
#[test]
fn references_and_data_end_with_the_newest() {
    loom::model(|| {
        let (table, page) = (Arc::new(PageTable::new(PageCount(2))), WatchedPage::new());
        let (their_table, their_page) = (Arc::clone(&table), Arc::clone(&page));
        let data = thread::spawn(move || place(&their_table, &their_page, 5));
        let (block, check) = reference(6);
        while table.refer(PFN, Version(6), block, check) == Claim::Busy {
            thread::yield_now();
        }
        data.join().unwrap();
        assert_eq!(table.state(PFN), State::Outstanding(Version(6)));
        assert_eq!(table.outstanding(), 1);
        load(&table, &page);
        assert_eq!((table.outstanding(), page.read()), (0, 6));
    });
}
