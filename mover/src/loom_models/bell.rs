//! The bell: no ring is lost, and who is woken sees what was done before it rang. A lost one is a deadlock here, for no
//! sleep of a model ends by its time.
#![forbid(unsafe_code)]

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use loom::thread;

use crate::error::{Error, NetError};
use crate::memory::watched::WatchedPage;
use crate::pipeline::Failure;
use crate::runtime::{Bell, Runtime, Threads};
use crate::sync::{AtomicU32, Ordering};

/// One for all runs of a model: it asks the kernel for its cores.
fn runtime() -> &'static Threads {
    static RUNTIME: OnceLock<Threads> = OnceLock::new();
    RUNTIME.get_or_init(Threads::new)
}

/// As everyone in the engine waits: count, look, sleep.
fn wait_until(bell: &Bell, looks: impl Fn() -> bool) {
    loop {
        let heard = bell.heard();
        if looks() {
            return;
        }
        runtime().wait(bell, heard, Duration::MAX);
    }
}

#[test]
fn no_ring_is_lost_and_it_brings_what_was_written() {
    loom::model(|| {
        let shared = Arc::new((AtomicU32::new(0), Bell::default()));
        let (theirs, page) = (Arc::clone(&shared), WatchedPage::new());
        let their_page = Arc::clone(&page);
        let ringer = thread::spawn(move || {
            their_page.write(9);
            theirs.0.store(1, Ordering::SeqCst);
            runtime().ring(&theirs.1);
        });
        wait_until(&shared.1, || shared.0.load(Ordering::SeqCst) == 1);
        assert_eq!(page.read(), 9);
        ringer.join().unwrap();
        assert_eq!(shared.1.waiters.load(Ordering::SeqCst), 0);
    });
}

#[test]
fn one_ring_wakes_all_who_wait() {
    loom::model(|| {
        let shared = Arc::new((AtomicU32::new(0), Bell::default()));
        let waiters: Vec<_> = (0..2)
            .map(|_| {
                let theirs = Arc::clone(&shared);
                thread::spawn(move || wait_until(&theirs.1, || theirs.0.load(Ordering::SeqCst) == 1))
            })
            .collect();
        shared.0.store(1, Ordering::SeqCst);
        runtime().ring(&shared.1);
        for waiter in waiters {
            waiter.join().unwrap();
        }
    });
}

/// Two turns of handing a number to and fro, each party waiting on a bell of its own.
#[test]
fn two_take_turns() {
    loom::model(|| {
        let shared = Arc::new((AtomicU32::new(0), Bell::default(), Bell::default()));
        let theirs = Arc::clone(&shared);
        let partner = thread::spawn(move || {
            wait_until(&theirs.1, || theirs.0.load(Ordering::SeqCst) == 1);
            theirs.0.store(2, Ordering::SeqCst);
            runtime().ring(&theirs.2);
        });
        shared.0.store(1, Ordering::SeqCst);
        runtime().ring(&shared.1);
        wait_until(&shared.2, || shared.0.load(Ordering::SeqCst) == 2);
        partner.join().unwrap();
    });
}

fn failed(who: u32) -> Error {
    NetError::Stalled { peer: format!("peer {who}"), seconds: u64::from(who), doing: "a model" }.into()
}

/// Who sees that a task failed finds its error, once; the control task hears of it.
#[test]
fn a_failure_comes_with_its_error_and_once() {
    loom::model(|| {
        let shared = Arc::new((Failure::default(), Bell::default()));
        let tasks: Vec<_> = (1..=2)
            .map(|who| {
                let theirs = Arc::clone(&shared);
                thread::spawn(move || theirs.0.set(runtime(), &theirs.1, failed(who)))
            })
            .collect();
        wait_until(&shared.1, || shared.0.is_set());
        assert!(shared.0.check().is_err(), "the flag is set behind its error");
        for task in tasks {
            task.join().unwrap();
        }
        assert!(shared.0.is_set());
    });
}
