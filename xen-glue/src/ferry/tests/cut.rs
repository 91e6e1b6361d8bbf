//! The connections between the hosts are lost: in the middle of a drain, with pages outstanding that only the source has, or while the
//! guest changes hands. They go over a wire of the test's own: what it has cut is closed to both ends, and nobody comes through
//! before it is mended.

use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Mutex;
use std::time::Instant;

use super::certified::Office;
use super::overwritten::{ENOUGH, FIRST, Overwritten, SHELVED, is_gone, overwritten};
use super::*;
use crate::stream::Offer;

/// How long anything may take here.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is between the hosts.
#[derive(Default)]
struct Wire {
    /// Where the source is.
    source: Mutex<String>,
    cut: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
}

impl Wire {
    /// One, and the address by which the target gets to the source.
    fn new() -> (Arc<Self>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let wire = Arc::new(Self::default());
        let carrying = Arc::clone(&wire);
        std::thread::spawn(move || listener.incoming().for_each(|came| carrying.carry(came.unwrap())));
        (wire, address)
    }

    fn carry(&self, target: TcpStream) {
        let source = self.source.lock().unwrap().clone();
        let mut open = self.open.lock().unwrap();
        if self.cut.load(Ordering::SeqCst) {
            return;
        }
        let Ok(source) = TcpStream::connect(source) else { return };
        for (from, to) in [(&source, &target), (&target, &source)] {
            let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
            std::thread::spawn(move || {
                slowly(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Both);
            });
        }
        open.extend([source, target]);
    }

    fn cut(&self) {
        let open = self.open.lock().unwrap();
        self.cut.store(true, Ordering::SeqCst);
        open.iter().for_each(|socket| drop(socket.shutdown(Shutdown::Both)));
    }

    fn mend(&self) {
        self.cut.store(false, Ordering::SeqCst);
    }
}

/// Carries no more than 4 MiB a second: what the source sends is not all on its way before the wire is cut.
fn slowly(from: &mut TcpStream, to: &mut TcpStream) {
    let mut some = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut some) {
        if to.write_all(&some[..count]).is_err() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Has the offer name the wire's address in place of the source's own.
fn by_way_of(wire: &Arc<Wire>, address: String) -> Carrier {
    let wire = Arc::clone(wire);
    Box::new(move |bytes, _| {
        let kind = OFFER.to_le_bytes();
        let Some(at) = bytes.windows(4).position(|some| some == kind) else { return Some(bytes.to_vec()) };
        let length =
            |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()).try_into().unwrap();
        let body: usize = length(at + 4);
        let mut offer = Offer::decode(&bytes[at + 8..at + 8 + body]).unwrap();
        let source = std::mem::replace(&mut offer.addresses, vec![address.clone()]).remove(0);
        *wire.source.lock().unwrap() = source;
        let mut out = bytes[..at + 4].to_vec();
        let changed = offer.encode();
        out.extend(u32::try_from(changed.len()).unwrap().to_le_bytes());
        out.extend(&changed);
        out.resize(out.len().next_multiple_of(8), 0);
        out.extend(&bytes[at + 8 + body.next_multiple_of(8)..]);
        Some(out)
    })
}

struct Struck {
    trip: Trip,
    guest: Rc<RefCell<Guest>>,
    /// Pages that were outstanding when the wire was cut, and those of them that only the source had.
    outstanding: (usize, usize),
}

/// Moves a guest over a wire that is cut at a page that comes to the running guest. It is mended when all is loaded
/// that can be without the source, if it is to be.
fn struck(changed: impl Fn(&mut Journey), mended: bool) -> Struck {
    let Overwritten { guest, plan, mut toolstack, _directory } = overwritten();
    let (wire, address) = Wire::new();
    let mut journey = Journey::new(plan);
    journey.carry = by_way_of(&wire, address);
    journey.slow = FIRST..FIRST + SHELVED;
    changed(&mut journey);
    let outstanding = Arc::new(Mutex::new((0, 0)));
    let seen = Arc::clone(&outstanding);
    journey.at_release = Some(Box::new(move |hold| {
        wire.cut();
        *hold.slow.lock().unwrap() = 0..0;
        let held = hold.holds();
        *seen.lock().unwrap() = (held.len(), held.iter().filter(|pfn| is_gone(**pfn)).count());
        if mended {
            let held = hold.held();
            std::thread::spawn(move || {
                let begun = Instant::now();
                while held.snapshot().iter().any(|at| !is_gone(Pfn::at(at))) {
                    assert!(begun.elapsed() < PATIENCE, "the disk is not loaded from");
                    std::thread::sleep(Duration::from_millis(5));
                }
                wire.mend();
            });
        }
    }));
    let trip = journey.go(&guest, &mut toolstack);
    let outstanding = *outstanding.lock().unwrap();
    Struck { trip, guest, outstanding }
}

