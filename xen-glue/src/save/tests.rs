//! Saves of simulated guests into real files and pipes, and what is restored from them.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mover::policy::Wish;
use mover::units::{Pfn, u64_of};
use proptest::prelude::*;

use super::{Event, Options, Policy, SaveError, Summary};
use crate::domain::Life;
use crate::restore;
use crate::simulated::{Guest, Landed, SimSource, SimTarget, SimToolstack, WIRING, read, states};

pub(super) const LIVE: Options =
    Options { live: true, verify: false, policy: Policy::Stock, ferry: None, frozen: None };

fn toolstack(guest: &Rc<RefCell<Guest>>) -> SimToolstack {
    SimToolstack { guest: Some(Rc::clone(guest)), ..SimToolstack::default() }
}

fn save(guest: &Rc<RefCell<Guest>>, options: &Options) -> (File, Summary) {
    let file = tempfile::tempfile().unwrap();
    let mut toolstack = toolstack(guest);
    let stop = AtomicBool::new(false);
    let summary = super::run(SimSource::new(guest), file.as_fd(), options, &mut toolstack, &stop).unwrap();
    assert_eq!(toolstack.device_log, if options.live { vec![true, false] } else { vec![] });
    assert_eq!(toolstack.suspended, 1);
    assert!(!guest.borrow().logging, "the log is still on");
    assert_eq!(summary.bytes, file.metadata().unwrap().len());
    (file, summary)
}

fn restore(mut file: &File, pages: usize) -> (restore::Restored, Rc<RefCell<Landed>>) {
    file.rewind().unwrap();
    let (target, landed) = SimTarget::new(pages);
    let mut toolstack = SimToolstack::default();
    let stop = AtomicBool::new(false);
    let restored =
        restore::run(target, file.as_fd(), &WIRING, &restore::Options::default(), &mut toolstack, &stop)
            .unwrap();
    assert_eq!(toolstack.missing, Some(0));
    (restored, landed)
}

/// The guest and what has landed are the same.
pub(super) fn assert_same(guest: &Rc<RefCell<Guest>>, landed: &Rc<RefCell<Landed>>) {
    let (guest, landed) = (guest.borrow(), landed.borrow());
    for pfn in 0..guest.memory.pages().0 {
        let hole = guest.holes.contains(&pfn);
        assert_eq!(landed.populated.contains(&pfn), !hole, "pfn {pfn}");
        let same = read(guest.memory.page(Pfn(pfn))) == read(landed.memory.page(Pfn(pfn)));
        assert!(hole || same, "pfn {pfn} is another one");
    }
    let (static_state, final_state) = states();
    assert_eq!(landed.static_state.as_ref(), Some(&static_state));
    assert_eq!(landed.final_state.as_ref(), Some(&final_state));
}

#[test]
fn a_stopped_guest_is_restored_as_it_was() {
    let guest = Guest::new(3000);
    guest.borrow_mut().holes.extend(700..1100);
    let (file, summary) = save(&guest, &Options { live: false, ..LIVE });
    assert_eq!((summary.rounds, summary.pages), (0, 2600));
    let (restored, landed) = restore(&file, 3000);
    assert_eq!((restored.pages, restored.bytes), (2600, summary.bytes));
    assert_same(&guest, &landed);
}

/// A guest that writes everything again in each round.
fn restless(throttle: bool) -> (Rc<RefCell<Guest>>, Options) {
    let guest = Guest::new(640);
    guest.borrow_mut().writes = vec![(0..640).collect(); 500];
    let wish = Wish { max_downtime: Duration::ZERO, max_rounds: 12, throttle, finish: true };
    (guest, Options { policy: Policy::Predict(wish), ..LIVE })
}

#[test]
fn a_guest_that_does_not_converge_is_slowed_down_for_as_long_as_it_is_moved() {
    let (guest, options) = restless(true);
    save(&guest, &options);
    let speeds = guest.borrow().speeds.clone();
    assert!(speeds.len() > 3 && speeds.windows(2).rev().skip(1).all(|pair| pair[1] < pair[0]), "{speeds:?}");
    assert_eq!(speeds.last(), Some(&100), "{speeds:?}");
    let (guest, options) = restless(false);
    save(&guest, &options);
    assert!(guest.borrow().speeds.is_empty());
}

#[test]
fn a_guest_that_cannot_be_slowed_down_is_moved_all_the_same() {
    let (guest, options) = restless(true);
    guest.borrow_mut().has_caps = false;
    let (_, summary) = save(&guest, &options);
    assert_eq!(summary.rounds, 12);
}

