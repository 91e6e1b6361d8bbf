//! The simulated guest under a mover written by hand: a right one moves it under any seed, and every way of moving it
//! wrong is found.

use std::sync::Arc;
use std::time::Duration;

use super::content::Content;
use super::disk::{DiskShape, DiskWorld, SOURCE, TARGET};
use super::guest::{Guest, GuestShape, SourcePhase, TargetPhase};
use super::rng::Rng;
use super::scheduler::{Failure, Group, MILLI, Scheduler, Tempo};
use super::workload::Beginning;
use crate::bitmap::Bitmap;
use crate::disk::{Read, Slot};
use crate::guest::{SourceGuest, TargetGuest};
use crate::memory::{OwnedPages, PageBuf};
use crate::units::{DiskId, PAGE_BYTES, PageCount, Pfn, Sector, u64_of};

/// What the mover by hand does wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Sin {
    None,
    /// Forgets a harvest's pages.
    DirtLost,
    /// Loses a bit in one page.
    BitLost,
    /// Starts before the source has given the guest up.
    Hasty,
    /// Lets both run.
    Both,
    /// Does not flush the disks.
    Unflushed,
    /// Sends another state.
    OtherState,
    /// Gives the guest a held page with the wrong bytes.
    WrongRelease,
    /// Ends holding back too early.
    EarlyFinish,
    /// Ends the source's guest while pages are outstanding.
    EarlyDestroy,
}

struct Scene {
    scheduler: Arc<Scheduler>,
    guest: Arc<Guest>,
    disks: Arc<DiskWorld>,
}

fn scene(seed: u64) -> Scene {
    let mut rng = Rng::new(seed, "scene");
    let scheduler = Scheduler::new(Rng::new(seed, "schedule"), Tempo::drawn(&mut rng), false);
    let mut shape = GuestShape::drawn(&mut rng);
    shape.failing_harvest = 0;
    shape.lazy = true;
    let disk_shape =
        DiskShape { corrupt: 0, failing: 0, shrunk: 0, ..DiskShape::drawn(&mut rng, shape.pages) };
    let pages = usize::try_from(shape.pages).unwrap();
    let memory = [Arc::new(OwnedPages::new(pages)), Arc::new(OwnedPages::new(pages))];
    let beginning = Beginning::drawn(&mut rng, shape.pages, &disk_shape.blocks);
    let disks = DiskWorld::new(
        &scheduler,
        Rng::new(seed, "disk"),
        disk_shape,
        &beginning.blocks,
        memory.to_vec(),
        None,
    );
    let guest = Guest::new(
        &scheduler,
        Rng::new(seed, "guest"),
        shape,
        memory,
        Arc::clone(&disks),
        beginning.pages,
        beginning.blocks,
    );
    guest.go(0, &mut rng);
    Scene { scheduler, guest, disks }
}

fn copy(from: &SourceGuest, to: &TargetGuest, pages: &Bitmap, sin: Sin) {
    let mut windows = [from.memory.window(1).unwrap(), to.memory.window(1).unwrap()];
    for at in pages.iter() {
        let mut page = PageBuf::zeroed();
        from.memory.map(&[Pfn::at(at)], &mut windows[0]).unwrap();
        windows[0].page(0).unwrap().copy_to(&mut page);
        if sin == Sin::BitLost && at == 17 {
            page.0[4000] ^= 1;
        }
        to.memory.map(&[Pfn::at(at)], &mut windows[1]).unwrap();
        windows[1].page(0).unwrap().copy_from(&page);
    }
}

