//! The simulator's own tests: it is repeatable, it finds what it is there to find, and it tears down cleanly.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::net::{LinkShape, Network, SimAcceptor};
use super::rng::Rng;
use super::runtime::SimRuntime;
use super::scheduler::{Failure, Group, MILLI, Ran, SECOND, Scheduler, Tempo};
use crate::error::NetError;
use crate::memory::OwnedPages;
use crate::net::Connection;
use crate::runtime::{Bell, Placement, Runtime};

const MINUTE: Duration = Duration::from_secs(60);

fn world(seed: u64) -> (Arc<Scheduler>, Arc<SimRuntime>) {
    let tempo = Tempo::drawn(&mut Rng::new(seed, "tempo"));
    let scheduler = Scheduler::new(Rng::new(seed, "schedule"), tempo, true);
    let runtime = SimRuntime::new(&scheduler, Group::Source(0), Rng::new(seed, "secrets"));
    (scheduler, runtime)
}

/// Two tasks add to a sum in their own time; returns the digest of the schedule and the order of the additions.
fn sums(seed: u64) -> (u64, Vec<u32>) {
    let (scheduler, runtime) = world(seed);
    let order = Arc::new(Mutex::new(Vec::new()));
    let theirs = Arc::clone(&order);
    let ran = scheduler.run(Box::new(move || {
        let tasks: Vec<_> = (0..4)
            .map(|who| {
                let (order, inner) = (Arc::clone(&theirs), Arc::clone(&runtime));
                let body = Box::new(move || {
                    for _ in 0..5 {
                        order.lock().unwrap().push(who);
                        inner.interleave();
                        inner.sleep(Duration::from_micros(3));
                    }
                });
                runtime.spawn("adder", Placement::Any, body)
            })
            .collect();
        for task in tasks {
            task.join().unwrap();
        }
    }));
    assert_eq!(ran.failure, None);
    (ran.hash, Arc::try_unwrap(order).unwrap().into_inner().unwrap())
}

#[test]
fn a_seed_is_a_schedule_and_another_seed_another() {
    assert_eq!(sums(1), sums(1));
    assert_ne!(sums(1).1, sums(2).1);
    assert_ne!(sums(1).0, sums(2).0);
}

/// A queue of one, as one would write it over a bell. `buggy` looks before it listens.
fn hand_over(seed: u64, buggy: bool) -> Ran {
    let (scheduler, runtime) = world(seed);
    scheduler.run(Box::new(move || {
        let full = Arc::new((AtomicBool::new(false), Bell::default()));
        let (theirs, inner) = (Arc::clone(&full), Arc::clone(&runtime));
        let giver = runtime.spawn(
            "giver",
            Placement::Any,
            Box::new(move || {
                inner.sleep(Duration::from_micros(5));
                theirs.0.store(true, Ordering::SeqCst);
                inner.ring(&theirs.1);
            }),
        );
        loop {
            let mut heard = full.1.heard();
            if full.0.load(Ordering::SeqCst) {
                break;
            }
            runtime.interleave();
            if buggy {
                heard = full.1.heard();
            }
            runtime.wait(&full.1, heard, Duration::MAX);
        }
        giver.join().unwrap();
    }))
}

#[test]
fn a_lost_wake_up_is_a_deadlock_with_a_seed() {
    let found = (0..2000).find(|seed| matches!(hand_over(*seed, true).failure, Some(Failure::Deadlock(_))));
    let seed = found.expect("some schedule loses the wake-up");
    let again = hand_over(seed, true);
    let Some(Failure::Deadlock(report)) = again.failure else { panic!("not repeatable") };
    assert!(report.contains("director") && report.contains("waits for a bell"), "{report}");
    assert!((0..2000).all(|seed| hand_over(seed, false).failure.is_none()), "the right order never hangs");
}

#[test]
fn a_panic_ends_the_run_with_the_task_and_its_message() {
    let (scheduler, runtime) = world(3);
    let ran = scheduler.run(Box::new(move || {
        let task = runtime.spawn("lane 1", Placement::Any, Box::new(|| panic!("on purpose")));
        let _ = task.join();
    }));
    assert_eq!(ran.failure, Some(Failure::Panicked("task lane 1 panicked: on purpose".to_owned())));
}

#[test]
fn a_killed_group_never_runs_again_and_leaves_nothing() {
    for seed in 0..200 {
        let (scheduler, runtime) = world(seed);
        let (steps, held) = (Arc::new(AtomicU32::new(0)), Arc::new(()));
        let (inside, kept, world) = (Arc::clone(&steps), Arc::clone(&held), Arc::clone(&scheduler));
        let ran = scheduler.run(Box::new(move || {
            for _ in 0..3 {
                let (steps, inner, held) = (Arc::clone(&inside), Arc::clone(&runtime), Arc::clone(&kept));
                let body = Box::new(move || {
                    let _held = held;
                    loop {
                        steps.fetch_add(1, Ordering::SeqCst);
                        inner.sleep(Duration::from_micros(10));
                        // What an engine that turns panics into errors would do with the unwinding.
                        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| inner.interleave()));
                    }
                });
                drop(runtime.spawn("worker", Placement::Any, body));
            }
            world.sleep(MILLI);
            world.kill(Group::Source(0));
            world.step();
            let then = inside.load(Ordering::SeqCst);
            world.sleep(SECOND);
            assert_eq!(inside.load(Ordering::SeqCst), then);
            assert_eq!(Arc::strong_count(&kept), 2, "their frames are gone");
        }));
        assert_eq!(ran.failure, None, "seed {seed}");
        assert_eq!(Arc::strong_count(&held), 1);
    }
}

