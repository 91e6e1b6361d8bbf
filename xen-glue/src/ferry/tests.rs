//! Simulated guests saved on one thread and restored on another, with a pipe for the stream and real connections over the
//! loopback for the lanes.

mod certified;
mod clones;
mod cut;
mod killed;
mod overwritten;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use mover::disk::image::{DiskSpec, Role};
use mover::index::commands;
use mover::memory::PageBuf;
use mover::policy::Wish;
use mover::report::{Event as Told, Mode, Phase as Step};
use mover::units::{PAGE_BYTES, Pfn, u64_of};

use super::{Credentials, Plan};
use crate::domain::Life;
use crate::restore::{self, RestoreError, Restored};
use crate::save::{self, Event, Options, Policy, SaveError, Summary};
use crate::simulated::{AtRelease, Guest, SimSource, SimTarget, SimToolstack, WIRING, read, states};
use crate::stream::OFFER;
use crate::stream::tests::samples::{boundaries, read_all};

/// How long both ends look for each other: until a test gives up waiting.
const REDIAL_FOR: Duration = Duration::from_secs(60);

fn plan(mode: Mode) -> Plan {
    Plan {
        mode,
        lanes: 2,
        plaintext: false,
        credentials: None,
        addresses: vec!["127.0.0.1".into()],
        guest: "guest".into(),
        disks: Vec::new(),
        indexes: "/nowhere".into(),
        redial_for: REDIAL_FOR,
    }
}

fn options(ferry: Option<Plan>) -> Options {
    let wish = Wish { max_downtime: Duration::from_secs(1), max_rounds: 5, throttle: false, finish: true };
    Options { live: true, verify: false, policy: Policy::Predict(wish), ferry, frozen: None }
}

/// What the target has of a guest in the end.
struct Copy {
    pages: Vec<PageBuf>,
    populated: BTreeSet<u64>,
    finished: bool,
    /// Pages that were held back, and whether holding back was ended.
    held: u64,
    let_go: bool,
    /// Whether the guest was stopped for good.
    stopped: bool,
}

/// How both ends have fared.
struct Trip {
    saved: Result<Summary, SaveError>,
    restored: Result<Restored, RestoreError>,
    copy: Copy,
    /// The stream as it went by.
    stream: Vec<u8>,
    /// What the source's toolstack was told.
    notes: Vec<String>,
    target_notes: Vec<String>,
    /// What each end told while pages were outstanding.
    lingered: [Vec<String>; 2],
}

/// What happens to the stream on its way, byte by byte: false ends it.
type Carrier = Box<dyn FnMut(&[u8], u64) -> Option<Vec<u8>> + Send>;

struct Journey {
    options: Options,
    dial_back: bool,
    /// Whether the target takes lanes in the clear.
    plaintext: bool,
    /// The certificates it goes by.
    credentials: Option<Credentials>,
    /// Whether its hypervisor can hold pages back.
    can_hold: bool,
    /// How long it looks for the source.
    redial_for: Duration,
    /// Why its host does not want that.
    not_lazy: Option<String>,
    carry: Carrier,
    /// What happens in the middle of the drain.
    at_release: Option<AtRelease>,
    /// Pages that take long to come until then.
    slow: Range<u64>,
    /// Set when the target is to be cancelled.
    stop_target: Arc<AtomicBool>,
}

impl Journey {
    fn new(plan: Plan) -> Self {
        Self {
            options: options(Some(plan)),
            dial_back: true,
            plaintext: false,
            credentials: None,
            can_hold: true,
            redial_for: REDIAL_FOR,
            not_lazy: None,
            carry: Box::new(|bytes, _| Some(bytes.to_vec())),
            at_release: None,
            slow: 0..0,
            stop_target: Arc::default(),
        }
    }

