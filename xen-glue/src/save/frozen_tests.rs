//! Simulated guests saved into real files with pages left on a real image, and restored from both.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;

use mover::disk::image::{DiskSpec, Role};
use mover::index::commands;
use mover::memory::PageBuf;
use mover::units::{PAGE_BYTES, Pfn, u64_of};

use super::tests::{LIVE, assert_same};
use super::{Frozen, Options, Summary};
use crate::restore::{self, RestoreError, Restored};
use crate::simulated::{Guest, Landed, SimSource, SimTarget, SimToolstack, WIRING, read};
use crate::stream::tests::samples::{boundaries, read_all};

const PAGES: u64 = 2000;
/// Frames whose contents stand on the disk, in another order.
const SHARED: std::ops::Range<u64> = 300..1300;
const FROZEN_DISKS: u32 = 0x5046_0003;
const REFERENCES: u32 = 0x5046_0004;

/// A guest half of whose pages stand on a disk with an index.
struct World {
    guest: Rc<RefCell<Guest>>,
    image: PathBuf,
    frozen: Frozen,
    directory: tempfile::TempDir,
}

/// The block that holds page `pfn`.
fn block_of(pfn: u64) -> u64 {
    100 + (pfn - SHARED.start) * 7 % 1000
}

fn world() -> World {
    let directory = tempfile::tempdir().unwrap();
    let (image, indexes) = (directory.path().join("image"), directory.path().join("index"));
    let guest = Guest::new(2000);
    {
        let mut guest = guest.borrow_mut();
        guest.holes.extend([7, 500, 1999]);
        // The same contents in two frames.
        let twice = read(guest.memory.page(Pfn(400)));
        guest.memory.page(Pfn(20)).copy_from(&twice);
        guest.memory.page(Pfn(30)).fill_zero();
    }
    let mut bytes = vec![0x5a; 1200 * PAGE_BYTES];
    for pfn in SHARED {
        let at = usize::try_from(block_of(pfn)).unwrap() * PAGE_BYTES;
        bytes[at..at + PAGE_BYTES].copy_from_slice(&read(guest.borrow().memory.page(Pfn(pfn))).0);
    }
    std::fs::write(&image, bytes).unwrap();
    File::open(&image).unwrap().sync_all().unwrap();
    let mut on = |_, _| true;
    commands::build(&image, &indexes, &mut commands::Options { bytes_per_second: None, progress: &mut on })
        .unwrap();
    let disk = DiskSpec { name: "xvda".into(), path: image.clone(), role: Role::Own };
    let gone = DiskSpec { name: "xvdb".into(), path: directory.path().join("none"), role: Role::ReadOnly };
    let frozen = Frozen { disks: vec![gone, disk], indexes };
    World { guest, image, frozen, directory }
}

impl World {
    fn options(&self) -> Options {
        Options { live: false, frozen: Some(self.frozen.clone()), ..LIVE }
    }

    /// Overwrites the block that holds `pfn`.
    fn overwrite(&self, pfn: u64) {
        let file = std::fs::OpenOptions::new().write(true).open(&self.image).unwrap();
        file.write_all_at(&[0x33], block_of(pfn) * 4096 + 77).unwrap();
        file.sync_all().unwrap();
    }

    fn save(&self, options: &Options) -> (File, Summary, Vec<String>) {
        let file = tempfile::tempfile().unwrap();
        let mut toolstack = SimToolstack { guest: Some(Rc::clone(&self.guest)), ..SimToolstack::default() };
        let stop = AtomicBool::new(false);
        let source = SimSource::new(&self.guest);
        let summary = super::run(source, file.as_fd(), options, &mut toolstack, &stop).unwrap();
        assert_eq!(summary.bytes, file.metadata().unwrap().len());
        (file, summary, toolstack.notes)
    }

    fn restore(&self, file: &File) -> (Result<Restored, RestoreError>, Rc<RefCell<Landed>>) {
        restore_with(file, &restore::Options::default())
    }

    /// Restores what should not be: no domain, and a sentence with `words`.
    fn refuses(&self, file: &File, words: &[&str]) {
        let (outcome, landed) = self.restore(file);
        let error = outcome.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, RestoreError::Frozen { .. }), "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{words:?} are not in: {text}");
        assert_eq!(landed.borrow().final_state, None);
    }
}

fn restore_with(
    mut file: &File,
    options: &restore::Options,
) -> (Result<Restored, RestoreError>, Rc<RefCell<Landed>>) {
    file.rewind().unwrap();
    let (target, landed) = SimTarget::new(2000);
    let (mut toolstack, stop) = (SimToolstack::default(), AtomicBool::new(false));
    (restore::run(target, file.as_fd(), &WIRING, options, &mut toolstack, &stop), landed)
}

