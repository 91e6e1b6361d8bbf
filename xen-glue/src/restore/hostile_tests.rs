//! Restores of streams cut off, bent and made up, into a simulated domain: an error at the latest where the stream's own
//! rules see one, never a panic, and never a domain that was given its last state and could run.

use std::cell::RefCell;
use std::io::{Seek, Write};
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;

use mover::units::u64_of;
use proptest::prelude::*;

use super::{Options, RestoreError, Restored, run};
use crate::simulated::{Landed, SimTarget, SimToolstack, WIRING};
use crate::stream::tests::hostile::{Dice, mutate};
use crate::stream::tests::samples::{boundaries, cases, hvm, hvm_with, pv, read_all};

/// Pages of the domain: one more than the samples' last.
const PAGES: usize = 104;

/// Restores `bytes`. Whatever comes of it, nothing behind the stream's end was read and no unfinished domain finished.
fn restore(bytes: &[u8]) -> (Result<Restored, RestoreError>, Rc<RefCell<Landed>>) {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    let (target, landed) = SimTarget::new(PAGES);
    let stop = AtomicBool::new(false);
    let outcome =
        run(target, file.as_fd(), &WIRING, &Options::default(), &mut SimToolstack::default(), &stop);
    assert_eq!(outcome.is_ok(), landed.borrow().final_state.is_some(), "{outcome:?}");
    if let Ok(restored) = &outcome {
        assert_eq!(restored.bytes, file.stream_position().unwrap());
        assert!(restored.bytes <= u64_of(bytes.len()));
    }
    (outcome, landed)
}

#[test]
fn the_samples_are_restored() {
    let (outcome, landed) = restore(&hvm(2));
    assert_eq!(outcome.unwrap().pages, 4);
    assert_eq!(landed.borrow().populated.len(), 4);
    let (outcome, landed) = restore(&pv(2));
    assert!(matches!(outcome, Err(RestoreError::Kind { .. })), "{outcome:?}");
    assert_eq!((landed.borrow().static_state.is_some(), landed.borrow().populated.len()), (false, 0));
}

/// Every byte, so every record's start too.
#[test]
fn cut_off_at_any_byte_it_ends_with_an_error_there() {
    let bytes = hvm(2);
    // CPUID and MSR policies and STATIC_DATA_END.
    let first_pages = boundaries(&bytes)[3];
    for cut in 0..bytes.len() {
        let (outcome, landed) = restore(&bytes[..cut]);
        match outcome {
            Err(RestoreError::Stream(error)) => assert_eq!(error.offset, u64_of(cut), "{error}"),
            other => panic!("cut at {cut}: {other:?}"),
        }
        let landed = landed.borrow();
        assert!(cut > first_pages || landed.populated.is_empty(), "cut at {cut}");
        assert!(cut >= first_pages || landed.static_state.is_none(), "cut at {cut}");
    }
}

#[test]
fn with_any_bit_of_a_records_header_turned_it_fails_where_the_stream_does() {
    let bytes = hvm(2);
    let starts = boundaries(&bytes);
    let mut failed = 0;
    for &start in &starts[..starts.len() - 1] {
        for (at, bit) in (start..start + 8).flat_map(|at| (0..8).map(move |bit| (at, bit))) {
            let mut broken = bytes.clone();
            broken[at] ^= 1 << bit;
            let (outcome, _) = restore(&broken);
            assert!(outcome.is_err() || read_all(&broken).is_ok(), "bit {bit} of byte {at}: {outcome:?}");
            failed += usize::from(outcome.is_err());
        }
    }
    assert!(failed > (starts.len() - 1) * 55, "only {failed} of {} failed", (starts.len() - 1) * 64);
}

#[test]
fn bent_streams_end_with_an_error_or_a_whole_domain() {
    let samples = [hvm(2), hvm_with(3, false)];
    let mut dice = Dice(0xfe11);
    let (all, mut whole) = (cases(1500), 0);
    for case in 0..all {
        let mut bytes = samples[case % samples.len()].clone();
        for _ in 0..=dice.roll(4) {
            mutate(&mut bytes, &mut dice);
        }
        let (outcome, _) = restore(&bytes);
        assert!(outcome.is_err() || read_all(&bytes).is_ok(), "case {case}: {outcome:?}");
        whole += usize::from(outcome.is_ok());
    }
    assert!(whole > all / 100 && whole < all / 2, "{whole} of {all} were whole: the bending is off");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: u32::try_from(cases(256)).unwrap(), ..ProptestConfig::default() })]

    #[test]
    fn made_up_bytes_are_no_domain(from in 0..4usize, noise in prop::collection::vec(any::<u8>(), 0..3000)) {
        let sample = hvm(1);
        // From the very start, behind the headers, before the first pages, before what follows them.
        let start = [0, boundaries(&sample)[0], boundaries(&sample)[3], boundaries(&sample)[6]][from];
        let (outcome, _) = restore(&[&sample[..start], &noise].concat());
        prop_assert!(outcome.is_err());
    }
}