/// Moves the guest: a live round, the pause, the rest, half of it after the restart.
fn move_by_hand(scene: &Scene, sin: Sin) {
    let Scene { scheduler, guest, .. } = scene;
    guest.make_incoming();
    let mut from = guest.attach_source().unwrap();
    let mut to = guest.attach_target().unwrap();
    let mut pages = Bitmap::new(from.memory.pages().entries());
    let mut untouched = pages.clone();
    from.dirty.arm().unwrap();
    from.memory.untouched(&mut untouched).unwrap();
    pages.set_all();
    pages.subtract(&untouched);
    copy(&from, &to, &pages, sin);
    pages.clear_all();
    from.dirty.harvest(&mut pages).unwrap();
    if sin == Sin::DirtLost {
        pages.clear_all();
    }
    scheduler.sleep(MILLI);
    from.life.pause().unwrap();
    from.dirty.harvest(&mut pages).unwrap();
    if sin != Sin::Unflushed {
        from.disks.flush().unwrap();
    }
    let mut state = from.life.save_state().unwrap();
    if sin == Sin::OtherState {
        state[0] ^= 1;
    }
    let mut late = Bitmap::new(pages.len());
    for at in pages.iter().filter(|at| at % 2 == 0) {
        late.set(at);
    }
    late.set(3);
    pages.subtract(&late);
    copy(&from, &to, &pages, sin);
    to.life.load_state(&state).unwrap();
    let hold = to.lazy.clone().unwrap();
    hold.hold_back(&late).unwrap();
    if sin != Sin::Hasty && sin != Sin::Both {
        from.life.release().unwrap();
    }
    if sin == Sin::Both {
        from.life.resume().unwrap();
    }
    to.life.start().unwrap();
    scheduler.sleep(MILLI);
    if sin == Sin::EarlyDestroy {
        from.life.destroy().unwrap();
    }
    let mut window = from.memory.window(1).unwrap();
    loop {
        let next = late.iter().next().map(Pfn::at);
        let Some(pfn) = hold.next_fault(Duration::ZERO).unwrap().or(next) else { break };
        if !late.clear(pfn.index()) {
            hold.wake(pfn).unwrap();
            continue;
        }
        from.memory.map(&[pfn], &mut window).unwrap();
        let page = window.page(0).unwrap();
        if sin == Sin::WrongRelease {
            page.copy_part_from(9, &[1]);
        }
        hold.release(pfn, page).unwrap();
        if sin == Sin::EarlyFinish {
            break;
        }
    }
    hold.finish().unwrap();
    from.life.destroy().unwrap();
    drop((from, to));
    let before = guest.operations();
    scheduler.sleep(1000 * MILLI);
    assert!(guest.operations() > before, "the guest goes on");
    guest.check_all();
}

fn moved(seed: u64, sin: Sin) -> Option<Failure> {
    let scene = scene(seed);
    let scheduler = Arc::clone(&scene.scheduler);
    scheduler
        .run(Box::new(move || {
            scene.scheduler.sleep(MILLI);
            move_by_hand(&scene, sin);
            assert_eq!(scene.guest.phases(), (SourcePhase::Destroyed, TargetPhase::Running));
        }))
        .failure
}

#[test]
fn a_guest_moved_right_never_notices() {
    for seed in 0..150 {
        assert_eq!(moved(seed, Sin::None), None, "seed {seed}");
    }
}

#[test]
fn every_way_of_moving_it_wrong_is_found() {
    for (sin, says) in [
        (Sin::DirtLost, "not what it was at the pause"),
        (Sin::BitLost, "not what it was at the pause"),
        (Sin::Hasty, "had not given up"),
        (Sin::Both, "two guests run"),
        (Sin::Unflushed, "reads block"),
        (Sin::OtherState, "state outside memory"),
        (Sin::WrongRelease, "that it did not have at the pause"),
        (Sin::EarlyFinish, "never given to the guest"),
        (Sin::EarlyDestroy, "still lacks"),
    ] {
        let found = (0..200).find_map(|seed| moved(seed, sin)).map(|failure| match failure {
            Failure::Violation(text) => text,
            other => panic!("{sin:?}: {other:?}"),
        });
        let text = found.unwrap_or_else(|| panic!("{sin:?} goes unnoticed"));
        assert!(text.contains(says), "{sin:?}: {text}");
    }
}

