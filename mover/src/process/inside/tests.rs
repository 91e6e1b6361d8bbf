//! The guest's inside on real memory and real image files: it does what its workload says, its checker sees every kind
//! of wrong page, and its state outside memory is all it needs to go on elsewhere.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::drive::{self, Drive};
use super::frames::{Frame, Kind};
use super::layout::Layout;
use super::program::{Clock, Inside};
use super::workload::SHIPPED;
use crate::memory::{Mapping, PageBuf};
use crate::process::control::Work;
use crate::process::image;
use crate::process::shared::{SharedGate, SharedWriteLog};
use crate::units::{DiskId, Pfn, usize_of};

const MEMORY_BYTES: u64 = 32 << 20;

/// An image with 28 MiB of files nobody can compress, and 20 MiB of room.
pub(in crate::process) fn test_image(dir: &Path) -> PathBuf {
    let files = dir.join("files");
    std::fs::create_dir_all(&files).unwrap();
    let mut page = PageBuf::zeroed();
    for name in 0..14u64 {
        let mut bytes = Vec::new();
        for n in 0..512 {
            super::content::fill(name << 32 | n, &mut page);
            bytes.extend_from_slice(&page.0);
        }
        std::fs::write(files.join(format!("{name:02}")), bytes).unwrap();
    }
    let image = dir.join("disk.img");
    image::make(&image, 48 << 20, 40 << 20, &[files]).unwrap();
    image
}