    /// Moves `guest`, which lives on this thread.
    fn go(mut self, guest: &Rc<RefCell<Guest>>, toolstack: &mut SimToolstack) -> Trip {
        let pages = usize::try_from(guest.borrow().memory.pages().0).unwrap();
        let (out, into) = (pipe(), pipe());
        toolstack.guest = Some(Rc::clone(guest));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (from_source, to_target) = (std::fs::File::from(out.0), std::fs::File::from(into.1));
            let carried = scope.spawn(move || carry(from_source, to_target, &mut self.carry));
            let (source_end, target_end) = (out.1, into.0);
            let (stop_target, can_hold) = (Arc::clone(&self.stop_target), self.can_hold);
            let taken = restore::Options {
                dial_back: self.dial_back,
                plaintext: self.plaintext,
                credentials: self.credentials.take(),
                redial_for: self.redial_for,
                not_lazy: self.not_lazy.take(),
                disk_paths: Default::default(),
            };
            let (at_release, lingering) = (self.at_release.take(), Arc::clone(&toolstack.lingering));
            let set_up = move |target: &mut SimTarget| {
                target.can_hold = can_hold;
                *target.hold.slow.lock().unwrap() = self.slow;
                *target.hold.at_release.lock().unwrap() = at_release;
                Arc::clone(target.hold.lingering.get_or_init(|| lingering))
            };
            let target = scope.spawn(move || restored(&target_end, pages, &taken, set_up, &stop_target));
            let saved = save::run(SimSource::new(guest), source_end.as_fd(), &self.options, toolstack, &stop);
            drop(source_end);
            let (restored, copy, [target_notes, theirs]) = target.join().unwrap();
            let notes = std::mem::take(&mut toolstack.notes);
            let lingered = [std::mem::take(&mut toolstack.lingered), theirs];
            let stream = carried.join().unwrap();
            Trip { saved, restored, copy, stream, notes, target_notes, lingered }
        })
    }
}

fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
}

/// Passes the stream on as `change` lets it; all that was passed on.
fn carry(mut from: std::fs::File, mut to: std::fs::File, change: &mut Carrier) -> Vec<u8> {
    let (mut all, mut buffer) = (Vec::new(), vec![0; 4096]);
    loop {
        let count = from.read(&mut buffer).unwrap();
        if count == 0 {
            return all;
        }
        let Some(bytes) = change(&buffer[..count], u64_of(all.len())) else { return all };
        all.extend(&bytes);
        if to.write_all(&bytes).is_err() {
            return all;
        }
    }
}

fn restored(
    from: &OwnedFd,
    pages: usize,
    options: &restore::Options,
    set_up: impl FnOnce(&mut SimTarget) -> Arc<AtomicU32>,
    stop: &AtomicBool,
) -> (Result<Restored, RestoreError>, Copy, [Vec<String>; 2]) {
    let (mut target, landed) = SimTarget::new(pages);
    let lingering = set_up(&mut target);
    let hold = Arc::clone(&target.hold);
    let mut toolstack = SimToolstack { lingering, ..SimToolstack::default() };
    let outcome = restore::run(target, from.as_fd(), &WIRING, options, &mut toolstack, stop);
    let landed = landed.borrow();
    let copy = Copy {
        pages: (0..u64_of(pages)).map(|pfn| read(landed.memory.page(Pfn(pfn)))).collect(),
        populated: landed.populated.clone(),
        finished: landed.final_state.is_some(),
        held: hold.times.load(Ordering::SeqCst),
        let_go: hold.finished.load(Ordering::SeqCst),
        stopped: hold.stopped.load(Ordering::SeqCst),
    };
    assert!(!copy.finished || landed.final_state.as_ref() == Some(&states().1));
    (outcome, copy, [toolstack.notes, toolstack.lingered])
}

/// The copy is the guest as it is now.
fn assert_same(guest: &Rc<RefCell<Guest>>, copy: &Copy) {
    let guest = guest.borrow();
    for (pfn, page) in (0..).zip(&copy.pages) {
        let hole = guest.holes.contains(&pfn);
        assert_eq!(copy.populated.contains(&pfn), !hole, "pfn {pfn}");
        assert!(hole || read(guest.memory.page(Pfn(pfn))) == *page, "pfn {pfn} is another one");
    }
    assert!(copy.finished);
}

/// Types of the stream's records.
fn types(stream: &[u8]) -> Vec<u32> {
    let starts = boundaries(stream);
    starts[..starts.len() - 1]
        .iter()
        .map(|at| u32::from_le_bytes(stream[*at..at + 4].try_into().unwrap()))
        .collect()
}

const LANES: u32 = 0x5046_0001;
const LANES_DONE: u32 = 0x5046_0002;