#[test]
fn a_running_guest_is_restored_as_it_was_when_it_stopped() {
    let guest = Guest::new(500);
    {
        let mut guest = guest.borrow_mut();
        guest.holes.extend([3, 77, 78]);
        guest.shy.extend([5, 400]);
        // 8 batches in the first round; the guest writes behind and before them, 100 pages each time at first.
        guest.writes = (0..8).map(|n| (n * 40..n * 40 + 100).collect()).collect();
        guest.writes.extend((0..40).map(|n| BTreeSet::from([n, n + 200])));
    }
    let (file, summary) = save(&guest, &LIVE);
    assert!(summary.rounds > 1 && summary.rounds <= 5, "{} rounds", summary.rounds);
    assert_same(&guest, &restore(&file, 500).1);
}

#[test]
fn a_guest_that_never_rests_is_stopped_after_as_many_rounds_as_configured() {
    for policy in [Policy::Stock, Policy::default()] {
        let guest = Guest::new(2000);
        guest.borrow_mut().writes = vec![(0..2000).collect(); 1000];
        let (file, summary) = save(&guest, &Options { policy, ..LIVE });
        assert!(summary.rounds <= 5, "{} rounds with {policy:?}", summary.rounds);
        assert_same(&guest, &restore(&file, 2000).1);
    }
}

#[test]
fn verifying_finds_no_difference_and_finds_one_that_is_there() {
    let guest = Guest::new(300);
    let (mut file, _) = save(&guest, &Options { verify: true, ..LIVE });
    let whole = restore(&file, 300).0;
    assert_eq!((whole.compared, whole.different), (300, 0));
    // The last byte of the last page that is compared: before TSC_INFO (32), HVM_CONTEXT (3,008), HVM_PARAMS (48), END.
    let at = file.metadata().unwrap().len() - 8 - 48 - 3008 - 32 - 1;
    file.seek(std::io::SeekFrom::Start(at)).unwrap();
    file.write_all(&[0xa5]).unwrap();
    assert_eq!(restore(&file, 300).0.different, 1);
}

/// Ends of records of a stream, the headers' included.
fn boundaries(stream: &[u8]) -> Vec<usize> {
    let mut at = 40;
    let mut all = vec![0, 24, 40];
    while at < stream.len() {
        let length = u32::from_le_bytes(stream[at + 4..at + 8].try_into().unwrap());
        at += 8 + usize::try_from(length).unwrap().next_multiple_of(8);
        all.push(at);
    }
    assert_eq!(at, stream.len());
    all
}

#[test]
fn a_stream_cut_off_anywhere_is_an_error_and_no_guest() {
    let guest = Guest::new(200);
    guest.borrow_mut().writes = vec![(0..100).collect(); 3];
    let (mut file, _) = save(&guest, &LIVE);
    let mut stream = Vec::new();
    file.rewind().unwrap();
    std::io::Read::read_to_end(&mut file, &mut stream).unwrap();
    let ends = boundaries(&stream);
    assert!(ends.len() > 12, "{} records", ends.len());
    let (whole, cuts) = ends.split_last().unwrap();
    for cut in cuts.iter().flat_map(|&end| [end, end + 4, end + 8]).filter(|cut| cut < whole) {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&stream[..cut]).unwrap();
        file.rewind().unwrap();
        let (target, landed) = SimTarget::new(200);
        let stop = AtomicBool::new(false);
        let outcome = restore::run(
            target,
            file.as_fd(),
            &WIRING,
            &restore::Options::default(),
            &mut SimToolstack::default(),
            &stop,
        );
        assert!(matches!(outcome, Err(restore::RestoreError::Stream(_))), "cut at {cut}: {outcome:?}");
        assert_eq!(landed.borrow().final_state, None, "cut at {cut}");
    }
}

#[test]
fn nothing_behind_the_stream_is_read() {
    let guest = Guest::new(100);
    let (mut file, summary) = save(&guest, &LIVE);
    file.write_all(b"the toolstack's own").unwrap();
    let (restored, _) = restore(&file, 100);
    assert_eq!(restored.bytes, summary.bytes);
    assert_eq!(file.stream_position().unwrap(), summary.bytes);
}

