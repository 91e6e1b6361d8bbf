//! Domains made up in memory, for tests of the phases: what a guest does while it is saved is a script.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use mover::bitmap::Bitmap;
use mover::error::GuestError;
use mover::guest::{GuestMemory, HoldBack, Session};
use mover::memory::{GuestPage, Mapping, PageBuf, Window};
use mover::units::{PAGE_BYTES, PageCount, Pfn, u64_of, usize_of};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::{AsFd, OwnedFd};

use crate::abi::{DomainId, Part};
use crate::domain::{
    Absent, Batch, DomainError, FinalState, Frames, Held, KindState, Lazy, Life, LogRead, Source,
    StaticState, Target, Wiring, difference,
};
use crate::ferry::Lingering;
use crate::standby::Guard;
use crate::stream::{DomainHeader, GuestType, HvmParam, P2mFrames, PageEntry, PageType, TscInfo};

pub(crate) const ID: DomainId = DomainId(7);
pub(crate) const WIRING: Wiring =
    Wiring { store_port: 1, store_domain: DomainId(0), console_port: 2, console_domain: DomainId(0) };

/// A file with so many pages of memory.
pub(crate) fn memory_file(pages: usize) -> OwnedFd {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, u64_of(pages * PAGE_BYTES)).unwrap();
    file
}

/// The same, mapped.
pub(crate) fn mapped(file: &OwnedFd, pages: usize) -> Arc<Mapping> {
    Arc::new(Mapping::shared(file.as_fd(), pages * PAGE_BYTES, false).unwrap())
}

fn memory(pages: usize) -> Arc<Mapping> {
    mapped(&memory_file(pages), pages)
}

/// Content number `version` of a page.
fn content(pfn: u64, version: u64) -> PageBuf {
    let mut page = PageBuf::zeroed();
    for (at, word) in page.0.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(pfn << 40 ^ version << 20 ^ u64_of(at)).to_le_bytes());
    }
    page
}

pub(crate) fn read(page: GuestPage<'_>) -> PageBuf {
    let mut out = PageBuf::zeroed();
    page.copy_to(&mut out);
    out
}

/// A guest on the source: shared with the test, which looks at it afterwards.
pub(crate) struct Guest {
    pub(crate) memory: Arc<Mapping>,
    /// Frames without memory.
    pub(crate) holes: BTreeSet<u64>,
    /// Frames that can't be had while it runs.
    pub(crate) shy: BTreeSet<u64>,
    /// Frames it writes after each batch, one set a batch.
    pub(crate) writes: Vec<BTreeSet<u64>>,
    /// Frames it writes after its log was read, one set a reading, from the end.
    pub(crate) later: Vec<BTreeSet<u64>>,
    /// Frames that are in every reading of its log: somebody else writes them all the time.
    pub(crate) racing: Range<u64>,
    pub(crate) life: Life,
    pub(crate) logging: bool,
    /// How often the log was turned off.
    pub(crate) off: u32,
    /// Percentages it was slowed down to, one after the other; 100 at the end of each slow spell.
    pub(crate) speeds: Vec<u8>,
    /// Whether it can be.
    pub(crate) has_caps: bool,
    log: BTreeSet<u64>,
    versions: u64,
    /// Batches had.
    pub(crate) batches: usize,
}

impl Guest {
    pub(crate) fn new(pages: usize) -> Rc<RefCell<Self>> {
        let memory = memory(pages);
        for pfn in 0..u64_of(pages) {
            memory.page(Pfn(pfn)).copy_from(&content(pfn, 0));
        }
        Rc::new(RefCell::new(Self {
            memory,
            holes: BTreeSet::new(),
            shy: BTreeSet::new(),
            writes: Vec::new(),
            later: Vec::new(),
            racing: 0..0,
            life: Life::Running,
            logging: false,
            off: 0,
            speeds: Vec::new(),
            has_caps: true,
            log: BTreeSet::new(),
            versions: 0,
            batches: 0,
        }))
    }

    pub(crate) fn write(&mut self, pfns: &BTreeSet<u64>) {
        self.versions += 1;
        for &pfn in pfns.difference(&self.holes) {
            self.memory.page(Pfn(pfn)).copy_from(&content(pfn, self.versions));
            self.log.insert(pfn);
        }
    }
}