fn inside(image: Option<&Path>) -> Arc<Inside> {
    let memory = rustix::fs::memfd_create("inside-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memory, MEMORY_BYTES).unwrap();
    let memory = Arc::new(Mapping::shared(memory.as_fd(), usize_of(MEMORY_BYTES), false).unwrap());
    let opened: Vec<_> = image.iter().map(|path| (drive::open(path).unwrap(), *path)).collect();
    let sizes: Vec<u64> = opened.iter().map(|((_, bytes), _)| *bytes).collect();
    let layout = Layout::new(MEMORY_BYTES, &sizes).unwrap();
    let log = Arc::new(SharedWriteLog::create(&sizes).unwrap().0);
    let gate = Arc::new(SharedGate::create(&sizes).unwrap().0);
    let used = opened.iter().map(|(_, path)| image::header(path).unwrap().unwrap().used_blocks).collect();
    let drives = opened
        .into_iter()
        .map(|(opened, path)| Drive::new(opened, path, DiskId(0), Arc::clone(&log), Arc::clone(&gate)))
        .collect();
    Arc::new(Inside::new("test", memory, layout, drives, used))
}

fn booted(image: Option<&Path>, workload: &str) -> Arc<Inside> {
    let inside = inside(image);
    inside.boot(workload, 7, 1, &AtomicBool::new(false)).unwrap();
    inside
}

/// Lets its only vCPU work for so long.
fn work(inside: &Inside, time: Duration) {
    work_until(inside, time, |_| false);
}

/// Lets its only vCPU work until enough is done, or for so long.
fn work_until(inside: &Inside, time: Duration, enough: impl Fn(&Work) -> bool) {
    let begun = Instant::now();
    let mut clock = Clock::new(begun);
    while begun.elapsed() < time && !enough(&inside.accounts.work()) {
        let due = inside.turn(&mut inside.vcpu(0), &mut clock, &AtomicBool::new(false));
        std::thread::sleep(due.saturating_duration_since(Instant::now()).min(Duration::from_millis(10)));
    }
}

fn first_of(inside: &Inside, kind: Kind) -> Pfn {
    (0..inside.frames.layout.pages).map(Pfn).find(|pfn| inside.frames.glance(*pfn).kind == kind).unwrap()
}

fn assert_right(inside: &Inside) {
    inside.check_all(false);
    assert_eq!(inside.frames.ledger.first(), []);
    assert_eq!(inside.frames.ledger.wrong(), 0);
}

#[test]
fn every_shipped_workload_has_its_shares_does_its_work_and_stays_right() {
    let dir = tempfile::tempdir().unwrap();
    let image = test_image(dir.path());
    for (name, _) in SHIPPED {
        let inside = booted((name != "memory-hog").then_some(&image), name);
        let (frames, plan) = (&inside.frames, inside.plan.get().unwrap());
        let share = |percent: u8| frames.layout.pages * u64::from(percent) / 100;
        let shares = plan.workload.memory;
        assert_eq!(frames.counts.cache.load(Ordering::Relaxed), share(shares.cache), "{name}");
        let free = frames.counts.free.load(Ordering::Relaxed);
        assert!(free.abs_diff(share(shares.free)) <= 2, "{name}: {free} free");
        let kinds = (0..frames.layout.pages).filter(|pfn| frames.glance(Pfn(*pfn)).kind == Kind::Cache);
        assert_eq!(kinds.count(), usize_of(share(shares.cache)));
        assert_right(&inside);
        let dirties = ["idle-desktop", "remote-desktop", "compile", "memory-hog"].contains(&name);
        let reads = ["remote-desktop", "package-upgrade", "file-copy", "video"].contains(&name);
        let writes = ["package-upgrade", "file-copy", "overwrite-storm"].contains(&name);
        work_until(&inside, Duration::from_secs(20), |done| {
            (done.dirtied_bytes > 1 << 19 || !dirties)
                && (done.read_bytes > 1 << 19 || !reads)
                && (done.written_bytes > 1 << 19 || !writes)
        });
        let done = inside.accounts.work();
        assert!(done.operations > 0 && done.disk_errors == 0, "{name}: {done:?}");
        assert_eq!(done.dirtied_bytes > 0, dirties, "{name}: {done:?}");
        assert_eq!(done.read_bytes > 0, reads, "{name}: {done:?}");
        assert_eq!(done.written_bytes > 0, writes, "{name}: {done:?}");
        assert!(frames.counts.cache.load(Ordering::Relaxed) <= share(shares.cache), "{name}");
        assert_right(&inside);
    }
}

#[test]
fn rates_are_kept_and_pauses_are_not_made_up_for() {
    let inside = booted(None, "memory-hog");
    let begun = Instant::now();
    let mut clock = Clock::new(begun);
    let stop = AtomicBool::new(false);
    inside.turn(&mut inside.vcpu(0), &mut clock, &stop);
    // A second passes at once: one turn makes up for a fifth of it, and the rest is dropped and counted.
    std::thread::sleep(Duration::from_secs(1));
    let before = inside.accounts.work();
    inside.turn(&mut inside.vcpu(0), &mut clock, &stop);
    let after = inside.accounts.work();
    let burst = after.dirtied_bytes - before.dirtied_bytes;
    assert!((4 << 20..=(4 << 20) + 4096).contains(&burst), "{burst}");
    assert!(after.skipped_bytes - before.skipped_bytes >= 15 << 20);
    // Throttled to a tenth, there is a tenth of the burst.
    inside.throttle.store(10, Ordering::Relaxed);
    std::thread::sleep(Duration::from_secs(1));
    inside.turn(&mut inside.vcpu(0), &mut clock, &stop);
    let burst = inside.accounts.work().dirtied_bytes - after.dirtied_bytes;
    assert!(burst <= (4 << 20) / 10 + 4096, "{burst}");
    // A stopped vCPU does nothing.
    let before = inside.accounts.work().operations;
    inside.turn(&mut inside.vcpu(0), &mut clock, &AtomicBool::new(true));
    assert_eq!(inside.accounts.work().operations, before);
}

#[test]
fn a_wrong_page_of_any_kind_is_seen_named_and_counted_once() {
    let dir = tempfile::tempdir().unwrap();
    let inside = booted(Some(&test_image(dir.path())), "remote-desktop");
    let memory = &inside.frames.memory;
    let wrong = PageBuf([0x5a; 4096]);
    let anonymous = first_of(&inside, Kind::Anonymous);
    memory.page(anonymous).copy_from(&wrong);
    let cached = first_of(&inside, Kind::Cache);
    memory.page(cached).fill_zero();
    let free = first_of(&inside, Kind::Free);
    memory.page(free).copy_from(&wrong);
    for _ in 0..2 {
        inside.check_all(false);
        let found = inside.frames.ledger.first();
        let mut pfns: Vec<_> = found.iter().map(|page| (page.pfn, page.kind.as_str())).collect();
        pfns.sort_unstable();
        let mut planted = [(anonymous.0, "anonymous"), (cached.0, "cache"), (free.0, "free")];
        planted.sort_unstable();
        assert_eq!(pfns, planted);
        assert!(found.iter().any(|page| page.kind == "cache" && page.what.contains("all zero")));
        assert_eq!(inside.frames.ledger.wrong(), 3);
    }
    // An access notices it too, and a rewritten page that is wrong again is news.
    let plan = inside.plan.get().unwrap();
    inside.rewrite(plan, anonymous);
    memory.page(anonymous).copy_from(&wrong);
    inside.rewrite(plan, anonymous);
    assert_eq!(inside.frames.ledger.wrong(), 4);
}

#[test]
fn a_stale_descriptor_page_and_a_stale_table_are_seen() {
    let dir = tempfile::tempdir().unwrap();
    let inside = booted(Some(&test_image(dir.path())), "package-upgrade");
    let frames = &inside.frames;
    let kept = |pfn: Pfn| {
        let mut page = PageBuf::zeroed();
        frames.memory.page(pfn).copy_to(&mut page);
        page
    };
    let plan = inside.plan.get().unwrap();
    let anonymous = first_of(&inside, Kind::Anonymous);
    let descriptors = frames.layout.descriptor_page(anonymous);
    // Page and descriptors go back together: each fits the other, only the sum outside memory does not.
    let old = (kept(anonymous), kept(descriptors));
    inside.rewrite(plan, anonymous);
    assert_right(&inside);
    let new = (kept(anonymous), kept(descriptors));
    frames.memory.page(anonymous).copy_from(&old.0);
    frames.memory.page(descriptors).copy_from(&old.1);
    inside.check_all(false);
    let found = frames.ledger.first();
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!((found[0].pfn, found[0].kind.as_str()), (descriptors.0, "metadata"));
    frames.memory.page(anonymous).copy_from(&new.0);
    frames.memory.page(descriptors).copy_from(&new.1);
    // A table that has lost its entries disagrees with the pages it should name; one with old entries, with theirs.
    let table = Pfn(frames.layout.tables[0]);
    let whole = kept(table);
    frames.memory.page(table).fill_zero();
    inside.check_all(false);
    assert!(frames.ledger.wrong() > 100 && frames.ledger.first().iter().any(|page| page.kind == "cache"));
    let mut lying = whole.clone();
    let entry = whole.0.as_chunks::<4>().0.iter().position(|entry| *entry == [0; 4]).unwrap();
    lying.0[entry * 4..entry * 4 + 4].copy_from_slice(&u32::try_from(anonymous.0).unwrap().to_le_bytes());
    frames.memory.page(table).copy_from(&lying);
    let before = frames.ledger.wrong();
    inside.check_all(false);
    assert_eq!(frames.ledger.wrong(), before + 1);
}

#[test]
fn saved_and_loaded_it_goes_on_exactly_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let image = test_image(dir.path());
    for (name, image) in [
        ("compile", Some(&image)),
        ("file-copy", Some(&image)),
        ("video", Some(&image)),
        ("memory-hog", None),
    ] {
        let here = booted(image.map(PathBuf::as_path), name);
        work(&here, Duration::from_millis(300));
        let state = here.save().unwrap();
        let there = inside(image.map(PathBuf::as_path));
        for pfn in (0..here.frames.layout.pages).map(Pfn) {
            if !here.frames.memory.page(pfn).is_zero() {
                let mut page = PageBuf::zeroed();
                here.frames.memory.page(pfn).copy_to(&mut page);
                there.frames.memory.page(pfn).copy_from(&page);
            }
        }
        there.load(&state).unwrap();
        assert!(there.save().unwrap() == state, "{name}: the state is the same");
        assert_eq!(*there.vcpu(0), *here.vcpu(0));
        assert_right(&there);
        assert_eq!(there.accounts.work(), here.accounts.work());
        work(&there, Duration::from_millis(300));
        assert!(there.accounts.work().operations > here.accounts.work().operations);
        assert_right(&there);
        // Without the last thing it did, something is wrong with it.
        work(&here, Duration::from_millis(100));
        let later = here.save().unwrap();
        let stale = inside(image.map(PathBuf::as_path));
        stale.load(&later).unwrap();
        stale.check_all(false);
        assert!(stale.frames.ledger.wrong() > 0, "{name}: empty memory under this state");
    }
}