/// Holds the source back at its first batch until the target has dialled back, so that a test knows which way pages go.
fn patient() -> SimToolstack {
    let mut waited = false;
    let watch = move |event: &Event<'_>| {
        if let (Event::Frames { .. }, false) = (event, waited) {
            waited = true;
            std::thread::sleep(Duration::from_secs(1));
        }
    };
    SimToolstack { watch: Some(Box::new(watch)), ..SimToolstack::default() }
}

#[test]
fn a_guest_goes_by_lanes_and_its_state_in_the_stream() {
    let guest = Guest::new(3000);
    {
        let mut guest = guest.borrow_mut();
        guest.holes.extend((700..900).chain([5, 2999]));
        guest.shy.extend([77, 2500]);
        for pfn in 1000..1500 {
            guest.memory.page(Pfn(pfn)).fill_zero();
        }
        // Written behind and before the switch, and after each reading of the log, less and less.
        guest.writes = vec![(0..64).collect()];
        guest.later = vec![(0..3).collect(), (100..200).collect(), (1400..1700).collect()];
    }
    let trip = Journey::new(plan(Mode::Plain)).go(&guest, &mut patient());
    let (saved, restored) = (trip.saved.unwrap(), trip.restored.unwrap());
    assert_same(&guest, &trip.copy);
    read_all(&trip.stream).unwrap();
    let types = types(&trip.stream);
    let place =
        |wanted| types.iter().position(|found| *found == wanted).unwrap_or_else(|| panic!("{types:x?}"));
    assert!(place(OFFER) < place(LANES) && place(LANES) < place(LANES_DONE), "{types:x?}");
    assert!(types[place(LANES)..].iter().all(|found| *found != 1), "no pages behind LANES: {types:x?}");
    let ferried = saved.ferried.unwrap();
    assert!(ferried.zero >= 490 && ferried.data > 1000, "{ferried:?}");
    assert_eq!((ferried.references, restored.references), (0, 0));
    assert!(saved.bytes < 1000 * 4096, "{} bytes in the stream", saved.bytes);
    assert_eq!(saved.bytes, u64_of(trip.stream.len()));
    assert!(!guest.borrow().logging && guest.borrow().life == Life::Suspended);
    assert_eq!(trip.notes, [""; 0]);
}

/// A guest that writes all the while the lanes send, from a thread of its own.
#[test]
fn what_is_written_while_lanes_send_travels_again() {
    let guest = Guest::new(2000);
    guest.borrow_mut().racing = 900..1000;
    let (memory, over) = (Arc::clone(&guest.borrow().memory), Arc::new(AtomicBool::new(false)));
    let seen = Arc::clone(&over);
    let writer = std::thread::spawn(move || {
        for n in 0u64.. {
            if seen.load(Ordering::SeqCst) {
                break;
            }
            memory.page(Pfn(900 + n % 100)).copy_from(&PageBuf([u8::try_from(n % 251).unwrap(); PAGE_BYTES]));
        }
    });
    let mut toolstack = patient();
    let (mut waiting, mut writer) = (toolstack.watch.take().unwrap(), Some(writer));
    toolstack.watch = Some(Box::new(move |event| {
        if let Event::Phase(save::Phase::Suspend) = event {
            over.store(true, Ordering::SeqCst);
            writer.take().unwrap().join().unwrap();
        }
        waiting(event);
    }));
    let trip = Journey::new(plan(Mode::Plain)).go(&guest, &mut toolstack);
    trip.saved.unwrap();
    trip.restored.unwrap();
    assert_same(&guest, &trip.copy);
}

/// What `pageferry status` shows of a save comes from the engine once pages go by lanes, under the number both ends have.
#[test]
fn the_toolstack_hears_what_the_engine_tells() {
    let guest = Guest::new(2000);
    let heard = Rc::new(RefCell::new((Vec::new(), Vec::new(), 0)));
    let mut toolstack = patient();
    let (mut waiting, into) = (toolstack.watch.take().unwrap(), Rc::clone(&heard));
    toolstack.watch = Some(Box::new(move |event| {
        let mut heard = into.borrow_mut();
        match event {
            Event::Lanes(migration) => heard.0.push(*migration),
            Event::Engine(Told::Phase { phase, .. }) => {
                heard.1.push(*phase);
                // Time for a sample or two, of which there are ten a second.
                std::thread::sleep(Duration::from_millis(if *phase == Step::Rounds { 500 } else { 0 }));
            }
            Event::Engine(Told::Sample(sample)) => heard.2 = sample.pages.data.max(heard.2),
            _ => {}
        }
        drop(heard);
        waiting(event);
    }));
    let trip = Journey::new(plan(Mode::Plain)).go(&guest, &mut toolstack);
    let ferried = trip.saved.unwrap().ferried.unwrap();
    trip.restored.unwrap();
    let (lanes, phases, data) = &*heard.borrow();
    assert_eq!(lanes.len(), 1);
    assert!(phases.contains(&Step::Rounds) && phases.contains(&Step::Stop), "{phases:?}");
    assert!(*data > 0 && *data <= ferried.data, "{data} of {ferried:?}");
}