/// What a simulated guest is besides its memory.
pub(crate) fn states() -> (StaticState, FinalState) {
    let kind = KindState::Hvm {
        context: (0..=255).cycle().take(3000).collect(),
        params: vec![HvmParam { index: 1, value: 3 }, HvmParam { index: 17, value: 4 }],
    };
    let tsc = TscInfo { mode: 1, khz: 2_000_000, nsec: 12_345_678, incarnation: 3 };
    (StaticState { cpuid: vec![7; 240], msrs: vec![9; 32], pv: None }, FinalState { tsc, kind })
}

/// The source's end.
pub(crate) struct SimSource {
    pub(crate) guest: Rc<RefCell<Guest>>,
    /// Copies of the batch's contents, as they were when it was had.
    contents: Vec<PageBuf>,
}

impl SimSource {
    pub(crate) fn new(guest: &Rc<RefCell<Guest>>) -> Self {
        Self { guest: Rc::clone(guest), contents: Vec::new() }
    }
}

impl Source for SimSource {
    fn header(&self) -> DomainHeader {
        DomainHeader { guest: GuestType::Hvm, xen_major: 4, xen_minor: 17 }
    }
    fn pages(&self) -> u64 {
        self.guest.borrow().memory.pages().0
    }
    fn batch_pages(&self) -> usize {
        64
    }
    fn static_state(&mut self) -> Result<StaticState, DomainError> {
        Ok(states().0)
    }
    fn table_frames(&self) -> Option<P2mFrames> {
        None
    }
    fn life(&mut self) -> Result<Life, DomainError> {
        Ok(self.guest.borrow().life)
    }
    fn check(&mut self) -> Result<(), DomainError> {
        Ok(())
    }
    fn log_on(&mut self) -> Result<(), DomainError> {
        self.guest.borrow_mut().logging = true;
        Ok(())
    }
    fn log_read(&mut self, _: LogRead, into: &mut Bitmap) -> Result<u64, DomainError> {
        let mut guest = self.guest.borrow_mut();
        assert!(guest.logging, "the log is read while it is off");
        into.clear_all();
        for pfn in std::mem::take(&mut guest.log).into_iter().chain(guest.racing.clone()) {
            into.set(usize_of(pfn));
        }
        if guest.life == Life::Running
            && let Some(writes) = guest.later.pop()
        {
            guest.write(&writes);
        }
        Ok(into.count())
    }
    fn log_off(&mut self) -> Result<(), DomainError> {
        let mut guest = self.guest.borrow_mut();
        guest.logging = false;
        guest.off += 1;
        Ok(())
    }
    fn slow_down(&mut self, percent: u8) -> Result<(), DomainError> {
        let mut guest = self.guest.borrow_mut();
        if guest.has_caps {
            guest.speeds.push(percent);
            return Ok(());
        }
        let refused = std::io::Error::from_raw_os_error(libc::EINVAL);
        Err(DomainError::call("cap the processor time", crate::abi::DomainId(1), "")(refused))
    }
    fn full_speed(&mut self) -> Result<(), DomainError> {
        let mut guest = self.guest.borrow_mut();
        if guest.speeds.last().is_some_and(|speed| *speed != 100) {
            guest.speeds.push(100);
        }
        Ok(())
    }
    fn fetch(&mut self, pfns: &[u64], still: bool, batch: &mut Batch) -> Result<(), DomainError> {
        assert!(pfns.len() <= self.batch_pages());
        let mut guest = self.guest.borrow_mut();
        batch.entries.clear();
        batch.deferred.clear();
        self.contents.clear();
        for &pfn in pfns.iter().filter(|pfn| !guest.holes.contains(pfn)) {
            if guest.shy.contains(&pfn) && !still {
                batch.deferred.push(pfn);
                continue;
            }
            batch.entries.push(PageEntry::new(Pfn(pfn), PageType::Normal));
            self.contents.push(read(guest.memory.page(Pfn(pfn))));
        }
        let at = guest.batches;
        guest.batches += 1;
        if !still && let Some(writes) = guest.writes.get(at).cloned() {
            guest.write(&writes);
        }
        Ok(())
    }
    fn content(&self, at: usize) -> Part<'_> {
        Part::Bytes(&self.contents[at].0)
    }
    fn release(&mut self) -> Result<(), DomainError> {
        self.contents.clear();
        Ok(())
    }
    fn ferries(&self) -> bool {
        true
    }
    fn memory(&mut self, absent: &Arc<Absent>) -> Result<Arc<dyn GuestMemory>, DomainError> {
        let guest = self.guest.borrow();
        let (mapping, holes, shy) = (Arc::clone(&guest.memory), guest.holes.clone(), guest.shy.clone());
        Ok(Arc::new(SimMemory { mapping, holes, shy, absent: Some(Arc::clone(absent)), held: None }))
    }
    fn populated(&mut self) -> Result<Vec<Range<u64>>, DomainError> {
        let guest = self.guest.borrow();
        let mut runs: Vec<Range<u64>> = Vec::new();
        for pfn in (0..guest.memory.pages().0).filter(|pfn| !guest.holes.contains(pfn)) {
            match runs.last_mut() {
                Some(run) if run.end == pfn => run.end += 1,
                _ => runs.push(pfn..pfn + 1),
            }
        }
        Ok(runs)
    }
    fn final_state(&mut self) -> Result<FinalState, DomainError> {
        assert_eq!(self.guest.borrow().life, Life::Suspended);
        Ok(states().1)
    }
}