#[test]
fn a_state_that_does_not_fit_is_refused_with_a_sentence() {
    let state = booted(None, "memory-hog").save().unwrap();
    let other = inside(Some(&test_image(tempfile::tempdir().unwrap().path())));
    let refused = |state: &[u8], word: &str| {
        let said = other.load(state).unwrap_err();
        assert!(said.contains(word), "{said}");
    };
    refused(b"nonsense", "no state of a pageferry guest");
    refused(&[&state[..7], &[9], &state[8..]].concat(), "version 9");
    refused(&state, "0 disks, the one prepared here has 1");
    let one = inside(None);
    for cut in 0..state.len() {
        assert!(one.load(&state[..cut]).is_err(), "cut at {cut}");
    }
    assert!(one.load(&[&state[..], &[0]].concat()).unwrap_err().contains("longer"));
    one.load(&state).unwrap();
    assert!(one.load(&state).unwrap_err().contains("already"));
}

#[test]
fn a_page_being_written_back_or_dirty_is_never_evicted() {
    let dir = tempfile::tempdir().unwrap();
    let inside = booted(Some(&test_image(dir.path())), "package-upgrade");
    let (frames, cache, accounts) = (&inside.frames, &inside.cache, &inside.accounts);
    let kept = first_of(&inside, Kind::Cache);
    let mut zone = frames.zone(kept);
    let frame = zone.get(kept);
    zone.set(kept, Frame { dirty: true, writeback: true, ..frame });
    drop(zone);
    // Reads three times as much as the cache holds.
    for block in (0..7000).step_by(64).cycle().take(330) {
        cache.read_run(frames, accounts, 0, block, 64);
    }
    assert!(accounts.work().evicted > 5000);
    assert_eq!(frames.glance(kept).block, frame.block);
    let content = PageBuf([1; 4096]);
    assert!(
        !cache.write(frames, accounts, (0, u64::from(frame.block)), &content),
        "not while it is written back"
    );
    let mut zone = frames.zone(kept);
    zone.set(kept, frame);
    drop(zone);
    assert!(cache.write(frames, accounts, (0, u64::from(frame.block)), &content));
    cache.write_back(frames, accounts, 10, &AtomicBool::new(false));
    assert_eq!(frames.counts.dirty.load(Ordering::Relaxed), 0);
    let mut on_disk = [0; 4096];
    let file = std::fs::File::open(dir.path().join("disk.img")).unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut on_disk, u64::from(frame.block) * 4096).unwrap();
    assert_eq!(on_disk, content.0);
    assert_right(&inside);
}