fn link(scheduler: &Arc<Scheduler>, seed: u64, pages: &Arc<OwnedPages>) -> Arc<Network> {
    let mut shape = LinkShape::drawn(&mut Rng::new(seed, "link"));
    shape.refuse = 0;
    Network::new(scheduler, Rng::new(seed, "net"), shape, vec![Arc::clone(pages)])
}

fn accept(acceptor: &mut SimAcceptor) -> Connection {
    acceptor.accept(MINUTE).unwrap().expect("a connection within a minute")
}

/// Sends 40 numbered messages with a page each to an echo; `fault` runs meanwhile.
fn echo(seed: u64, fault: fn(&Network, &Scheduler)) -> (Option<Failure>, Vec<Result<u32, NetError>>) {
    let (scheduler, runtime) = world(seed);
    let pages = Arc::new(OwnedPages::new(2));
    let network = link(&scheduler, seed, &pages);
    let answers = Arc::new(Mutex::new(Vec::new()));
    let out = Arc::clone(&answers);
    let world = Arc::clone(&scheduler);
    let ran = scheduler.run(Box::new(move || {
        let mut acceptor = network.listen();
        let theirs = Arc::clone(&pages);
        let server = runtime.spawn(
            "echo",
            Placement::Any,
            Box::new(move || {
                let mut c = accept(&mut acceptor);
                let mut number = [0; 4];
                while c.receiver.recv(&mut number).is_ok() && c.receiver.recv_pages(&[theirs.page(1)]).is_ok()
                {
                    let mut word = [0; 4];
                    theirs.page(1).copy_part_to(4092, &mut word);
                    assert_eq!(word, number, "bytes keep their order");
                    if c.sender.send(&number, &[]).is_err() {
                        break;
                    }
                }
            }),
        );
        let mut c = network.dialer().dial(MINUTE).unwrap();
        c.receiver.set_patience(Some(Duration::from_secs(5)));
        let faults = Arc::clone(&network);
        let inner = Arc::clone(&world);
        world.spawn(Group::World, "fault", Box::new(move || fault(&faults, &inner)));
        for i in 0..40u32 {
            pages.page(0).copy_part_from(4092, &i.to_le_bytes());
            let mut got = [0; 4];
            let answer = c
                .sender
                .send(&i.to_le_bytes(), &[pages.page(0)])
                .and_then(|()| c.receiver.recv(&mut got))
                .map(|()| u32::from_le_bytes(got));
            let failed = answer.is_err();
            out.lock().unwrap().push(answer);
            if failed {
                break;
            }
        }
        drop(c);
        server.join().unwrap();
        assert_eq!((network.open(0), network.open(1)), (0, 0), "all handles are closed");
    }));
    (ran.failure, Arc::try_unwrap(answers).unwrap().into_inner().unwrap())
}

#[test]
fn streams_keep_order_whatever_their_shape() {
    for seed in 0..100 {
        let (failure, answers) = echo(seed, |_, _| {});
        assert_eq!(failure, None, "seed {seed}");
        let numbers: Vec<u32> = answers.into_iter().map(Result::unwrap).collect();
        assert_eq!(numbers, (0..40).collect::<Vec<_>>());
    }
}

#[test]
fn a_link_that_comes_back_loses_nothing() {
    for seed in 0..100 {
        let (failure, answers) = echo(seed, |network, scheduler| {
            network.down();
            scheduler.sleep(2 * SECOND);
            network.up();
        });
        assert_eq!(failure, None, "seed {seed}");
        assert_eq!(answers.iter().filter(|a| a.is_ok()).count(), 40, "seed {seed}: {answers:?}");
    }
}

#[test]
fn a_cut_with_notice_is_told_and_a_silent_one_stalls() {
    let (mut closed, mut stalled) = (0, 0);
    for seed in 0..100 {
        let (failure, answers) = echo(seed, |network, _| network.cut(true));
        assert_eq!(failure, None, "seed {seed}");
        closed +=
            usize::from(matches!(answers.last(), Some(Err(NetError::Closed { .. } | NetError::Os { .. }))));
        let (_, answers) = echo(seed, |network, scheduler| {
            network.cut(false);
            scheduler.sleep(100 * SECOND);
            network.kill_side(1);
            network.cut(true);
        });
        stalled += usize::from(matches!(answers.last(), Some(Err(NetError::Stalled { .. }))));
    }
    assert!(closed > 80 && stalled > 80, "{closed} closed, {stalled} stalled");
}