#[test]
fn a_source_that_dies_leaves_a_running_guest_and_a_target_that_dies_leaves_none() {
    for seed in 0..100 {
        let scene = scene(seed);
        let scheduler = Arc::clone(&scene.scheduler);
        let ran = scheduler.run(Box::new(move || {
            let Scene { scheduler, guest, .. } = &scene;
            guest.make_incoming();
            let theirs = Arc::clone(guest);
            let paused = Box::new(move || {
                let mut from = theirs.attach_source().unwrap();
                from.life.pause().unwrap();
                theirs.scheduler.sleep(1000 * MILLI);
                unreachable!("killed before");
            });
            scheduler.spawn(Group::Source(0), "source", paused);
            let theirs = Arc::clone(guest);
            let waiting = Box::new(move || {
                let _to = theirs.attach_target().unwrap();
                theirs.scheduler.sleep(1000 * MILLI);
                unreachable!("killed before");
            });
            scheduler.spawn(Group::Target(0), "target", waiting);
            scheduler.sleep(500 * MILLI);
            assert_eq!(guest.phases(), (SourcePhase::Paused, TargetPhase::Incoming));
            scheduler.kill(Group::Source(0));
            guest.engine_killed(SOURCE);
            assert_eq!(guest.runs_on(), Some(SOURCE));
            scheduler.kill(Group::Target(0));
            guest.engine_killed(TARGET);
            assert_eq!(guest.phases(), (SourcePhase::Running, TargetPhase::None));
            scheduler.sleep(1000 * MILLI);
            assert!(!guest.is_attached(SOURCE) && !guest.is_attached(TARGET));
        }));
        assert_eq!(ran.failure, None, "seed {seed}");
    }
}

#[test]
fn reads_come_back_right_late_and_in_any_order_and_direct_ones_land_in_pieces() {
    let mut seen_torn = false;
    for seed in 0..100 {
        let scene = scene(seed);
        let scheduler = Arc::clone(&scene.scheduler);
        let torn = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let saw = Arc::clone(&torn);
        let ran = scheduler.run(Box::new(move || {
            let Scene { scheduler, guest, disks } = &scene;
            guest.make_incoming();
            let mut from = guest.attach_source().unwrap();
            from.life.pause().unwrap();
            from.disks.flush().unwrap();
            let mut reader = disks.on(TARGET).reader(4).unwrap();
            let read = |slot: usize| Read {
                disk: DiskId(0),
                sector: Sector(8 * u64_of(slot)),
                bytes: PAGE_BYTES,
                slot: Slot(slot),
            };
            for slot in 0..3 {
                reader.read(read(slot)).unwrap();
            }
            let page = guest.memory[TARGET].page(0);
            reader.read_direct(read(3), &[Some(page)]).unwrap();
            let mut done = Vec::new();
            let expected = guest.state().disk_expected[0].clone();
            while done.len() < 4 {
                reader.complete(&mut done, Duration::from_micros(10)).unwrap();
                let mut now = PageBuf::zeroed();
                page.copy_to(&mut now);
                let torn = now != Content::ZERO.page() && now != expected[3].page();
                saw.fetch_or(torn, std::sync::atomic::Ordering::SeqCst);
                scheduler.step();
            }
            for (slot, content) in expected.iter().enumerate().take(3) {
                assert!(reader.staged(Slot(slot))[..PAGE_BYTES] == content.page().0);
            }
            let mut now = PageBuf::zeroed();
            page.copy_to(&mut now);
            assert!(now == expected[3].page());
            assert_eq!(PageCount(u64_of(done.len())), PageCount(4));
        }));
        assert_eq!(ran.failure, None, "seed {seed}");
        seen_torn |= torn.load(std::sync::atomic::Ordering::SeqCst);
    }
    assert!(seen_torn, "some direct read is seen half done");
}