/// A guest's memory as lanes see it, at either end.
struct SimMemory {
    mapping: Arc<Mapping>,
    holes: BTreeSet<u64>,
    shy: BTreeSet<u64>,
    /// On the source.
    absent: Option<Arc<Absent>>,
    /// On the target.
    held: Option<Arc<SimHold>>,
}

/// Which pages are held: what the hypervisor knows, a half word a page, whatever becomes of the process that holds them.
pub(crate) struct Flags(Arc<Mapping>);

impl Flags {
    /// Pages of memory for those of so many.
    pub(crate) fn pages(pages: usize) -> usize {
        (4 * pages).div_ceil(PAGE_BYTES)
    }
    fn change(&self, at: usize, to: u32) -> bool {
        self.0.half_words()[at].swap(to, Ordering::SeqCst) != to
    }
    fn set(&self, at: usize) -> bool {
        self.change(at, 1)
    }
    fn clear(&self, at: usize) -> bool {
        self.change(at, 0)
    }
    fn get(&self, at: usize) -> bool {
        self.0.half_words()[at].load(Ordering::SeqCst) != 0
    }
    fn first(&self, pages: usize) -> Bitmap {
        let mut all = Bitmap::new(pages);
        for at in (0..pages).filter(|at| self.get(*at)) {
            all.set(at);
        }
        all
    }
    pub(crate) fn snapshot(&self) -> Bitmap {
        self.first(self.0.half_words().len())
    }
}

/// Holds pages back from a guest that never runs: what is in their place is looked at by the test.
pub(crate) struct SimHold {
    mapping: Arc<Mapping>,
    held: Arc<Flags>,
    /// Pages that were ever held.
    pub(crate) times: AtomicU64,
    pub(crate) finished: AtomicBool,
    /// Pages that can all be held, and that take long to come, until `at_release` is called: most of them are outstanding when the
    /// guest runs.
    pub(crate) slow: Mutex<Range<u64>>,
    /// Ends that go on while the guest would run.
    pub(crate) lingering: OnceLock<Arc<AtomicU32>>,
    /// Whether it was stopped then.
    pub(crate) stopped: AtomicBool,
    /// Called at the first release of a page when both ends linger, by who releases it.
    pub(crate) at_release: Mutex<Option<AtRelease>>,
    /// The same, when the page is there.
    pub(crate) behind_release: Mutex<Option<AtRelease>>,
    /// Who goes on if this process is killed, and the table that is left to it.
    pub(crate) guard: OnceLock<Arc<Guard>>,
    pub(crate) table: OnceLock<Arc<Mapping>>,
}

/// What a test does in the middle of a drain.
pub(crate) type AtRelease = Box<dyn FnOnce(&SimHold) + Send>;

impl SimHold {
    /// Of a guest's memory, with what says which pages of it are held.
    pub(crate) fn over(mapping: Arc<Mapping>, held: Arc<Mapping>) -> Arc<Self> {
        Arc::new(Self {
            mapping,
            held: Arc::new(Flags(held)),
            times: AtomicU64::new(0),
            finished: AtomicBool::new(false),
            slow: Mutex::default(),
            lingering: OnceLock::new(),
            stopped: AtomicBool::new(false),
            at_release: Mutex::new(None),
            behind_release: Mutex::new(None),
            guard: OnceLock::new(),
            table: OnceLock::new(),
        })
    }

