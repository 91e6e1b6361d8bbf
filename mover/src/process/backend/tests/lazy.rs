use super::*;
use crate::error::GuestError;
use crate::guest::{DirtyLog, HoldBack, TargetGuest};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};

const PAGES: u64 = 4096;

/// An incoming puppet, the engine attached to it as the target.
fn target() -> Option<(Puppet, TargetGuest, Arc<dyn HoldBack>)> {
    if !offers(Features::HOLD_BACK) {
        return None;
    }
    let puppet = Puppet::new(PAGES, "incoming");
    let Target { guest, .. } = attach_target(puppet.client(), "m").unwrap();
    let lazy = Arc::clone(guest.lazy.as_ref().unwrap());
    Some((puppet, guest, lazy))
}

fn place(guest: &TargetGuest, page: u64, word: u64) {
    let mut window = guest.memory.window(1).unwrap();
    guest.memory.map(&[Pfn(page)], &mut window).unwrap();
    window.page(0).unwrap().copy_from(&page_of(word));
}

fn start(guest: &mut TargetGuest) {
    guest.life.load_state(&[1]).unwrap();
    guest.life.start().unwrap();
}

fn next_fault(lazy: &dyn HoldBack) -> u64 {
    loop {
        if let Some(pfn) = lazy.next_fault(Duration::from_secs(5)).unwrap() {
            return pfn.0;
        }
    }
}

fn panics(what: impl FnOnce()) -> bool {
    std::panic::catch_unwind(AssertUnwindSafe(what)).is_err()
}

#[test]
fn a_held_page_waits_and_gets_just_what_is_released() {
    let Some((puppet, mut guest, lazy)) = target() else { return };
    for page in [9, 10, 11] {
        place(&guest, page, 0xdead);
    }
    lazy.hold_back(&set_of(PAGES, [10, 11, 600])).unwrap();
    assert_eq!(word(&*guest.memory, 9), Some(0xdead), "not named: the guest's");
    assert_eq!(word(&*guest.memory, 10), None, "we don't touch it either");
    let mut untouched = set_of(PAGES, []);
    guest.memory.untouched(&mut untouched).unwrap();
    assert!(!untouched.get(600) && untouched.get(601), "a hole that is held back is not zero");
    start(&mut guest);

    let mut readers: Vec<_> = (0..3).map(|_| puppet.thread()).collect();
    readers.iter_mut().for_each(|r| r.order("read 10"));
    assert_eq!(next_fault(&*lazy), 10);
    assert_eq!(lazy.next_fault(Duration::from_millis(100)).unwrap(), None, "three wait, one is told");
    let mut writer = puppet.thread();
    writer.order("write 11 7");
    assert_eq!(next_fault(&*lazy), 11);
    assert!(readers.iter().chain([&writer]).all(|r| r.is_silent()));
    let staging = Staging::new(1);
    lazy.release(Pfn(10), staging.with(0, 42)).unwrap();
    readers.iter_mut().for_each(|r| assert_eq!(r.answer(), "42"));
    assert!(writer.is_silent());
    lazy.release(Pfn(11), staging.with(0, 43)).unwrap();
    assert_eq!(writer.answer(), "done");
    assert_eq!((puppet.read(11), word(&*guest.memory, 11)), (7, Some(7)), "the guest's write came after");
    lazy.release(Pfn(11), staging.with(0, 44)).unwrap();
    assert_eq!(puppet.read(11), 7, "released before: nothing changes");

    // Free memory: beside a held page it comes to us, elsewhere it does not.
    let mut free = puppet.thread();
    free.order("read 601");
    assert_eq!(next_fault(&*lazy), 601);
    lazy.wake(Pfn(601)).unwrap();
    assert_eq!(free.answer(), "0");
    lazy.wake(Pfn(601)).unwrap();
    free.order("read 602");
    assert_eq!(next_fault(&*lazy), 602);
    place(&guest, 602, 5);
    assert!(free.is_silent(), "the page is there, and nobody has said so");
    lazy.wake(Pfn(602)).unwrap();
    assert_eq!(free.answer(), "5");
    assert_eq!(puppet.read(2000), 0);
    assert_eq!(lazy.next_fault(Duration::from_millis(20)).unwrap(), None);

    assert!(panics(|| drop(lazy.wake(Pfn(600)))), "a held page is never answered with zero");
    assert!(panics(|| drop(lazy.finish())), "nor given up");
    assert!(matches!(lazy.wake(Pfn(PAGES)), Err(GuestError::NoSuchPage { .. })));
    assert!(matches!(lazy.release(Pfn(PAGES), staging.with(0, 0)), Err(GuestError::NoSuchPage { .. })));
    lazy.release(Pfn(600), staging.with(0, 45)).unwrap();
    lazy.finish().unwrap();
    assert_eq!(puppet.read(600), 45);
    assert!(!puppet.is_watched("um"));
}

