//! Figures, for people: `cargo test --release -p mover figures -- --ignored --nocapture`. Nothing is asserted of time.

use super::*;
use crate::guest::DirtyLog;

const PAGES: u64 = 1 << 20;

/// This thread's CPU time: other work on the machine shows less in it.
fn now() -> Duration {
    Duration::try_from(rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime)).unwrap()
}

fn ms(since: Duration) -> f64 {
    (now() - since).as_secs_f64() * 1e3
}

#[test]
#[ignore = "takes 4 GiB and prints timings"]
fn of_the_dirty_log() {
    if !offers(Features::LOG_WRITES) {
        return;
    }
    let puppet = Puppet::new(PAGES, "prefaulted");
    let begun = now();
    let mut source = attach_source(puppet.client(), "m").unwrap();
    eprintln!("attach: {:.1} ms", ms(begun));
    let begun = now();
    source.tracker.arm().unwrap();
    eprintln!("arm: {:.1} ms", ms(begun));
    for every in [0, 100, 10, 1] {
        for _ in 0..3 {
            if every > 0 {
                puppet.ask(&format!("touch {every}"));
            }
            let mut dirty = set_of(PAGES, []);
            let begun = now();
            let pages = source.tracker.harvest(&mut dirty).unwrap();
            eprintln!("harvest, 4 GiB, {} pages dirty: {:.2} ms", pages.0, ms(begun));
        }
    }
}

#[test]
#[ignore = "takes 4 GiB and prints timings"]
fn of_holding_back() {
    if !offers(Features::HOLD_BACK) {
        return;
    }
    for (name, step, old) in [
        ("every page", 1, false),
        ("every 64th page", 64, false),
        ("every page, full before,", 1, true),
        ("every 3rd page, full before,", 3, true),
    ] {
        let puppet = Puppet::new(PAGES, "incoming");
        let Target { mut guest, .. } = attach_target(puppet.client(), "m").unwrap();
        let lazy = Arc::clone(guest.lazy.as_ref().unwrap());
        let outstanding: Vec<u64> = (0..PAGES / 8).step_by(step).collect();
        let map = set_of(PAGES, outstanding.iter().copied());
        let mut window = guest.memory.window(1).unwrap();
        for page in (0..PAGES / 8).filter(|_| old) {
            guest.memory.map(&[Pfn(page)], &mut window).unwrap();
            window.page(0).unwrap().mark_written();
        }
        let begun = now();
        lazy.hold_back(&map).unwrap();
        eprintln!("hold back {name} of 512 MiB: {:.1} ms", ms(begun));
        guest.life.load_state(&[1]).unwrap();
        guest.life.start().unwrap();
        let staging = Staging::new(64);
        let begun = now();
        for page in outstanding.iter().take(50_000) {
            lazy.release(Pfn(*page), staging.0.page(Pfn(*page % 64))).unwrap();
        }
        eprintln!(
            "release: {:.2} us a page",
            ms(begun) * 1e3 / 50_000f64.min(crate::units::f64_of(map.count()))
        );
    }
}