fn bytes_of(mut file: &File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn types(stream: &[u8]) -> Vec<u32> {
    let starts = boundaries(stream);
    let word = |at: &usize| u32::from_le_bytes(stream[*at..at + 4].try_into().unwrap());
    starts[..starts.len() - 1].iter().map(word).collect()
}

#[test]
fn pages_stay_on_the_disk_and_come_back_right() {
    let world = world();
    let (file, summary, notes) = world.save(&world.options());
    let left = summary.left_out.unwrap();
    // One of the shared frames is a hole; one more frame has the contents of one of them.
    assert_eq!((left.references, left.stale), (1000, 0));
    assert_eq!(summary.pages, PAGES - 3 - 1000);
    assert!(left.spared > 1000 * 4000 && summary.bytes < PAGES * 4096 - left.spared + 40_000, "{summary:?}");
    assert!(notes.iter().any(|note| note.contains("disk xvdb is left out")), "{notes:?}");
    assert!(notes.iter().any(|note| note.contains("xl save -c") && note.contains("xvda")), "{notes:?}");
    let (restored, landed) = world.restore(&file);
    let restored = restored.unwrap();
    assert_eq!((restored.references, restored.pages), (1000, summary.pages));
    assert_same(&world.guest, &landed);
}

/// A file has nobody to ask: an index that is not up to date costs space, never the guest.
#[test]
fn what_the_index_is_wrong_about_is_written() {
    let world = world();
    for pfn in 600..640 {
        world.overwrite(pfn);
    }
    let (file, summary, _) = world.save(&world.options());
    let left = summary.left_out.unwrap();
    assert_eq!((left.references, left.stale), (960, 40));
    assert_eq!(summary.pages, PAGES - 3 - 960);
    let (restored, landed) = world.restore(&file);
    assert_eq!(restored.unwrap().references, 960);
    assert_same(&world.guest, &landed);
}

#[test]
fn a_page_that_stands_there_no_more_is_an_error_and_no_guest() {
    let world = world();
    let (file, ..) = world.save(&world.options());
    world.overwrite(777);
    let place = format!("sector {} of disk xvda", block_of(777) * 8);
    world.refuses(&file, &["pfn 0x309", &place, "stream verify --disks", "written since the save"]);
}

#[test]
fn another_disk_a_smaller_one_and_none_are_said_to_be_that() {
    let world = world();
    let (file, ..) = world.save(&world.options());
    let kept = world.directory.path().join("kept");
    std::fs::rename(&world.image, &kept).unwrap();
    world.refuses(&file, &["xvda", "No such file"]);
    std::fs::write(&world.image, vec![0x11; 1200 * PAGE_BYTES]).unwrap();
    world.refuses(&file, &["is not the disk", "another one stands under that name"]);
    std::fs::write(&world.image, vec![0x11; 1100 * PAGE_BYTES]).unwrap();
    world.refuses(&file, &["it has shrunk"]);
    // The operator says where it is.
    let disk_paths = [("xvda".to_owned(), kept)].into();
    let (restored, landed) = restore_with(&file, &restore::Options { disk_paths, ..Default::default() });
    assert_eq!(restored.unwrap().references, 1000);
    assert_same(&world.guest, &landed);
}

/// While it runs the guest writes its memory and its disks: every page is in the file, and a line says why.
#[test]
fn a_guest_that_runs_while_it_is_saved_leaves_nothing_out() {
    let world = world();
    {
        let mut guest = world.guest.borrow_mut();
        guest.writes = (0..30).map(|n| (n * 40..n * 40 + 300).collect()).collect();
    }
    let (file, summary, notes) = world.save(&Options { live: true, ..world.options() });
    assert_eq!(summary.left_out, None);
    assert!(notes.iter().any(|note| note.contains("the guest runs while it is saved")), "{notes:?}");
    let types = types(&bytes_of(&file));
    assert!(!types.contains(&FROZEN_DISKS) && !types.contains(&REFERENCES));
    let (restored, landed) = world.restore(&file);
    assert_eq!(restored.unwrap().references, 0);
    assert_same(&world.guest, &landed);
}

/// Xen's own restore can read what has nothing left out.
#[test]
fn where_nothing_can_be_left_out_the_file_is_stocks() {
    let world = world();
    let mut unknown = world.options();
    unknown.frozen.as_mut().unwrap().indexes = world.directory.path().join("nowhere");
    let (mut plain, mut verified) = (world.options(), world.options());
    plain.frozen = None;
    verified.verify = true;
    for (options, words) in [(unknown, "has an index"), (verified, "compared"), (plain, "")] {
        world.guest.borrow_mut().life = crate::domain::Life::Running;
        let (file, summary, notes) = world.save(&options);
        assert_eq!(summary.left_out, None);
        assert!(
            words.is_empty() && notes.is_empty() || notes.iter().any(|note| note.contains(words)),
            "{notes:?}"
        );
        assert!(!types(&bytes_of(&file)).contains(&FROZEN_DISKS), "{words}");
    }
    // Nor into a pipe, behind which there may be another host.
    world.guest.borrow_mut().life = crate::domain::Life::Running;
    let (mut out, into) = std::io::pipe().unwrap();
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        out.read_to_end(&mut all).unwrap();
        all
    });
    let mut toolstack = SimToolstack { guest: Some(Rc::clone(&world.guest)), ..SimToolstack::default() };
    let (source, stop) = (SimSource::new(&world.guest), AtomicBool::new(false));
    super::run(source, into.as_fd(), &world.options(), &mut toolstack, &stop).unwrap();
    drop(into);
    assert!(!types(&reader.join().unwrap()).contains(&FROZEN_DISKS));
}