    /// As an engine is given it.
    pub(crate) fn begin(self: &Arc<Self>) -> Held {
        let stopped = Arc::clone(self);
        let stop = Box::new(move || {
            stopped.stopped.store(true, Ordering::SeqCst);
            Ok(())
        });
        let guard = self.guard.get().map(|guard| Ok(Arc::clone(guard)));
        Held { hold: Arc::<Self>::clone(self), stop, cost: Arc::default(), guard }
    }

    /// The guest's memory, as lanes see it.
    pub(crate) fn memory(self: &Arc<Self>) -> Arc<dyn GuestMemory> {
        let (mapping, held) = (Arc::clone(&self.mapping), Some(Arc::clone(self)));
        Arc::new(SimMemory { mapping, holes: BTreeSet::new(), shy: BTreeSet::new(), absent: None, held })
    }

    fn strike(&self, strike: &Mutex<Option<AtRelease>>) {
        if self.lingering.get().is_some_and(|ends| ends.load(Ordering::SeqCst) == 2) {
            let strike = strike.lock().unwrap().take();
            strike.into_iter().for_each(|then| then(self));
        }
    }

    /// Pages held now.
    pub(crate) fn holds(&self) -> Vec<Pfn> {
        self.held.snapshot().iter().map(Pfn::at).collect()
    }

    fn is_slow(&self, pfn: Pfn) -> bool {
        self.slow.lock().unwrap().contains(&pfn.0)
    }

    fn take_a_while(&self, pfn: Pfn) {
        if self.is_slow(pfn) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The same, to be looked at again and again.
    pub(crate) fn held(&self) -> Arc<Flags> {
        Arc::clone(&self.held)
    }
}

impl HoldBack for SimHold {
    fn hold_back(&self, outstanding: &Bitmap) -> Result<(), GuestError> {
        assert!(outstanding.iter().all(|at| self.held.get(at)), "held ahead");
        Ok(())
    }
    fn keep(&self, session: &Session<'_>) -> Result<(), GuestError> {
        self.guard.get().into_iter().for_each(|guard| guard.hand_over(session.secret));
        Ok(())
    }
    fn table(&self) -> Option<Arc<Mapping>> {
        self.table.get().cloned()
    }
    fn take_up(&self, left: &mut Bitmap) -> Result<(), GuestError> {
        left.intersect(&self.held.first(left.len()));
        Ok(())
    }
    fn holds_ahead(&self) -> bool {
        true
    }
    fn hold_ahead(&self, pfn: Pfn) -> Result<bool, GuestError> {
        // One in five can't be.
        if pfn.0.is_multiple_of(5) && !self.is_slow(pfn) {
            return Ok(false);
        }
        self.mapping.page(pfn).copy_from(&PageBuf([0xdd; PAGE_BYTES]));
        assert!(self.held.set(pfn.index()), "{pfn} is held twice");
        self.times.fetch_add(1, Ordering::SeqCst);
        Ok(true)
    }
    fn is_held(&self, pfn: Pfn) -> bool {
        self.held.get(pfn.index())
    }
    fn release(&self, pfn: Pfn, page: GuestPage<'_>) -> Result<(), GuestError> {
        self.take_a_while(pfn);
        self.strike(&self.at_release);
        assert!(self.held.get(pfn.index()), "{pfn} is not held");
        self.mapping.page(pfn).copy_from(&read(page));
        self.held.clear(pfn.index());
        self.strike(&self.behind_release);
        Ok(())
    }
    fn wake(&self, _: Pfn) -> Result<(), GuestError> {
        Ok(())
    }
    fn next_fault(&self, timeout: Duration) -> Result<Option<Pfn>, GuestError> {
        std::thread::sleep(timeout);
        Ok(None)
    }
    fn finish(&self) -> Result<(), GuestError> {
        assert!(self.held.snapshot().iter().next().is_none(), "pages are held");
        self.finished.store(true, Ordering::SeqCst);
        Ok(())
    }
}

impl GuestMemory for SimMemory {
    fn pages(&self) -> PageCount {
        self.mapping.pages()
    }
    fn pinnable(&self) -> bool {
        false
    }
    fn window(&self, capacity: usize) -> Result<Window, GuestError> {
        Ok(self.mapping.window(capacity))
    }
    fn map(&self, pfns: &[Pfn], window: &mut Window) -> Result<(), GuestError> {
        if let (Some(hold), [pfn]) = (&self.held, pfns) {
            hold.take_a_while(*pfn);
        }
        let there = |pfn: &Pfn| {
            let shy =
                self.shy.contains(&pfn.0) && self.absent.as_ref().is_some_and(|absent| absent.note(*pfn));
            let held = self.held.as_ref().is_some_and(|hold| hold.is_held(*pfn));
            (!self.holes.contains(&pfn.0) && !shy && !held).then_some(*pfn)
        };
        self.mapping.fill(pfns.iter().map(there), window);
        Ok(())
    }
    fn untouched(&self, _: &mut Bitmap) -> Result<(), GuestError> {
        Ok(())
    }
    fn starts_zero(&self) -> bool {
        false
    }
}

/// What has become of a target, shared with the test.
pub(crate) struct Landed {
    pub(crate) memory: Arc<Mapping>,
    pub(crate) populated: BTreeSet<u64>,
    pub(crate) static_state: Option<StaticState>,
    pub(crate) final_state: Option<FinalState>,
}

/// The target's end.
pub(crate) struct SimTarget {
    landed: Rc<RefCell<Landed>>,
    /// The batch: written here, and placed when settled.
    batch: Vec<u64>,
    staging: Arc<Mapping>,
    comparing: bool,
    /// Whether pages can be held back, and what does it then.
    pub(crate) can_hold: bool,
    pub(crate) hold: Arc<SimHold>,
}

impl SimTarget {
    pub(crate) fn new(pages: usize) -> (Self, Rc<RefCell<Landed>>) {
        Self::over(memory(pages), memory(Flags::pages(pages)))
    }

