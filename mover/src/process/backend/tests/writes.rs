use super::*;
use crate::disk::WriteLog;
use crate::guest::{DirtyLog, SourceLife, WriteGate};
use crate::units::{DiskId, usize_of};

const PAGES: u64 = 4096;

/// A running puppet and the engine attached to it as the source.
fn source() -> Option<(Puppet, Source)> {
    offers(Features::LOG_WRITES).then(|| {
        let puppet = Puppet::new(PAGES, "running");
        let source = attach_source(puppet.client(), "m").unwrap();
        (puppet, source)
    })
}

fn harvest(source: &mut Source) -> Vec<u64> {
    let mut dirty = set_of(PAGES, []);
    let fresh = source.tracker.harvest(&mut dirty).unwrap();
    assert_eq!(fresh.0, dirty.count());
    pages_in(&dirty)
}

#[test]
fn writes_of_another_process_are_logged_and_nothing_else_is() {
    let Some((puppet, mut source)) = source() else { return };
    puppet.write(700, 1);
    puppet.write(2000, 1);
    source.tracker.arm().unwrap();
    assert_eq!(harvest(&mut source), [0u64; 0], "written before the log began");
    for page in [5, 701, 4095] {
        puppet.write(page, page);
    }
    assert_eq!(puppet.read(700), 1);
    assert_eq!(puppet.read(2001), 0);
    assert_eq!(harvest(&mut source), [5, 701, 4095], "and not the neighbours of a first touch");
    assert_eq!(word(&*source.memory, 701), Some(701));
    assert_eq!(harvest(&mut source), [0u64; 0]);
    puppet.write(5, 6);
    puppet.write(6, 6);
    let mut dirty = set_of(PAGES, [6]);
    assert_eq!(source.tracker.harvest(&mut dirty).unwrap().0, 1, "6 was set before");
    assert_eq!(pages_in(&dirty), [5, 6]);
    source.tracker.disarm().unwrap();
    source.tracker.disarm().unwrap();
    assert!(!puppet.is_watched("uw"));
    puppet.write(7, 1);
    source.tracker.arm().unwrap();
    puppet.write(8, 1);
    assert_eq!(harvest(&mut source), [8], "a log can begin again");
}

#[test]
fn pages_nobody_touched_are_known_and_stay_so() {
    let Some((puppet, mut source)) = source() else { return };
    puppet.write(3, 1);
    puppet.write(600, 0);
    source.tracker.arm().unwrap();
    puppet.write(4, 1);
    assert_eq!(harvest(&mut source), [4]);
    for _ in 0..2 {
        let mut untouched = set_of(PAGES, []);
        source.memory.untouched(&mut untouched).unwrap();
        let touched: Vec<u64> = (0..PAGES).filter(|page| !untouched.get(usize_of(*page))).collect();
        assert_eq!(touched, [3, 4, 600]);
    }
}

#[test]
fn a_direct_read_into_guest_memory_is_logged() {
    let Some((puppet, mut source)) = source() else { return };
    let path = puppet.dir.path().join("image");
    std::fs::write(&path, page_of(77).0).unwrap();
    puppet.write(9, 1);
    source.tracker.arm().unwrap();
    let answer = puppet.ask(&format!("direct 9 {}", path.display()));
    if answer != "done" {
        return eprintln!("SKIPPED: {answer}");
    }
    assert_eq!(harvest(&mut source), [9]);
    assert_eq!(word(&*source.memory, 9), Some(77));
}

/// Two threads of the guest count up in its pages; a page's content at the last harvest that had it must be its last.
#[test]
fn no_page_is_lost_under_concurrent_writers() {
    let Some((puppet, mut source)) = source() else { return };
    source.tracker.arm().unwrap();
    let mut kept = vec![0; usize_of(PAGES)];
    let mut writers = [puppet.thread(), puppet.thread()];
    for (half, writer) in writers.iter_mut().enumerate() {
        writer.order(&format!("count {half} 40000"));
    }
    let (mut harvests, mut last) = (0, false);
    while !last {
        last = !writers.iter().any(|w| harvests < 3 || w.is_silent());
        for page in harvest(&mut source) {
            kept[usize_of(page)] = word(&*source.memory, page).unwrap();
        }
        harvests += 1;
    }
    for writer in &mut writers {
        assert_eq!(writer.answer(), "done");
    }
    for page in 0..PAGES {
        assert_eq!(Some(kept[usize_of(page)]), word(&*source.memory, page), "page {page}");
        assert_ne!(kept[usize_of(page)], 0);
    }
}

#[test]
fn a_dead_guest_is_an_error_and_no_clean_one() {
    let Some((mut puppet, mut source)) = source() else { return };
    source.tracker.arm().unwrap();
    puppet.process.0.kill().unwrap();
    puppet.process.0.wait().unwrap();
    let error = source.tracker.harvest(&mut set_of(PAGES, [])).unwrap_err();
    assert!(error.to_string().contains("has ended"), "{error}");
    source.tracker.disarm().unwrap();
    assert!(source.life.pause().is_err());
}

#[test]
fn nothing_is_left_of_the_log_when_the_engine_is_killed() {
    if !offers(Features::LOG_WRITES) {
        return;
    }
    let puppet = Puppet::new(PAGES, "prefaulted");
    let mut engine = Own::start("engine", puppet.dir.path(), "source");
    wait_for(&puppet.dir.path().join("armed"));
    assert!(puppet.is_watched("uw"));
    engine.0.kill().unwrap();
    engine.0.wait().unwrap();
    assert!(!puppet.is_watched("uw"), "the kernel has ended it");
    puppet.write(1, 1);
    let mut source = loop {
        // The guest notices the end of its engine's connection a moment later.
        match attach_source(puppet.client(), "next") {
            Ok(source) => break source,
            Err(e) => assert!(e.to_string().contains("has this guest"), "{e}"),
        }
    };
    source.tracker.arm().unwrap();
    puppet.write(2, 1);
    assert_eq!(harvest(&mut source), [2]);
}

#[test]
fn disk_writes_are_told_once_and_the_gate_holds_and_opens() {
    let Some((puppet, mut source)) = source() else { return };
    for block in [5, 6, 64, 999] {
        puppet.ask(&format!("disk {block}"));
    }
    let mut written = set_of(1000, [6]);
    assert_eq!(source.writes.harvest(DiskId(0), &mut written).unwrap(), 3);
    assert_eq!(pages_in(&written), [5, 6, 64, 999]);
    assert_eq!(source.writes.harvest(DiskId(0), &mut written).unwrap(), 0);
    puppet.ask("disk 5");
    let mut again = set_of(1000, []);
    assert_eq!(source.writes.harvest(DiskId(0), &mut again).unwrap(), 1);
    drop(source);

    let puppet = Puppet::new(64, "incoming");
    let Target { guest, info, .. } = attach_target(puppet.client(), "m").unwrap();
    assert_eq!((info.guest.as_str(), info.disks[0].bytes), ("puppet", 1000 * 4096));
    let gate: Arc<dyn WriteGate> = guest.gate.unwrap();
    gate.hold(DiskId(0), &set_of(1000, [3, 998])).unwrap();
    let held = |block: u64| puppet.ask(&format!("gate {block}"));
    assert_eq!([held(3), held(4), held(998)], ["true", "false", "true"]);
    assert_eq!(gate.wanted(), None);
    puppet.ask("want 998");
    assert_eq!(gate.wanted(), Some((DiskId(0), 998)));
    gate.open(DiskId(0), 998);
    assert_eq!([held(3), held(998)], ["true", "false"]);
}
