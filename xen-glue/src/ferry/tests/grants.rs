//! Loads that go straight into a simulated domain's memory, by grants in its table.

use std::sync::atomic::Ordering;
use std::time::Duration;

use mover::report::Mode;

use super::{Journey, Shelved, Trip, assert_failed, assert_same, patient, shelved};
use crate::save::{self, Event};
use crate::simulated::Granting;

fn journey(shelved: &Shelved, grants: fn(&Granting)) -> Journey {
    Journey { direct: true, grants, ..Journey::new(shelved.plan.clone()) }
}

/// Both ends are content, and the guest is whole; as many pages were lent in all.
fn arrived(shelved: &Shelved, trip: Trip) -> (usize, Vec<String>) {
    let (saved, restored) = (trip.saved.unwrap(), trip.restored.unwrap());
    assert_same(&shelved.guest, &trip.copy);
    assert!(saved.ferried.unwrap().references >= 400);
    assert!(trip.copy.granted.is_empty(), "{:?}", trip.copy.granted);
    let lent = restored.lent.map_or(0, |lent| lent.pages);
    assert_eq!(usize::try_from(lent).unwrap(), trip.copy.lent);
    (trip.copy.lent, trip.target_notes)
}

/// Those whose blocks were overwritten since the index was made do not hold in place either, and are sent.
#[test]
fn pages_are_loaded_where_they_belong() {
    let shelved = shelved(Mode::Refer);
    let journey = journey(&shelved, |granting| granting.table.linger(2));
    let (lent, notes) = arrived(&shelved, journey.go(&shelved.guest, &mut patient()));
    assert!(lent >= 400, "{lent} pages lent");
    assert_eq!(notes, [""; 0]);
}

/// It says why, and what was lent before is none the worse for it.
#[test]
fn what_can_not_be_lent_goes_by_a_buffer() {
    let refused: fn(&Granting) = |granting| {
        granting.table.linger(2);
        granting.table.refuse_after(1);
    };
    let never: fn(&Granting) =
        |granting| assert!(granting.refuses.set("there are no grants here".into()).is_ok());
    for (grants, why, some) in
        [(refused, "can't be mapped by grants", true), (never, "no grants here", false)]
    {
        let shelved = shelved(Mode::Refer);
        let journey = journey(&shelved, grants);
        let (lent, notes) = arrived(&shelved, journey.go(&shelved.guest, &mut patient()));
        assert!((lent > 0) == some && lent < 400, "{lent} pages lent");
        assert!(notes.iter().any(|note| note.contains("way of a buffer") && note.contains(why)), "{notes:?}");
    }
}

/// The guest writes what is just being loaded, and pages of the disk into others' places.
#[test]
fn newer_data_waits_for_pages_that_are_lent() {
    for _ in 0..5 {
        let shelved = shelved(Mode::Refer);
        shelved.guest.borrow_mut().later = vec![
            (1000..1100).collect(),
            (1000..1500).collect(),
            (1200..1500).collect(),
            (1000..1500).collect(),
        ];
        let journey = journey(&shelved, |granting| granting.table.linger(1));
        let (lent, _) = arrived(&shelved, journey.go(&shelved.guest, &mut patient()));
        assert!(lent > 0);
    }
}

/// A page is either held back or lent, never both: the table of the simulated domain would say so.
#[test]
fn pages_are_lent_while_others_are_held_back() {
    let (mut lent, mut held) = (0, 0);
    // Which of the two comes first is chance.
    for _ in 0..40 {
        let shelved = shelved(Mode::Lazy);
        shelved.guest.borrow_mut().later = vec![(0..20).collect(), (1000..1100).collect()];
        let journey = journey(&shelved, |granting| granting.table.linger(1));
        let trip = journey.go(&shelved.guest, &mut patient());
        held += trip.copy.held;
        assert!(trip.copy.let_go);
        lent += arrived(&shelved, trip).0;
        if lent > 0 && held > 0 {
            return;
        }
    }
    panic!("{lent} pages were lent and {held} held back in all of the trips");
}

/// The guest goes on at the source; the domain, whose table may say anything, is the toolstack's to destroy.
#[test]
fn a_target_that_gives_up_in_between_gives_the_guest_nothing() {
    let shelved = shelved(Mode::Refer);
    shelved.guest.borrow_mut().later = vec![(0..2000).collect(); 3];
    let journey = journey(&shelved, |granting| granting.table.linger(1));
    let stop = journey.stop_target;
    let mut toolstack = patient();
    let mut waiting = toolstack.watch.take().unwrap();
    toolstack.watch = Some(Box::new(move |event| {
        if let Event::Phase(save::Phase::Suspend) = event {
            stop.store(true, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(200));
        }
        waiting(event);
    }));
    let trip = journey.go(&shelved.guest, &mut toolstack);
    assert_failed(&trip, &shelved.guest, "cancelled", "cancelled");
}