    /// Of this memory, with what says which pages of it are held.
    pub(crate) fn over(memory: Arc<Mapping>, held: Arc<Mapping>) -> (Self, Rc<RefCell<Landed>>) {
        let staging = self::memory(32);
        let landed = Rc::new(RefCell::new(Landed {
            memory,
            populated: BTreeSet::new(),
            static_state: None,
            final_state: None,
        }));
        let (batch, hold) = (Vec::new(), SimHold::over(Arc::clone(&landed.borrow().memory), held));
        let target =
            Self { landed: Rc::clone(&landed), batch, staging, comparing: false, can_hold: true, hold };
        (target, landed)
    }
}

impl Target for SimTarget {
    fn guest(&self) -> GuestType {
        GuestType::Hvm
    }
    fn batch_pages(&self) -> usize {
        32
    }
    fn vcpus(&self) -> u32 {
        0
    }
    fn set_static_state(&mut self, state: &StaticState) -> Result<(), DomainError> {
        self.landed.borrow_mut().static_state = Some(state.clone());
        Ok(())
    }
    fn set_table_frames(&mut self, _: P2mFrames) -> Result<(), DomainError> {
        Err(DomainError::Stream { what: "a table".into() })
    }
    fn place(&mut self, entries: &[PageEntry]) -> Result<usize, DomainError> {
        assert!(entries.len() <= self.batch_pages());
        let mut landed = self.landed.borrow_mut();
        assert!(landed.static_state.is_some(), "pages before the static state");
        self.batch.clear();
        for entry in entries {
            if entry.pfn().0 >= landed.memory.pages().0 {
                return Err(DomainError::TooMany { domain: ID, max: landed.memory.pages().0 });
            }
            if entry.page_type().is_populated() {
                landed.populated.insert(entry.pfn().0);
            }
            if entry.has_data() {
                self.batch.push(entry.pfn().0);
            }
        }
        Ok(self.batch.len())
    }
    fn page(&self, at: usize) -> GuestPage<'_> {
        assert!(at < self.batch.len());
        self.staging.page(Pfn::at(at))
    }
    fn settle(&mut self) -> Result<(), DomainError> {
        assert!(!self.comparing);
        let landed = self.landed.borrow_mut();
        for (at, &pfn) in self.batch.iter().enumerate() {
            landed.memory.page(Pfn(pfn)).copy_from(&read(self.staging.page(Pfn::at(at))));
        }
        Ok(())
    }
    fn ferries(&self) -> bool {
        true
    }
    fn memory(&mut self, pages: u64, populated: &[Range<u64>]) -> Result<Arc<dyn GuestMemory>, DomainError> {
        let mut landed = self.landed.borrow_mut();
        if pages != landed.memory.pages().0 {
            return Err(DomainError::TooMany { domain: ID, max: landed.memory.pages().0 });
        }
        for pfn in populated.iter().cloned().flatten() {
            if landed.populated.insert(pfn) {
                // What a domain is given is not zero.
                landed.memory.page(Pfn(pfn)).copy_from(&PageBuf([0xee; PAGE_BYTES]));
            }
        }
        Ok(self.hold.memory())
    }
    fn hold_back(&self) -> Lazy {
        let (hold, can) = (Arc::clone(&self.hold), self.can_hold);
        Box::new(move || match can {
            true => Ok(hold.begin()),
            false => Err("the simulated hypervisor has no paging".to_owned()),
        })
    }
    fn difference(&self, at: usize, expected: &mut PageBuf) -> Result<Option<Range<usize>>, DomainError> {
        Ok(difference(&read(self.landed.borrow().memory.page(Pfn(self.batch[at]))), expected))
    }
    fn finish(&mut self, state: &FinalState, wiring: &Wiring) -> Result<Frames, DomainError> {
        assert_eq!(*wiring, WIRING);
        self.landed.borrow_mut().final_state = Some(state.clone());
        Ok(Frames { store: 3, console: 4 })
    }
}