/// Saves a guest that writes, with this toolstack; the log must be off afterwards.
fn failing(
    guest: &Rc<RefCell<Guest>>,
    mut toolstack: SimToolstack,
    to: impl AsFd,
    stop: &AtomicBool,
) -> (SaveError, SimToolstack) {
    guest.borrow_mut().writes = vec![(0..100).collect(); 100];
    let outcome = super::run(SimSource::new(guest), to.as_fd(), &LIVE, &mut toolstack, stop);
    let guest = guest.borrow();
    assert!(!guest.logging && guest.off == 1, "the log is on, or was turned off {} times", guest.off);
    assert_eq!(toolstack.device_log, [true, false]);
    (outcome.unwrap_err(), toolstack)
}

#[test]
fn cancelled_in_the_middle_the_guest_runs_on_and_the_log_is_off() {
    let guest = Guest::new(1000);
    let stop = Arc::new(AtomicBool::new(false));
    let mut toolstack = toolstack(&guest);
    let set = Arc::clone(&stop);
    toolstack.watch = Some(Box::new(move |event| {
        if matches!(event, Event::Frames { round: 2, .. }) {
            set.store(true, Ordering::Relaxed);
        }
    }));
    let (error, toolstack) = failing(&guest, toolstack, tempfile::tempfile().unwrap(), &stop);
    assert!(matches!(error, SaveError::Cancelled), "{error}");
    assert_eq!((toolstack.suspended, guest.borrow().life), (0, Life::Running));
}

#[test]
fn a_guest_that_does_not_suspend_itself_is_said_to() {
    let refusing = |refuse, instead| {
        let guest = Guest::new(300);
        let stop = AtomicBool::new(false);
        let toolstack = SimToolstack { refuse, instead, ..toolstack(&guest) };
        failing(&guest, toolstack, tempfile::tempfile().unwrap(), &stop).0
    };
    assert!(matches!(refusing(true, None), SaveError::Refused { .. }));
    for life in [Life::Running, Life::ShutDown(3), Life::ShutDown(0)] {
        let error = refusing(false, Some(life));
        assert!(matches!(error, SaveError::NotSuspended(found) if found == life), "{error}");
    }
}

#[test]
fn an_other_end_that_is_gone_leaves_the_log_off() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let guest = Guest::new(300);
    let stop = AtomicBool::new(false);
    let toolstack = toolstack(&guest);
    let file = tempfile::tempfile().unwrap();
    drop(file);
    let mut failed = toolstack;
    let outcome = super::run(SimSource::new(&guest), writer.as_fd(), &LIVE, &mut failed, &stop);
    assert!(matches!(outcome, Err(SaveError::Stream(error)) if error.is_io()));
    assert_eq!((guest.borrow().logging, failed.suspended), (false, 0));
}

#[test]
fn a_stream_for_a_larger_guest_or_without_its_toolstack_is_refused() {
    let guest = Guest::new(300);
    let (mut file, _) = save(&guest, &LIVE);
    let stop = AtomicBool::new(false);
    let mut outcome = |pages, refuse| {
        file.rewind().unwrap();
        let (target, landed) = SimTarget::new(pages);
        let mut toolstack = SimToolstack { refuse, ..SimToolstack::default() };
        let outcome =
            restore::run(target, file.as_fd(), &WIRING, &restore::Options::default(), &mut toolstack, &stop);
        assert_eq!(landed.borrow().final_state, None);
        outcome.unwrap_err()
    };
    assert!(matches!(outcome(299, false), restore::RestoreError::Domain(_)));
    assert!(matches!(outcome(300, true), restore::RestoreError::Refused { .. }));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn whatever_a_guest_does_it_is_restored_as_it_was(
        pages in 1usize..400,
        // A guest without any memory is none, and a stream without pages no stream.
        holes in prop::collection::btree_set(1u64..400, 0..60),
        shy in prop::collection::btree_set(0u64..400, 0..20),
        writes in prop::collection::vec(prop::collection::btree_set(0u64..400, 0..120), 0..24),
        live: bool,
    ) {
        let guest = Guest::new(pages);
        {
            let within = |all: BTreeSet<u64>| all.into_iter().filter(|&pfn| pfn < u64_of(pages)).collect();
            let mut guest = guest.borrow_mut();
            guest.holes = within(holes);
            guest.shy = within(shy);
            guest.writes = writes.into_iter().map(within).collect();
        }
        let (file, _) = save(&guest, &Options { live, ..LIVE });
        assert_same(&guest, &restore(&file, pages).1);
    }
}