#[test]
fn many_pages_at_once_old_content_never_shows() {
    let Some((puppet, mut guest, lazy)) = target() else { return };
    let held = 100..1500;
    for page in held.clone().step_by(3) {
        place(&guest, page, 0xdead);
    }
    lazy.hold_back(&set_of(PAGES, held.clone())).unwrap();
    start(&mut guest);
    let mut sweepers: Vec<_> = (0..4).map(|_| puppet.thread()).collect();
    for (n, sweeper) in sweepers.iter_mut().enumerate() {
        sweeper.order(&format!("sweep {} {} {}", held.start, held.end, n * 300));
    }
    let done = AtomicBool::new(false);
    // One page is one task's: the drain takes them from the back, whoever gets to a page first releases it.
    let taken = crate::bitmap::SharedBitmap::new(usize::try_from(PAGES).unwrap());
    let mut served = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let staging = Staging::new(1);
            for page in held.clone().rev() {
                if taken.set(Pfn(page).index()) {
                    lazy.release(Pfn(page), staging.with(0, page + 1)).unwrap();
                }
                std::thread::yield_now();
            }
        });
        let faults = scope.spawn(|| {
            let staging = Staging::new(1);
            let mut served = 0;
            while !done.load(Ordering::SeqCst) {
                let Some(pfn) = lazy.next_fault(Duration::from_millis(10)).unwrap() else { continue };
                if taken.set(pfn.index()) {
                    served += 1;
                    lazy.release(pfn, staging.with(0, pfn.0 + 1)).unwrap();
                }
            }
            served
        });
        for sweeper in &mut sweepers {
            assert_eq!(sweeper.answer(), "done");
        }
        done.store(true, Ordering::SeqCst);
        served = faults.join().unwrap();
    });
    assert!(served > 0, "the guest was there first at times");
    lazy.finish().unwrap();
    assert_eq!(puppet.ask("sweep 100 1500 0"), "done");
}

#[test]
fn a_guest_that_was_a_target_can_be_a_source() {
    let Some((puppet, mut guest, lazy)) = target() else { return };
    if !offers(Features::LOG_WRITES) {
        return;
    }
    place(&guest, 1, 1);
    place(&guest, 3000, 1);
    lazy.hold_back(&set_of(PAGES, [2])).unwrap();
    start(&mut guest);
    lazy.release(Pfn(2), Staging::new(1).with(0, 2)).unwrap();
    lazy.finish().unwrap();
    drop((guest, lazy));
    let mut source = loop {
        match attach_source(puppet.client(), "next") {
            Ok(source) => break source,
            Err(e) => assert!(e.to_string().contains("has this guest"), "{e}"),
        }
    };
    source.tracker.arm().unwrap();
    let mut dirty = set_of(PAGES, []);
    // It has not touched all of them itself yet: a first read is no write.
    assert_eq!([puppet.read(1), puppet.read(2), puppet.read(3000), puppet.read(3500)], [1, 2, 1, 0]);
    source.tracker.harvest(&mut dirty).unwrap();
    assert_eq!(pages_in(&dirty), [0u64; 0]);
    puppet.write(2, 3);
    source.tracker.harvest(&mut dirty).unwrap();
    assert_eq!(pages_in(&dirty), [2]);
}

#[test]
fn a_killed_engine_leaves_waiters_waiting_for_the_next() {
    if !offers(Features::HOLD_BACK) {
        return;
    }
    let puppet = Puppet::new(PAGES, "incoming");
    let mut engine = Own::start("engine", puppet.dir.path(), "target");
    wait_for(&puppet.dir.path().join("holding"));
    puppet.write(12, 100);
    let (mut one, mut two) = (puppet.thread(), puppet.thread());
    one.order("read 10");
    wait_for(&puppet.dir.path().join("told"));
    engine.0.kill().unwrap();
    engine.0.wait().unwrap();
    two.order("read 11");
    assert!(one.is_silent() && two.is_silent(), "they would read zeroes otherwise");
    let Target { guest, .. } = loop {
        match attach_target(puppet.client(), "next") {
            Ok(target) => break target,
            Err(e) => assert!(e.to_string().contains("has this guest"), "{e}"),
        }
    };
    let lazy = guest.lazy.unwrap();
    lazy.hold_back(&set_of(PAGES, 10..20)).unwrap();
    let mut told = [next_fault(&*lazy), next_fault(&*lazy)];
    told.sort_unstable();
    assert_eq!(told, [10, 11], "the one that the dead engine was told of as well");
    assert!(one.is_silent() && two.is_silent());
    let staging = Staging::new(1);
    for page in 10..20 {
        lazy.release(Pfn(page), staging.with(0, page)).unwrap();
    }
    assert_eq!((one.answer(), two.answer()), ("10".to_owned(), "11".to_owned()));
    assert_eq!(puppet.read(12), 100, "released by the first engine and written since: the guest's own");
    lazy.finish().unwrap();
    assert_eq!(puppet.read(19), 19);
    assert!(!puppet.is_watched("um"));
}

#[test]
fn with_nothing_outstanding_nothing_is_watched() {
    let Some((puppet, mut guest, lazy)) = target() else { return };
    place(&guest, 1, 1);
    lazy.hold_back(&set_of(PAGES, [])).unwrap();
    assert!(!puppet.is_watched("um"));
    start(&mut guest);
    assert_eq!([puppet.read(1), puppet.read(2)], [1, 0]);
    lazy.finish().unwrap();
    drop((guest, lazy));
    assert_eq!(puppet.read(3), 0);
}

#[test]
fn a_target_dropped_before_the_start_leaves_nothing() {
    let Some((mut puppet, guest, lazy)) = target() else { return };
    lazy.hold_back(&set_of(PAGES, [2])).unwrap();
    drop((guest, lazy));
    assert!(puppet.process.0.wait().unwrap().success());
}