#[test]
fn several_vcpus_and_the_scrubber_agree() {
    let dir = tempfile::tempdir().unwrap();
    let text = "name = \"all\"\ndescription = \"everything at once\"\n\
        [memory]\ncache = 50\nanonymous = 30\nfree = 20\n\
        [dirty]\nrate = \"40MiB/s\"\n[read]\nrate = \"40MiB/s\"\n[write]\nrate = \"20MiB/s\"\n\
        [copy]\nrate = \"20MiB/s\"\n[churn]\nrate = \"40MiB/s\"\n[stream]\nrate = \"20MiB/s\"\n\
        [overwrite]\nrate = \"10MiB/s\"\n[touch]\nrate = \"20MiB/s\"\n";
    let workload = dir.path().join("all.toml");
    std::fs::write(&workload, text).unwrap();
    let inside = inside(Some(&test_image(dir.path())));
    inside.boot(workload.to_str().unwrap(), 3, 3, &AtomicBool::new(false)).unwrap();
    let gate = Arc::default();
    let switch = Arc::new(super::scrub::ScrubSwitch::default());
    switch.on.store(true, Ordering::SeqCst);
    super::vcpu::spawn(&inside, &gate).unwrap();
    super::scrub::spawn(&inside, &switch, 100_000).unwrap();
    for _ in 0..5 {
        gate.start();
        std::thread::sleep(Duration::from_millis(200));
        gate.stop(3).unwrap();
        let before = (inside.save().unwrap(), inside.accounts.work());
        let busy =
            (0..inside.frames.layout.pages).filter(|n| inside.frames.glance(Pfn(*n)).kind == Kind::Busy);
        assert_eq!(busy.count(), 0, "nothing is under way while paused");
        assert_right(&inside);
        std::thread::sleep(Duration::from_millis(20));
        assert!((inside.save().unwrap(), inside.accounts.work()) == before, "a paused guest changes nothing");
    }
    gate.end();
    switch.end();
    while Arc::strong_count(&inside) > 1 {
        std::thread::yield_now();
    }
    let work = inside.accounts.work();
    assert!(work.read_bytes > 0 && work.written_bytes > 0 && work.evicted > 0, "{work:?}");
    assert!(inside.frames.ledger.full_checks() > 5);
}

#[test]
fn checking_allocates_no_free_page() {
    let inside = booted(None, "memory-hog");
    let free = first_of(&inside, Kind::Free);
    assert_right(&inside);
    assert!(!crate::kernel::resident::resident(&inside.frames.memory, free, 1).unwrap()[0]);
}