/// A setting that has no effect on lanes is not passed over in silence.
#[test]
fn a_guest_that_is_not_slowed_down_is_told_of() {
    let guest = Guest::new(200);
    let mut journey = Journey::new(plan(Mode::Plain));
    if let Policy::Predict(wish) = &mut journey.options.policy {
        wish.throttle = true;
    }
    let trip = journey.go(&guest, &mut patient());
    assert!(trip.saved.unwrap().ferried.is_some());
    assert!(trip.notes.iter().any(|note| note.contains("not slowed down")), "{:?}", trip.notes);
    assert_same(&guest, &trip.copy);
}

/// A target that does not dial back gets the stock stream, and one record that it passes over.
#[test]
fn nobody_who_dials_back_is_the_stock_stream() {
    let guest = Guest::new(500);
    let trip = Journey { dial_back: false, ..Journey::new(plan(Mode::Plain)) }.go(&guest, &mut patient());
    assert_eq!(trip.saved.unwrap().ferried, None);
    trip.restored.unwrap();
    assert_same(&guest, &trip.copy);
    let types = types(&trip.stream);
    assert!(types.contains(&OFFER) && !types.contains(&LANES), "{types:x?}");
}

/// Lanes in the clear are for two ends that both say so; where one does not, pages stay in the stream.
#[test]
fn lanes_in_the_clear_are_for_who_asks_for_them() {
    for taken in [true, false] {
        let guest = Guest::new(500);
        let plan = Plan { plaintext: true, ..plan(Mode::Plain) };
        let trip = Journey { plaintext: taken, ..Journey::new(plan) }.go(&guest, &mut patient());
        assert_eq!(trip.saved.unwrap().ferried.is_some(), taken);
        trip.restored.unwrap();
        assert_same(&guest, &trip.copy);
        let told = trip.target_notes.iter().any(|note| note.contains("lanes_plaintext"));
        assert_eq!(told, !taken, "{:?}", trip.target_notes);
    }
}

/// The offer is held up until the whole first round is in the pipe.
#[test]
fn who_dials_back_late_is_turned_away() {
    let guest = Guest::new(100);
    let mut journey = Journey::new(plan(Mode::Plain));
    let mut waited = false;
    journey.carry = Box::new(move |bytes, _| {
        if !std::mem::replace(&mut waited, true) {
            std::thread::sleep(Duration::from_secs(1));
        }
        Some(bytes.to_vec())
    });
    let trip = journey.go(&guest, &mut SimToolstack::default());
    assert_eq!(trip.saved.unwrap().ferried, None);
    trip.restored.unwrap();
    assert_same(&guest, &trip.copy);
    assert!(!types(&trip.stream).contains(&LANES));
}

/// Neither into a file, nor to be verified, nor under stock's policy is anything offered.
#[test]
fn an_offer_is_made_only_where_it_can_be_taken_up() {
    let file = tempfile::tempfile().unwrap();
    let verified = Options { verify: true, ..options(Some(plan(Mode::Plain))) };
    let stock = Options { policy: Policy::Stock, ..options(Some(plan(Mode::Plain))) };
    let still = Options { live: false, ..options(Some(plan(Mode::Plain))) };
    for (options, to_file) in [
        (options(Some(plan(Mode::Plain))), true),
        (verified, false),
        (stock, false),
        (still, false),
        (options(None), false),
    ] {
        let guest = Guest::new(20);
        let mut toolstack = SimToolstack { guest: Some(Rc::clone(&guest)), ..SimToolstack::default() };
        let (out, into) = pipe();
        let to = if to_file { file.as_fd() } else { into.as_fd() };
        let stop = AtomicBool::new(false);
        save::run(SimSource::new(&guest), to, &options, &mut toolstack, &stop).unwrap();
        let mut stream = Vec::new();
        drop(into);
        match to_file {
            true => {
                stream = std::fs::read(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)))
                    .unwrap()
            }
            false => drop(std::fs::File::from(out).read_to_end(&mut stream).unwrap()),
        }
        assert!(!types(&stream).contains(&OFFER), "{options:?}");
    }
}