/// Called on every event of a save.
pub(crate) type Watch = Box<dyn FnMut(&crate::save::Event<'_>)>;

/// A toolstack that does as it is told, and writes down what it was asked for.
#[derive(Default)]
pub(crate) struct SimToolstack {
    pub(crate) guest: Option<Rc<RefCell<Guest>>>,
    /// What the guest does when it is to suspend itself; as told if `None`.
    pub(crate) instead: Option<Life>,
    /// Answers to being asked.
    pub(crate) refuse: bool,
    /// Called on every event.
    pub(crate) watch: Option<Watch>,
    pub(crate) device_log: Vec<bool>,
    pub(crate) suspended: u32,
    pub(crate) missing: Option<u32>,
    pub(crate) notes: Vec<String>,
    /// What was told while pages were outstanding, and at the end of that.
    pub(crate) lingered: Vec<String>,
    /// Counts the ends that do.
    pub(crate) lingering: Arc<AtomicU32>,
}

impl SimToolstack {
    fn linger(&mut self, left: Lingering) -> Result<(), String> {
        if let Some(why) = left.arm() {
            self.lingered.push(why);
        }
        self.lingering.fetch_add(1, Ordering::SeqCst);
        let said = &mut self.lingered;
        let outcome = left.finish(|event| {
            if let mover::report::Event::Notice { text, .. } = event {
                said.push(text.clone());
            }
        });
        said.push(outcome.clone().unwrap_or_else(|error| error));
        outcome.map(drop)
    }
}

impl crate::save::Toolstack for SimToolstack {
    fn suspend(&mut self) -> io::Result<bool> {
        self.suspended += 1;
        if let Some(guest) = &self.guest {
            guest.borrow_mut().life = self.instead.unwrap_or(Life::Suspended);
        }
        Ok(!self.refuse)
    }
    fn device_log(&mut self, on: bool) -> io::Result<bool> {
        self.device_log.push(on);
        Ok(true)
    }
    fn lingers(&mut self, left: Lingering) -> Result<(), String> {
        self.linger(left)
    }
    fn report(&mut self, event: &crate::save::Event<'_>) {
        if let Some(watch) = &mut self.watch {
            watch(event);
        }
        if let crate::save::Event::Note(note) = event {
            self.notes.push((*note).to_string());
        }
    }
}

impl crate::restore::Toolstack for SimToolstack {
    fn static_data_done(&mut self, missing: u32) -> io::Result<bool> {
        self.missing = Some(missing);
        Ok(!self.refuse)
    }
    fn lingers(&mut self, left: Lingering) -> Result<(), String> {
        self.linger(left)
    }
    fn report(&mut self, event: &crate::restore::Event<'_>) {
        if let crate::restore::Event::Note(note) = event {
            self.notes.push((*note).to_string());
        }
    }
}