/// References of which any bit is another one give no guest, and a page that was not saved never.
#[test]
fn a_bent_reference_gives_no_guest() {
    let world = world();
    let (file, ..) = world.save(&world.options());
    let bytes = bytes_of(&file);
    read_all(&bytes).unwrap();
    let (starts, types) = (boundaries(&bytes), types(&bytes));
    let at = starts[types.iter().position(|found| *found == REFERENCES).unwrap()];
    for (place, bit) in (0..40).flat_map(|place| [0, 5, 7].map(|bit| (place, bit))) {
        let mut bent = bytes.clone();
        bent[at + 8 + place] ^= 1 << bit;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bent).unwrap();
        let (outcome, landed) = world.restore(&file);
        assert!(outcome.is_err(), "bit {bit} of byte {place}");
        assert_eq!(landed.borrow().final_state, None);
        // What the stream's own rules do not see, the check does.
        let seen = read_all(&bent).is_err();
        assert_eq!(seen, !matches!(outcome, Err(RestoreError::Frozen { .. })), "bit {bit} of byte {place}");
    }
}

/// A reference can't stand in for what came in the stream, nor be told twice, nor be kept back.
#[test]
fn a_frame_has_one_way_to_its_contents() {
    let world = world();
    let (file, ..) = world.save(&world.options());
    let bytes = bytes_of(&file);
    let (starts, types) = (boundaries(&bytes), types(&bytes));
    let record = |kind| {
        let place = types.iter().position(|found| *found == kind).unwrap();
        starts[place]..starts[place + 1]
    };
    let (first, pages, references) = (record(FROZEN_DISKS), record(1), record(REFERENCES));
    let without = |range: &std::ops::Range<usize>| [&bytes[..range.start], &bytes[range.end..]].concat();
    let again = |range: &std::ops::Range<usize>, at: usize| {
        [&bytes[..at], &bytes[range.clone()], &bytes[at..]].concat()
    };
    for (what, bent, words) in [
        ("no references", without(&references), "have not, the first is"),
        ("no disks", without(&first), "comes before FROZEN_DISKS"),
        ("references twice", again(&references, references.end), "no PAGE_DATA has left"),
        ("pages behind them", again(&pages, references.end), "comes after REFERENCES"),
        ("disks twice", again(&first, first.end), "a second time"),
    ] {
        let error = read_all(&bent).expect_err(what);
        assert!(error.to_string().contains(words), "{what}: {error}");
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bent).unwrap();
        assert!(world.restore(&file).0.is_err(), "{what}");
    }
}

/// Checks are keyed anew for every save, when the guest has stopped.
#[test]
fn every_file_has_a_key_of_its_own() {
    let world = world();
    let key = || {
        world.guest.borrow_mut().life = crate::domain::Life::Running;
        let bytes = bytes_of(&world.save(&world.options()).0);
        let at = boundaries(&bytes)[types(&bytes).iter().position(|found| *found == FROZEN_DISKS).unwrap()];
        bytes[at + 16..at + 48].to_vec()
    };
    let (one, other) = (key(), key());
    assert!(one != other && one != vec![0; 32]);
}

/// Cancelled while it reads the disk back: no file, and a guest that can go on.
#[test]
fn a_save_that_is_cancelled_says_so() {
    let world = world();
    let stop = std::sync::Arc::new(AtomicBool::new(false));
    let set = std::sync::Arc::clone(&stop);
    let mut toolstack = SimToolstack { guest: Some(Rc::clone(&world.guest)), ..SimToolstack::default() };
    toolstack.watch = Some(Box::new(move |event| {
        if matches!(event, super::Event::Frames { sent, total, .. } if sent == total) {
            set.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    }));
    let file = tempfile::tempfile().unwrap();
    let source = SimSource::new(&world.guest);
    let outcome = super::run(source, file.as_fd(), &world.options(), &mut toolstack, &stop);
    assert!(matches!(outcome, Err(super::SaveError::Cancelled)), "{outcome:?}");
    assert!(read_all(&bytes_of(&file)).is_err());
}

/// No contents of a page of the guest's stand in the file if they stand on the disk.
#[test]
fn what_is_left_out_is_not_in_the_file() {
    let world = world();
    let page: PageBuf = read(world.guest.borrow().memory.page(Pfn(777)));
    let (file, ..) = world.save(&world.options());
    let bytes = bytes_of(&file);
    assert!(bytes.windows(64).all(|window| window != &page.0[..64]), "{} bytes", u64_of(bytes.len()));
}