/// A carrier that does `at` to the record LANES_DONE, which begins a piece of its own.
fn at_lanes_done(at: impl Fn(Vec<u8>) -> Option<Vec<u8>> + Send + 'static) -> Carrier {
    Box::new(move |bytes, _| {
        let there = bytes.starts_with(&LANES_DONE.to_le_bytes());
        if there { at(bytes.to_vec()) } else { Some(bytes.to_vec()) }
    })
}

/// Both ends have failed, the guest is as it was but for being stopped, and no domain came out of it.
fn assert_failed(trip: &Trip, guest: &Rc<RefCell<Guest>>, source: &str, target: &str) {
    let (saved, restored) = (trip.saved.as_ref().unwrap_err(), trip.restored.as_ref().unwrap_err());
    assert!(saved.to_string().contains(source), "{saved}, not {source}");
    assert!(restored.to_string().contains(target), "{restored}, not {target}");
    assert!(!trip.copy.finished && !guest.borrow().logging);
}

#[test]
fn a_stream_that_breaks_behind_the_pages_is_failure_at_both_ends() {
    let guest = Guest::new(300);
    let mut journey = Journey::new(plan(Mode::Plain));
    journey.carry = at_lanes_done(|_| None);
    let trip = journey.go(&guest, &mut patient());
    assert_failed(&trip, &guest, "", "");
}

#[test]
fn lanes_that_were_tampered_with_are_refused() {
    let guest = Guest::new(300);
    let mut journey = Journey::new(plan(Mode::Plain));
    journey.carry = at_lanes_done(|mut bytes| {
        bytes[8 + 30] ^= 1;
        Some(bytes)
    });
    let trip = journey.go(&guest, &mut patient());
    assert_failed(&trip, &guest, "", "with other contents");
}

#[test]
fn a_guest_that_does_not_suspend_itself_stays() {
    let guest = Guest::new(300);
    let mut toolstack = SimToolstack { instead: Some(Life::ShutDown(3)), ..patient() };
    let trip = Journey::new(plan(Mode::Plain)).go(&guest, &mut toolstack);
    assert_failed(&trip, &guest, "it has crashed", "");
    let refused = Guest::new(300);
    let mut toolstack = SimToolstack { refuse: true, ..patient() };
    let trip = Journey::new(plan(Mode::Plain)).go(&refused, &mut toolstack);
    assert_failed(&trip, &refused, "could not suspend the guest", "");
}

/// The target is told to stop in the middle of the pages.
#[test]
fn a_target_that_gives_up_is_heard() {
    let guest = Guest::new(2000);
    guest.borrow_mut().later = vec![(0..2000).collect(); 3];
    let journey = Journey::new(plan(Mode::Plain));
    let stop = Arc::clone(&journey.stop_target);
    let mut toolstack = patient();
    let mut waiting = toolstack.watch.take().unwrap();
    toolstack.watch = Some(Box::new(move |event| {
        if let Event::Phase(save::Phase::Suspend) = event {
            stop.store(true, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(200));
        }
        waiting(event);
    }));
    let trip = journey.go(&guest, &mut toolstack);
    assert_failed(&trip, &guest, "cancelled", "cancelled");
}

/// A disk image whose block `n` is page `n` of no guest yet.
fn image(path: &Path, blocks: u64) {
    let mut bytes = Vec::new();
    for block in 0..blocks {
        bytes.extend(block_of(block).0);
    }
    std::fs::write(path, bytes).unwrap();
}

fn block_of(block: u64) -> PageBuf {
    let mut page = PageBuf::zeroed();
    for (at, word) in (0..).zip(page.0.chunks_exact_mut(8)) {
        word.copy_from_slice(&(block << 32 | at << 8 | 0xd1).to_le_bytes());
    }
    page
}

/// A guest of 2,000 pages of which 500 stand on a disk with an index, some of them not any more.
struct Shelved {
    guest: Rc<RefCell<Guest>>,
    plan: Plan,
    _directory: tempfile::TempDir,
}