/// As above, as often as it takes until enough was outstanding: what the loader has begun with before the holder comes to it is not
/// held, and how much that is, is chance. So is how much of it had left the source before the cut: where that was all, the guest
/// has it, and is whole.
fn struck_in_time(changed: impl Fn(&mut Journey), mended: bool) -> Struck {
    for _ in 0..20 {
        let struck = struck(&changed, mended);
        if !mended && struck.trip.restored.is_ok() {
            assert_same(&struck.guest, &struck.trip.copy);
        } else if struck.outstanding.1 >= ENOUGH {
            return struck;
        }
    }
    panic!("too little was outstanding in all of the trips");
}

fn assert_told(said: &[String], what: &str) {
    assert!(said.iter().any(|line| line.contains(what)), "{what}: {said:#?}");
}

/// The two find each other again, under the same key and certificates, and the guest gets what only the source has.
fn comes_back(changed: impl Fn(&mut Journey)) {
    let Struck { trip, guest, outstanding } = struck_in_time(changed, true);
    assert!(trip.saved.is_ok() && trip.restored.is_ok(), "{:#?}", trip.lingered);
    assert_same(&guest, &trip.copy);
    assert!(trip.copy.let_go && !trip.copy.stopped, "of {outstanding:?}");
    assert_told(&trip.lingered[0], "the target is there again");
    assert_told(&trip.lingered[1], "the source is there again");
}

#[test]
fn a_cut_drain_is_taken_up_again_under_tls() {
    comes_back(|_| ());
}

#[test]
fn a_cut_drain_is_taken_up_again_in_the_clear() {
    comes_back(|journey| {
        journey.options.ferry.as_mut().unwrap().plaintext = true;
        journey.plaintext = true;
    });
}

#[test]
fn a_cut_drain_is_taken_up_again_between_certified_hosts() {
    let office = Office::new("ours");
    comes_back(move |journey| {
        journey.options.ferry.as_mut().unwrap().credentials = office.host("127.0.0.1", None);
        journey.credentials = office.host("target", None);
    });
}

/// What only the source has can't be had, and the guest is stopped, never given a wrong page; all else has been loaded.
#[test]
fn a_source_that_is_not_found_in_time_stops_the_guest_with_a_page_named() {
    let brief = Duration::from_secs(2);
    let Struck { trip, guest, outstanding } = struck_in_time(
        |journey| {
            journey.options.ferry.as_mut().unwrap().redial_for = brief;
            journey.redial_for = brief;
        },
        false,
    );
    assert!(trip.saved.is_err() && trip.restored.is_err());
    assert!(trip.copy.stopped && !trip.copy.let_go, "of {outstanding:?}");
    assert_told(&trip.lingered[0], "may still need pages from here");
    assert_told(&trip.lingered[1], "can't be had any more, the first is pfn");
    let guest = guest.borrow();
    for (pfn, page) in (0..).map(Pfn).zip(&trip.copy.pages) {
        let right = read(guest.memory.page(pfn)) == *page;
        assert!(right || is_gone(pfn) && *page == PageBuf([0xdd; PAGE_BYTES]), "{pfn} is another one");
    }
}

/// Who has the guest is the toolstack's to settle while it changes hands: neither end dials, and both say that it failed. In mode
/// lazy, in which they would during the drain.
#[test]
fn what_is_cut_while_the_guest_changes_hands_is_not_dialled_again() {
    let (wire, address) = Wire::new();
    let mut journey = Journey::new(plan(Mode::Lazy));
    journey.options.ferry.as_mut().unwrap().redial_for = Duration::from_secs(1);
    journey.carry = by_way_of(&wire, address);
    let mut toolstack = patient();
    let mut waiting = toolstack.watch.take().unwrap();
    toolstack.watch = Some(Box::new(move |event| {
        if let Event::Phase(save::Phase::FinalState) = event {
            wire.cut();
        }
        waiting(event);
    }));
    let trip = journey.go(&Guest::new(1000), &mut toolstack);
    let failed = trip.saved.expect_err("the target has been told to start it").to_string();
    assert!(failed.contains("the other end did not confirm"), "{failed}");
    assert!(trip.restored.is_err() && !trip.copy.stopped);
    assert!(trip.notes.iter().all(|note| !note.contains("dialling again")), "{:#?}", trip.notes);
}