fn shelved(mode: Mode) -> Shelved {
    let directory = tempfile::tempdir().unwrap();
    let (path, indexes) = (directory.path().join("image"), directory.path().join("index"));
    image(&path, 600);
    let mut on = |_, _| true;
    commands::build(&path, &indexes, &mut commands::Options { bytes_per_second: None, progress: &mut on })
        .unwrap();
    let guest = Guest::new(2000);
    for block in 0..500 {
        guest.borrow().memory.page(Pfn(1000 + block)).copy_from(&block_of(block));
    }
    // Behind the index's back.
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    for block in 100..140 {
        std::os::unix::fs::FileExt::write_all_at(&file, &[0x33; PAGE_BYTES], block * 4096).unwrap();
    }
    file.sync_all().unwrap();
    let gone = DiskSpec { name: "xvdb".into(), path: directory.path().join("none"), role: Role::Own };
    let disk = DiskSpec { name: "xvda".into(), path, role: Role::Own };
    let plan = Plan { disks: vec![gone, disk], indexes, ..plan(mode) };
    Shelved { guest, plan, _directory: directory }
}

/// Pages that stand on the disk go by reference; those whose blocks were overwritten since the index was made are sent after
/// all, and none is wrong.
#[test]
fn pages_that_stand_on_a_disk_are_loaded_from_there() {
    let Shelved { guest, plan, .. } = &shelved(Mode::Refer);
    let trip = Journey::new(plan.clone()).go(guest, &mut patient());
    let (saved, restored) = (trip.saved.unwrap(), trip.restored.unwrap());
    assert_same(guest, &trip.copy);
    let ferried = saved.ferried.unwrap();
    assert!(ferried.references >= 400 && ferried.refetched >= 40, "{ferried:?}");
    assert!(restored.references >= 400 && ferried.disk_bytes >= 360 * 4096, "{restored:?}, {ferried:?}");
    assert!(trip.notes.iter().any(|note| note.contains("disk xvdb is left out")), "{:?}", trip.notes);
    assert_eq!(trip.target_notes, [""; 0]);
    assert!(trip.copy.held == 0 && !trip.copy.let_go, "nobody asked for it");
}

/// Where pages can be held back they are, while the rounds come in; each is what it was in the end, and nothing is held then.
#[test]
fn pages_held_back_on_their_way_are_right_in_the_end() {
    let mut held = 0;
    // Whether the loader or the holder comes first is chance.
    for _ in 0..20 {
        let Shelved { guest, plan, .. } = &shelved(Mode::Lazy);
        // Written while pages are held back, by pages from the disk and by others.
        guest.borrow_mut().later = vec![(0..20).collect(), (1000..1100).collect()];
        let trip = Journey::new(plan.clone()).go(guest, &mut patient());
        trip.saved.unwrap();
        trip.restored.unwrap();
        assert_same(guest, &trip.copy);
        assert!(trip.copy.let_go);
        held += trip.copy.held;
        if held > 0 {
            return;
        }
    }
    panic!("no page was held back in any of the trips");
}

/// Where they can't, or are not to be, everything is there before the restart, and a line says why.
#[test]
fn without_paging_nothing_is_held_back() {
    for (can_hold, not_lazy, why) in
        [(false, None, "has no paging"), (true, Some("not here".to_owned()), "not here")]
    {
        let Shelved { guest, plan, .. } = &shelved(Mode::Lazy);
        let journey = Journey { can_hold, not_lazy, ..Journey::new(plan.clone()) };
        let trip = journey.go(guest, &mut patient());
        // A source that is to be lazy does not wait for long for its target to be through, and says it behind that.
        let said = match trip.saved.unwrap().ferried {
            Some(ferried) => ferried.to_string(),
            None => trip.lingered[0].last().unwrap().clone(),
        };
        trip.restored.unwrap();
        assert_same(guest, &trip.copy);
        let words: Vec<_> = said.split(' ').collect();
        let at = words.windows(2).position(|pair| pair == ["by", "reference,"]).expect("an account");
        assert!(words[at - 1].parse::<u64>().unwrap() >= 400, "{said}");
        assert!(trip.copy.held == 0 && !trip.copy.let_go);
        let told = |note: &String| note.contains("no early restart") && note.contains(why);
        assert!(trip.notes.iter().any(told), "{:?}", trip.notes);
    }
}
